"""Verdicts for searches: those that are known are kept in memory, the others are asked of an engine within seconds.

The same engine reads what searchers say in their own words; that is not kept.

Plain Python; `serve.app` makes it a deployment of one replica, so that what one search asked is known to all.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ceca.config import DialogueConfig, ServeConfig
from ceca.data.store import Store
from ceca.dialogue.attributes import Choices, read_truth, read_vocabulary
from ceca.dialogue.conversation import EngineError, Subject
from ceca.dialogue.verdicts import Claim, Verdict
from ceca.search.catalogue import Recent
from ceca.search.edition import Edition, find_edition
from serve.engine import Knowledge, OnDemand
from serve.metrics import Metrics

log = logging.getLogger(__name__)

KEPT_BYTES = 64 * 1024 * 1024  # verdicts kept in memory: some 160,000 of them
VERDICT_BYTES = 400  # of one of them with its question, as measured
LATE = 1.05  # a search waits this many times the engine's time
LATER_S = 5.0  # what comes later than that, up to this, is kept for the next search
REST_S = 2.0  # pause between two looks whether the engine is idle
RETRIES = 1  # of a request to an endpoint: the search waits, and an endpoint that is away is found out soon

Verdicts = Mapping[str, Mapping[Claim, Verdict]]  # by image id; what nobody has answered is missing
Versions = tuple[str, tuple[str, ...]]  # of the images, and what was removed of them


@dataclasses.dataclass(frozen=True)
class Judged:
    """What the engine said. `problem` says why it said nothing or not all; empty if it was there."""

    verdicts: Verdicts
    problem: str = ""


class Heard(NamedTuple):
    """What the engine understood of a searcher's words; None if it has not read them. `problem` says why, if known."""

    answers: dict[str, str] | None
    problem: str = ""


def versions_of(edition: Edition) -> Versions:
    """What verdicts belong to: in another version an id may name another picture, or an erased one."""
    return edition.images, edition.removed


def reranking_engine(store: Store, settings: DialogueConfig, config: ServeConfig) -> OnDemand:
    """The engine that looks at hits.

    Args:
        store: the dataset.
        settings: settings of the engine, `ServeConfig.reranker`.
        config: settings of the service.
    """

    def prepare() -> Knowledge:
        if settings.engine != "oracle":
            return Knowledge(None)
        images = find_edition(store, config.model).manifest("images")
        return Knowledge(read_vocabulary(store, images), read_truth(store, images))

    endpoint = dataclasses.replace(settings.openai, retries=min(RETRIES, settings.openai.retries))
    return OnDemand(
        dataclasses.replace(settings, openai=endpoint),
        gpus=settings.vllm.gpus * settings.vllm.tensor_parallel if settings.engine == "vllm" else 0,
        idle_s=config.shrink_s,
        does="looks at hits",
        prepare=prepare,
    )


