"""The service in this process: its real code, without Ray and HTTP."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ceca.config import ServeConfig
from ceca.data.store import Store
from serve.access import Key
from serve.encoder import QueryEncoder
from serve.ingress import Ingress
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
