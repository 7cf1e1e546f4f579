"""Re-ranking of a search's best hits by verdicts, within the seconds that it was asked for, or not at all.

Whatever keeps the engine from answering, the search is answered: without a verdict its order is the plain one. The
figures of this re-ranking, and its weight, come from `ceca evaluate --rerank-engine`, which computes it by the same
functions.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence

import numpy as np
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from ceca.config import ServeConfig
from ceca.data.store import StoreError
from ceca.dialogue.conversation import Subject
from ceca.dialogue.verdicts import Claim, Verdict, learned_weights, stated
from ceca.search.ranking import Hit
from ceca.search.reranking import rerank_by_verdicts, support, worth_asking
from serve.judge import Judged, Verdicts, versions_of
from serve.metrics import Metrics
from serve.query import Query
from serve.schema import Rerank, Reranking
from serve.service import SearchResult
from serve.snapshot import Snapshot

log = logging.getLogger(__name__)

ENGINE_SHARE = 0.9  # of the seconds: the engine's part; the rest is for the way to it and back
PROBLEM_S = 1.0  # longest wait for the deployment to say how the engine is
AWAY = (RayError, BackPressureError, DeploymentUnavailableError)
NO_ENGINE = "this service was started without rerank_engine"


def away(error: Exception) -> str:
    """Why nothing came from the deployment Judge, for one of `AWAY` or a TimeoutError."""
    return f"the deployment Judge does not answer ({type(error).__name__})"


class Plain(Exception):
    """The search keeps its plain order, with the reason."""


@dataclasses.dataclass
class Findings:
    """What is known of the best images while the seconds go by.

    Attributes:
        images: the images that the engine is asked about, best first.
        claims: what the query states; nothing is asked without a claim.
        verdicts: image id → claim → verdict.
        known: number of verdicts that were known before.
        problem: why verdicts are missing; empty if none are.
    """

    images: Sequence[str] = ()
    claims: tuple[Claim, ...] = ()
    verdicts: dict[str, Mapping[Claim, Verdict]] = dataclasses.field(default_factory=dict)
    known: int = 0
    problem: str = ""

    @property
    def questions(self) -> int:
        return len(self.images) * len(self.claims)

    @property
    def answered(self) -> int:
        return sum(map(len, self.verdicts.values()))

    def add(self, verdicts: Verdicts) -> None:
        for image_id, said in verdicts.items():
            self.verdicts[image_id] = {**self.verdicts.get(image_id, {}), **said}

    def missing(self) -> list[str]:
        """The images about which something is not known."""
        return [name for name in self.images if len(self.verdicts.get(name, ())) < len(self.claims)]


class Reranker:
    """Ranks the best hits of searches again.

    Args:
        config: settings of the service.
        judge: handle of `serve.judge.Judge`; None if the service has no engine.
        metrics: counters of this replica.
    """

    def __init__(self, config: ServeConfig, judge: DeploymentHandle | None, metrics: Metrics):
        self.config, self.judge, self.metrics = config, judge, metrics
        self.weights: tuple[str, Mapping[float, float]] = ("", {})  # of a model, by its digest

    async def problem(self) -> str:
        """Why the engine is not there; empty if it is, or if nobody wants it."""
        if self.judge is None:
            return ""
        try:
            return await asyncio.wait_for(self.judge.problem.remote(), PROBLEM_S)
        except (TimeoutError, *AWAY) as error:
            return away(error)

    async def rerank(self, query: Query, result: SearchResult) -> SearchResult:
        """Rank the best hits of a query again, if the engine says something about them in time.

        Args:
            query: it asks for re-ranking.
            result: its hits, best first. They include all that may be judged.
        """
        assert query.rerank is not None
        wanted, started, found, weight = query.rerank, time.monotonic(), Findings(), 0.0
        try:
            async with asyncio.timeout(wanted.seconds):
                weight = await self._weight(result.snapshot, query)
                await self._look(result, query, started + ENGINE_SHARE * wanted.seconds, found)
        except Plain as reason:
            found.problem = str(reason)
        except TimeoutError:
            found.problem = "" if found.questions else f"nothing was found out within {wanted.seconds:g} s"
        except AWAY as error:
            log.warning("re-ranking: %s", error)
            found.problem = away(error)
        by_engine = weight > 0 and found.answered > 0
        how = Reranking(
            by="engine" if by_engine else "plain",
            reason=_reason(found, wanted),
            seconds=round(time.monotonic() - started, 3),
            weight=weight,
            claims=dict(found.claims),
            questions=found.questions,
            known=found.known,
            answered=found.answered,
        )
        self.metrics.stages.observe(how.seconds, {"stage": "rerank"})
        self.metrics.reranked.inc(1, {"by": how.by})
        if not by_engine:
            return dataclasses.replace(result, reranking=how)
        verdicts = {name: {claim.attribute: said for claim, said in of.items()} for name, of in found.verdicts.items()}
        hits = _in_order(result.hits, found, weight)
        return dataclasses.replace(result, hits=hits, reranking=how, verdicts=verdicts)

    async def _weight(self, snapshot: Snapshot, query: Query) -> float:
        """The weight of the engine's verdicts.

        Raises:
            Plain: there is no engine, or nothing to weigh.
        """
        engine = self.config.reranker
        if self.judge is None or engine is None:
            raise Plain(NO_ENGINE)
        if query.in_conversation:
            raise Plain("a conversation ranks by its answers")
        edition = snapshot.edition
        if self.weights[0] != edition.digest:
            arguments = edition.store, edition.digest, engine, self.config.neighbours
            try:
                self.weights = edition.digest, await asyncio.to_thread(learned_weights, *arguments)
            except StoreError as error:
                raise Plain(f"the weight of the engine's verdicts cannot be read: {error}") from None
        weight = next((w for omega, w in self.weights[1].items() if abs(omega - query.omega) < 1e-6), None)
        if weight is None:
            raise Plain(
                f"no weight of the engine's verdicts was learned for the model {edition.model_name} and "
                f"ω = {query.omega:g}: run `ceca evaluate --rerank-engine {engine.engine}` with the engine's settings "
                "of this service, and start the service again"
            )
        if weight == 0:
            raise Plain("the engine's verdicts raised no figure on the validation split, so they weigh nothing")
        return weight

    async def _look(self, result: SearchResult, query: Query, until: float, found: Findings) -> None:
        """Find the verdicts about the best hits.

        Args:
            result: the hits.
            query: what they were found for.
            until: when the engine should be done.
            found: to add to.

        Raises:
            Plain: there is nothing to ask.
        """
        assert self.judge is not None
        assert query.text is not None
        assert query.rerank is not None
        snapshot, best = result.snapshot, result.hits[: query.rerank.images]
        if not worth_asking(np.array([[hit.similarity for hit in best]]), query.rerank.margin)[0]:
            close = "the first two images are not as close as margin" if len(best) > 1 else "fewer than two images"
            raise Plain(f"there is no order to change: {close}")
        found.claims = stated(query.text, snapshot.vocabulary)
        if not found.claims:
            raise Plain("the description states no attribute that the engine can be asked about")
        found.images = [hit.image_id for hit in best]
        versions = versions_of(snapshot.edition)
        found.add(await self.judge.known.remote(versions, found.images, found.claims))
        found.known = found.answered
        if not (missing := found.missing()):
            return
        pictures = await asyncio.gather(*map(snapshot.file, missing))
        subjects = [Subject(name, picture) for name, picture in zip(missing, pictures, strict=True) if picture]
        left = until - time.monotonic()
        if not subjects or left <= 0:
            return
        judged: Judged = await self.judge.ask.remote(versions, subjects, found.claims, left)
        found.add(judged.verdicts)
        found.problem = judged.problem


def _reason(found: Findings, wanted: Rerank) -> str:
    """Why the order is the plain one, or what is missing; empty if every question has a verdict."""
    missing = found.questions - found.answered
    if not missing:
        return found.problem
    says = f"{missing} of {found.questions} questions have no verdict within {wanted.seconds:g} s"
    return f"{says}: {found.problem}" if found.problem else says


def _in_order(hits: list[Hit], found: Findings, weight: float) -> list[Hit]:
    """The hits with those that were judged in their new order; they stay ahead of the others, and equal ones as they
    were."""
    best = hits[: len(found.images)]
    supported = [support(found.verdicts.get(hit.image_id, {}).values()) for hit in best]
    similarity = np.array([[hit.similarity for hit in best]])
    (new,) = rerank_by_verdicts(similarity, np.array([supported]), weight)
    return [best[place] for place in np.argsort(-new, kind="stable")] + hits[len(best) :]