class Judge:
    """Keeps verdicts, and asks the engine for those that are missing.

    Args:
        data: dataset URI.
        config: settings of the service, with an engine.
    """

    async def __init__(self, data: str, config: ServeConfig):  # type: ignore[misc]  # Ray awaits it, as in Intake
        assert config.reranker is not None, "nobody to ask"
        self.config, self.metrics = config, Metrics()
        self.engine = reranking_engine(Store(data), config.reranker, config)
        self.versions: Versions | None = None
        self.kept: Recent[Verdict] = Recent(KEPT_BYTES)
        # Searches that ask about one image do so in turn: the second finds what the first has asked.
        self.turns: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self.asking: set[asyncio.Task[Mapping[Claim, Verdict]]] = set()
        self.wanted = float("-inf")  # when the engine was last asked for
        self.resting = asyncio.create_task(self._rest())

    async def problem(self) -> str:
        """Why the engine is not there; empty if it is, or if nobody wants it."""
        return self.engine.problem

    async def known(self, versions: Versions, ids: Sequence[str], claims: Sequence[Claim]) -> Verdicts:
        """The verdicts about images that are kept in memory."""
        verdicts = _read(self._kept(versions), ids, claims)
        self._count(sum(map(len, verdicts.values())), "memory")
        return verdicts

    async def ask(
        self, versions: Versions, subjects: Sequence[Subject], claims: Sequence[Claim], seconds: float
    ) -> Judged:
        """Ask the engine about images.

        Args:
            versions: what the verdicts belong to.
            subjects: the images.
            claims: what is asked about each.
            seconds: time limit of the engine; this takes little longer.

        Returns:
            What is known then; nothing if the engine is not there, which starts it.
        """
        self.wanted = time.monotonic()
        if not self.engine.ready():
            return Judged({}, self.engine.problem)
        kept, deadline = self._kept(versions), asyncio.get_running_loop().time() + seconds
        asked = {
            asyncio.create_task(self._ask_about(kept, subject, claims, deadline)): subject.image_id
            for subject in subjects
        }
        for task in asked:
            self.asking.add(task)
            task.add_done_callback(self._forget)
        done, _ = await asyncio.wait(asked, timeout=LATE * seconds)
        verdicts, problem = {}, ""
        for task in done:
            try:
                verdicts[asked[task]] = task.result()
            except EngineError as error:
                problem = str(error)
        if problem:
            self.metrics.problems.inc(1, {"where": "verdicts"})
        return Judged(verdicts, problem)

    async def understand(self, subject: Subject, words: str, choices: Choices, question: str, seconds: float) -> Heard:
        """Have the engine read a searcher's words; arguments as of `serve.engine.Engine.understand`.

        If the engine is not there, this starts it.
        """
        self.wanted = time.monotonic()
        if not self.engine.ready():
            return Heard(None, self.engine.problem)
        try:
            async with asyncio.timeout(seconds + LATER_S):  # its process may not even say that it is late
                return Heard(await self.engine.call("understand", subject, words, choices, question, seconds))
        except TimeoutError:
            return Heard(None)
        except EngineError as error:
            self.metrics.problems.inc(1, {"where": "words"})
            return Heard(None, str(error))

    async def _ask_about(
        self, kept: Recent[Verdict], subject: Subject, claims: Sequence[Claim], deadline: float
    ) -> Mapping[Claim, Verdict]:
        """Ask what is not yet known of an image, and keep it. Returns the verdicts that there are in time.

        Raises:
            EngineError: the engine failed.
        """
        try:
            async with asyncio.timeout_at(deadline + LATER_S), self.turns.setdefault(subject.image_id, asyncio.Lock()):
                known = _read(kept, [subject.image_id], claims)[subject.image_id]
                missing = [claim for claim in claims if claim not in known]
                left = deadline - asyncio.get_running_loop().time()
                if not missing or left <= 0:
                    return known
                verdicts = await self.engine.call("judge", subject, missing, left)
        except TimeoutError:  # its process does not even say that it is late
            return {}
        self._count(len(verdicts), "engine")
        said = dict(zip(missing, verdicts, strict=False))  # those in time
        for claim, verdict in said.items():
            kept.keep((subject.image_id, claim), verdict, VERDICT_BYTES)
        return {**known, **said}

    def _forget(self, task: asyncio.Task[Any]) -> None:
        self.asking.discard(task)
        if not task.cancelled():
            task.exception()  # of a task that nobody waits for any more; asyncio would warn

    def _count(self, verdicts: int, source: str) -> None:
        if verdicts:  # Ray's counter refuses 0
            self.metrics.verdicts.inc(verdicts, {"source": source})

    def _kept(self, versions: Versions) -> Recent[Verdict]:
        """The verdicts of these versions. Those of others are dropped, among them those about erased images."""
        if versions != self.versions:
            self.versions, self.kept = versions, Recent(KEPT_BYTES)
        return self.kept

    async def _rest(self) -> None:
        while True:
            await asyncio.sleep(REST_S)
            self.engine.rest(wanted=time.monotonic() < self.wanted + self.config.shrink_s)


def _read(kept: Recent[Verdict], ids: Sequence[str], claims: Sequence[Claim]) -> Verdicts:
    """The verdicts about images that are kept."""
    found = {image_id: {claim: kept.get((image_id, claim)) for claim in claims} for image_id in ids}
    return {key: {claim: said for claim, said in of.items() if said is not None} for key, of in found.items()}
