"""The service behind HTTP: asks the other deployments and puts their answers together.

Plain Python; `serve.app` makes it the deployment that Ray Serve's proxies call.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from ceca.config import ServeConfig
from ceca.data.store import Store, StoreError
from ceca.search.catalogue import Picture
from ceca.search.confidence import Calibration, require_confidence
from ceca.search.ranking import Hit, rank
from serve.access import Gate, Key
from serve.api import make_api
from serve.audit import close_audit, open_audit
from serve.changes import Changes
from serve.conversation import POOL, agreeing_conditions, converse
from serve.explanation import cut, explain
from serve.following import Following
from serve.metrics import Metrics
from serve.query import Embeddings, Like, Query, ShardQuery, freeze
from serve.refusals import NotFound, Overloaded
from serve.replicas import Replicas
from serve.reranking import Reranker
from serve.schema import Job, Status, Understood, WordsRequest
from serve.service import Explanation, NewImage, SearchResult
from serve.snapshot import Snapshot
from serve.tokens import Issuer, Tokens
from serve.understanding import understand

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


def _in_time(
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]:
    """Decorate a method of `Ingress`.

    It raises Overloaded if it takes longer than `timeout_s`, waits included, or if something that it needs is
    unavailable at the moment.
    """

    @functools.wraps(method)
    async def within(self: Any, *arguments: P.args, **named: P.kwargs) -> R:
        try:
            async with asyncio.timeout(self.config.timeout_s):
                return await method(self, *arguments, **named)
        except (TimeoutError, RayActorError, BackPressureError, DeploymentUnavailableError, FileNotFoundError) as error:
            log.warning("%s: %s: %s", method.__name__, type(error).__name__, error)
            raise Overloaded(self.replicas.late) from None

    return within


class Ingress:
    """Answers HTTP requests with the help of the other deployments. Reads pictures in threads.

    Args:
        data: dataset URI.
        config: settings of the service.
        keys: API keys; none lets everybody in.
        encoder: handle of `QueryEncoder`.
        shards: handles of `GallerySearch`, one per shard.
        intake: handle of `Intake`.
        secret: signs the sessions of browsers; the same for all replicas.
        issuer: whose OIDC tokens are accepted beside keys; None accepts none.
        judge: handle of `Judge`; None if no engine looks at hits.
    """

    def __init__(
        self,
        data: str,
        config: ServeConfig,
        keys: tuple[Key, ...],
        encoder: DeploymentHandle,
        shards: Sequence[DeploymentHandle],
        intake: DeploymentHandle,
        secret: bytes | None = None,
        issuer: Issuer | None = None,
        judge: DeploymentHandle | None = None,
    ):
        self.config, self.metrics = config, Metrics()
        self.tokens = Tokens(issuer) if issuer is not None else None
        self.gate = Gate(keys, config.most("ingress"), secret=secret, tokens=self.tokens)
        store = Store(data)
        self.replicas = Replicas(config, encoder, shards, intake)
        self.following = Following(store, config, self.replicas, self.metrics)
        self.changes = Changes(store, config, self.following, self.replicas)
        self.reranker = Reranker(config, judge, self.metrics)

    def __serve_build_asgi_app__(self) -> Any:
        if self.gate.closed:  # else all clients are alike
            open_audit(self.config.audit)
        else:
            close_audit()
        return make_api(self, self.config, self.gate)

    @property
    def snapshot(self) -> Snapshot:
        return self.following.snapshot

    @property
    def ready(self) -> bool:
        return self.following.ready

    async def keep_following(self) -> None:
        """Follow newer editions, sessions that end on other replicas, and the issuer's keys, as long as this lives."""
        tokens = [self.tokens.keep()] if self.tokens is not None else []
        await asyncio.gather(self.following.keep(), self._keep_sessions(), *tokens)

    async def _keep_sessions(self) -> None:
        while self.gate.keys:
            await asyncio.sleep(self.config.follow_s)
            await self.tell_ended()

    async def tell_ended(self) -> None:
        """Tell the other replicas which sessions have ended, and learn it from them: the intake keeps the list."""
        sessions = self.gate.sessions
        try:
            sessions.merge(await self.replicas.merge_ended(sessions.ended))
        except Exception as error:  # it may answer the next time
            log.warning("the other replicas learn later which sessions have ended: %s", error)

    # --- searching ----------------------------------------------------------------------------------------

    @_in_time
    async def search(self, query: Query) -> SearchResult:
        """Search the gallery.

        Raises:
            FacetError: a condition names an unknown facet or value.
            NoConfidence: a least confidence is asked for, and the model was not calibrated for this ω.
            WrongAnswer: an answer is about an unknown facet or is not one of its values.
            ImageError: the sample is an image that cannot be decoded.
            NotFound: the sample is an image that the gallery does not have.
            Overloaded: not in time.
        """
        try:
            return await self._search(self.snapshot, query)
        except FileNotFoundError:  # objects of this edition, or parts of its tables, have been written again
            await self.following.reopen()
            return await self._search(self.snapshot, query)

    async def _search(self, snapshot: Snapshot, query: Query) -> SearchResult:
        result = await self._find(snapshot, query)
        shown = [hit.image_id for hit in result.hits[query.offset :]]
        summaries = await asyncio.to_thread(snapshot.catalogue.summaries, shown)
        paths = await asyncio.to_thread(snapshot.catalogue.source_paths, shown)
        return dataclasses.replace(result, summaries=summaries, paths=paths)

    async def _find(self, snapshot: Snapshot, query: Query) -> SearchResult:
        snapshot.facets.check(query.where)  # here, so that a wrong condition does not fail a whole batch
        calibration = self._calibration(snapshot, query)
        with self.metrics.stage("encode"):
            embeddings = await self._embed(snapshot, query.sample)
        most = max(query.top_k, POOL) if query.in_conversation else query.top_k
        if query.rerank is not None:
            most = max(most, query.rerank.images)
        hits = await self._hits(snapshot, embeddings, dataclasses.replace(query, top_k=most))
        confidence = calibration.of_hits(hits, query.omega, snapshot.images(query.where)) if calibration else None
        if confidence is not None and confidence < query.min_confidence:
            result = SearchResult(snapshot, [])
        elif query.in_conversation:
            result = await self._converse(snapshot, query, embeddings, hits)
        else:
            result = SearchResult(snapshot, hits)
        if query.rerank is not None:
            result = await self.reranker.rerank(query, result)
        return dataclasses.replace(result, hits=result.hits[: query.top_k], confidence=confidence)

    async def _converse(
        self, snapshot: Snapshot, query: Query, embeddings: Embeddings, hits: list[Hit]
    ) -> SearchResult:
        conditions = agreeing_conditions(snapshot, query)
        if conditions is not None:
            narrowed = dataclasses.replace(query, top_k=POOL, where={**query.where, **conditions})
            agreeing = await self._hits(snapshot, embeddings, narrowed)
            hits = list({hit.image_id: hit for hit in (*hits, *agreeing)}.values())
        if not hits:  # no image fulfils the conditions
            return SearchResult(snapshot, [], [])
        with self.metrics.stage("conversation"):
            return await asyncio.to_thread(converse, snapshot, hits, query)

    def _calibration(self, snapshot: Snapshot, query: Query) -> Calibration | None:
        """The calibration that holds for a query; None if there is none.

        Raises:
            NoConfidence: there is none, and the query asks for a least confidence.
        """
        calibration = None if query.text is None else snapshot.calibration_for(self.config)
        if query.min_confidence:
            require_confidence(calibration, query.omega)
        return calibration

    async def _embed(self, snapshot: Snapshot, sample: str | bytes | Like) -> Embeddings:
        """The embeddings [D] and [E] of what is searched for."""
        if isinstance(sample, Like):
            embeddings = await self._embeddings_of(snapshot, sample.image_id)
            if embeddings is None:
                raise NotFound(f"no image {sample.image_id} in this gallery")
            return embeddings
        if isinstance(sample, bytes):
            return await self.replicas.embed_image(snapshot.edition, sample)
        return await self.replicas.embed_query(snapshot.edition, sample)

    async def _embeddings_of(self, snapshot: Snapshot, image_id: str) -> Embeddings | None:
        """The embeddings [D] and [E] of an image of the gallery; None if it is not there."""
        if image_id not in snapshot.catalogue:
            return None
        return await self.replicas.embeddings_of(snapshot.edition, image_id)

    async def _hits(self, snapshot: Snapshot, embeddings: Embeddings, query: Query) -> list[Hit]:
        """The best images of the whole gallery."""
        edition, rerank = snapshot.edition, self.config.rerank
        shard_query = ShardQuery(
            edition,
            *embeddings,
            omega=query.omega,
            top_k=max(query.top_k, rerank),
            where=freeze(query.where),
            with_rows=rerank > 0,
            shards=len(self.replicas.shards),
        )
        with self.metrics.stage("gallery"):
            candidates = await self.replicas.candidates(shard_query)
        return rank(
            candidates, top_k=query.top_k, omega=query.omega, rerank_first=rerank, global_dim=edition.global_dim
        )

    @_in_time
    async def explain(self, text: str, image_id: str, omega: float) -> Explanation | None:
        """Explain why a description returns an image; None if the gallery does not have the image."""
        try:
            return await self._explain(self.snapshot, text, image_id, omega)
        except FileNotFoundError:  # as in `search`
            await self.following.reopen()
            return await self._explain(self.snapshot, text, image_id, omega)

    async def _explain(self, snapshot: Snapshot, text: str, image_id: str, omega: float) -> Explanation | None:
        image = await self._embeddings_of(snapshot, image_id)
        if image is None:
            return None
        (told,) = await asyncio.to_thread(snapshot.catalogue.told, [image_id])
        parts = cut(text, told)
        texts = await self.replicas.embed_texts(snapshot.edition, parts.texts)
        return explain(snapshot, parts, texts, image, omega)

    @_in_time
    async def understand(self, said: WordsRequest) -> Understood:
        """Read what a searcher says in their own words.

        Raises:
            NotFound: the gallery does not have the picture.
            RequestValidationError: nobody is asked about this facet.
            Overloaded: not in time.
        """
        return await understand(self.snapshot, self.reranker.judge, said)

    @_in_time
    async def picture(self, image_id: str) -> Picture | None:
        """The file of an image of the gallery; None if it is not there."""
        for last in (False, True):
            catalogue = self.snapshot.catalogue
            try:
                return catalogue.cached(image_id) or await asyncio.to_thread(catalogue.picture, image_id)
            except StoreError:
                if last:
                    raise
                await self.following.reopen()  # its part may have been written again when another image was erased
        return None

    # --- changes ------------------------------------------------------------------------------------------

    @_in_time
    async def add(self, image: NewImage) -> Job:
        return await self.changes.add(image)

    @_in_time
    async def remove(self, image_id: str) -> Job | None:
        return await self.changes.remove(image_id)

    @_in_time
    async def job(self, job: str) -> Job | None:
        return await self.changes.job(job)

    @_in_time
    async def status(self) -> Status:
        status, reranking = await asyncio.gather(self.changes.status(), self.reranker.problem())
        return status.model_copy(update={"reranking": reranking})
