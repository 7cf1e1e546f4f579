"""The service in this process: its real code, without Ray and HTTP."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ceca.config import ServeConfig
from ceca.data.store import Store
from serve.access import Key
from serve.encoder import QueryEncoder
from serve.engine import Engine, OnDemand
from serve.ingress import Ingress
from serve.judge import Judge
from serve.searcher import GallerySearch
from serve.sessions import Sessions


class Handle:
    """What Ray gives for a deployment, over an object of this process."""

    def __init__(self, replica: Any):
        self.replica = replica

    def __getattr__(self, method: str) -> Any:
        return SimpleNamespace(remote=getattr(self.replica, method))

    def broadcast(self, method: str, *arguments: Any) -> Any:
        async def results(**_: Any) -> list[Any]:
            return []  # the object loads an edition when it is first asked for it

        return SimpleNamespace(results_async=results)


ENDED = Sessions(b"")  # what an intake remembers of sessions


class NoIntake:
    """Does nothing about what is added or removed."""

    async def wake(self) -> None: ...

    async def status(self) -> str:
        return ""

    async def merge_ended(self, ended: dict[str, int]) -> dict[str, int]:
        return ENDED.merge(ended)


class InProcess(Ingress):
    """The ingress with the others as plain objects instead of Ray actors."""

    def __init__(self, store: Store, config: ServeConfig, keys: tuple[Key, ...]):
        encoder, shard = QueryEncoder(store.uri, config), GallerySearch(store.uri, config, 0)
        super().__init__(store.uri, config, keys, Handle(encoder), [Handle(shard)], Handle(NoIntake()))
        self.following.ready = True

    async def keep_following(self) -> None: ...


class OneJudge:
    """Handle of the service's one judge, which is made in the event loop that first asks it."""

    def __init__(self, data: str, config: ServeConfig):
        self.arguments, self.judge = (data, config), Judge.__new__(Judge)
        self.made = False

    def __getattr__(self, method: str) -> Any:
        async def remote(*arguments: Any) -> Any:
            if not self.made:
                self.made = True
                await self.judge.__init__(*self.arguments)  # type: ignore[misc]
            return await getattr(self.judge, method)(*arguments)

        return SimpleNamespace(remote=remote)


class InThisProcess(OnDemand):
    """The engine without a process of its own."""

    def _make(self, knowledge: Any) -> Any:
        return Handle(Engine(self.settings, knowledge))


class WithEngine(InProcess):
    """The service with an engine, in this process."""

    def __init__(self, store: Store, config: ServeConfig):
        super().__init__(store, config, ())
        self.reranker.judge = OneJudge(store.uri, config)
