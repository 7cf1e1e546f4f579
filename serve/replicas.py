"""Calls of the ingress to the other deployments: batched, within the time limit, and repeated if a replica dies."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from ceca.config import ServeConfig
from ceca.search.edition import Edition
from ceca.search.ranking import Candidates
from serve.batches import Batches
from serve.query import Embeddings, ShardQuery
from serve.refusals import Overloaded

log = logging.getLogger(__name__)

ATTEMPTS = 4  # calls to a deployment whose replicas die
GATHER_S = 0.001  # a request waits this long for others that go to the same deployment
PREPARE_S = 600.0  # time for the replicas to load the next edition


class Replicas:
    """The encoder, the shards and the intake, as the ingress calls them. Every call may raise Overloaded.

    Args:
        config: settings of the service.
        encoder: handle of `QueryEncoder`.
        shards: handles of `GallerySearch`, one per shard.
        intake: handle of `Intake`.
    """

    def __init__(
        self,
        config: ServeConfig,
        encoder: DeploymentHandle,
        shards: Sequence[DeploymentHandle],
        intake: DeploymentHandle,
    ):
        self.config, self.encoder, self.shards, self.intake = config, encoder, list(shards), intake
        self.late = f"no answer within {config.timeout_s:g} s"
        # A call to a replica costs milliseconds, however much it carries: requests of the same moment go in one call.
        self.encoding = self._batches(encoder, "encode")
        self.searching = [self._batches(shard, "search") for shard in self.shards]

    # --- requests -----------------------------------------------------------------------------------------

    async def embed_query(self, edition: Edition, text: str) -> Embeddings:
        """Embed a description: [D] and [E]."""
        return await self.encoding.ask((edition, text))

    async def embed_texts(self, edition: Edition, texts: list[str]) -> Embeddings:
        """Embed texts: [N, D] and [N, E]."""
        return await self._call(self.encoder, "texts", edition, texts)

    async def embed_image(self, edition: Edition, content: bytes) -> Embeddings:
        """Embed an encoded image as a query: [D] and [E]."""
        whole, local = await self._call(self.encoder, "images", edition, [content], None)
        return whole[0], local[0]

    async def embeddings_of(self, edition: Edition, image_id: str) -> Embeddings | None:
        """The embeddings [D] and [E] of an image of the gallery.

        Returns:
            None if no shard has it: a replica opened this edition after the image was erased.
        """
        key = (edition, len(self.shards))
        rows = await asyncio.gather(*(self._call(shard, "row", key, image_id) for shard in self.shards))
        row = next((row for row in rows if row is not None), None)
        return None if row is None else (row[: edition.global_dim], row[edition.global_dim :])

    async def candidates(self, query: ShardQuery) -> list[Candidates]:
        """The best images of every shard."""
        return await asyncio.gather(*(searching.ask(query) for searching in self.searching))

    # --- editions and changes -----------------------------------------------------------------------------

    async def prepare(self, edition: Edition) -> None:
        """Have every replica load an edition. A replica that starts meanwhile loads it at its first request.

        Raises:
            Exception: a replica cannot load it; a replica that dies meanwhile does not count.
        """
        calls: list[tuple[DeploymentHandle, tuple[Any, ...]]] = [(self.encoder, (edition,))]
        calls += [(shard, (edition, len(self.shards))) for shard in self.shards]
        for handle, arguments in calls:
            results = await handle.broadcast("prepare", *arguments).results_async(
                timeout_s=PREPARE_S, return_exceptions=True
            )
            for result in results:
                if isinstance(result, Exception) and not isinstance(result, RayActorError):
                    raise result

    async def change_model(self, edition: Edition) -> None:
        """Load an edition's model, and embed with it the images that were added under another model."""
        await self.encoder.prepare.remote(edition)
        await self.intake.carry.remote(edition)

    async def wake_intake(self) -> None:
        """Tell the intake that there is work."""
        try:
            await self._call(self.intake, "wake")
        except Overloaded:  # it also looks by itself
            log.warning("the intake does not answer")

    async def intake_status(self) -> str:
        """What keeps the intake from its work; empty if nothing does."""
        return await self._call(self.intake, "status")

    async def merge_ended(self, ended: dict[str, int]) -> dict[str, int]:
        """Sessions that ended on any replica, with those that ended on this one (`serve.sessions`)."""
        return await self._call(self.intake, "merge_ended", ended)

    # --- calls --------------------------------------------------------------------------------------------

    async def _call(self, handle: DeploymentHandle, method: str, *arguments: Any) -> Any:
        """Call a method of any replica of a deployment, and of another one if the replica dies.

        Raises:
            Overloaded: too many requests wait, or no replica answers in time.
        """
        deadline = time.monotonic() + self.config.timeout_s
        for attempt in range(ATTEMPTS):
            try:
                left = deadline - time.monotonic()
                return await asyncio.wait_for(getattr(handle, method).remote(*arguments), left)
            except BackPressureError:
                raise Overloaded("too many requests wait") from None
            except TimeoutError:
                raise Overloaded(self.late) from None
            except (RayActorError, DeploymentUnavailableError) as error:
                log.warning("calling again: %s", error)
                await asyncio.sleep(0.1 * 2**attempt)
        raise Overloaded("no replica answers")

    def _batches(self, handle: DeploymentHandle, method: str) -> Batches[Any, Any]:
        async def call(requests: list[Any]) -> Any:
            return await self._call(handle, method, requests)

        return Batches(call, self.config.batch, GATHER_S, at_once=self.config.queue)
