"""The deployment behind HTTP: keeps to the newest edition, asks the others, and puts their answers together."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import re
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import pyarrow as pa
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from ceca.config import ServeConfig
from ceca.data.changes import (
    arrival_id,
    hide,
    pending_erasures,
    removal,
    removed_images,
    waiting_images,
    write_arrival,
)
from ceca.data.names import FAILED, REMOVED
from ceca.data.store import Store, StoreError, version_of
from ceca.datasets.images import open_image
from ceca.dialogue.attributes import attributes_of, read_vocabulary
from ceca.errors import UserError
from ceca.search.catalogue import Catalogue, Picture
from ceca.search.edition import Edition, find_edition
from ceca.search.questions import beliefs, next_question, wording
from ceca.search.ranking import Candidates, Hit, rank
from serve.access import AUDIT, Gate, Key
from serve.api import Explained, Found, make_api
from serve.batches import Batches
from serve.intake import engine_settings, refuse_without_engine
from serve.metrics import Metrics
from serve.refusals import NotFound, Overloaded, WrongAnswer
from serve.schema import Job, Like, Proposed, Sentence, Status, Word

log = logging.getLogger(__name__)

ATTEMPTS = 4  # at a replica that dies while it is asked
POOL = 1000  # best images that a conversation is about
WORDS = 60  # of a query whose share in a similarity is computed
GATHER_S = 0.001  # that a question waits for others that go to the same replica
STARTING_S = 0.3  # between looks whether the others are there
PREPARE_S = 600.0  # that replicas get to load the next edition
READ_AGAIN = 3  # where objects of `added` were joined between listing and reading them

Where = tuple[tuple[str, tuple[str, ...]], ...]  # facets and values, so that a mask can be kept for it
Pair = tuple[np.ndarray, np.ndarray]
P = ParamSpec("P")
R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class Question:
    """What a share of the gallery is asked: normalised [D] and [E], ω, how many images, of which, with their rows?"""

    edition: Edition
    global_embedding: np.ndarray
    local_embedding: np.ndarray
    omega: float
    top_k: int
    where: Where = ()
    with_rows: bool = False
    shares: int = 1  # that the gallery is cut into, which is another number while a service is deployed anew


def _in_time(
    method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]:
    """A method of `Ingress` that raises Overloaded where it takes longer than `timeout_s`, all waits counted, or where
    what it needs is not there for a moment."""

    @functools.wraps(method)
    async def within(self: Any, *arguments: P.args, **named: P.kwargs) -> R:
        try:
            async with asyncio.timeout(self.config.timeout_s):
                return await method(self, *arguments, **named)
        except (TimeoutError, RayActorError, BackPressureError, DeploymentUnavailableError, FileNotFoundError) as error:
            log.warning("%s: %s: %s", method.__name__, type(error).__name__, error)
            raise Overloaded(self.late) from None

    return within


class Now:
    """An edition and what the ingress knows of it; a request keeps the one it began with."""

    def __init__(self, edition: Edition):
        self.edition, self.catalogue = edition, Catalogue(edition)
        self.facets = self.catalogue.facets  # read now, not at the first question
        self.structured = [name for name in self.facets.columns if name not in ("identity", "split", "camera")]
        self.vocabulary = read_vocabulary(edition.store)
        self.read = functools.lru_cache(100_000)(self._read)

    def possible(self, facet: str) -> Sequence[str]:
        """The values that it can have."""
        return self.facets.values(facet) if facet in self.structured else self.vocabulary.get(facet, ())

    def _read(self, image_id: str) -> dict[str, str]:
        told = self.catalogue.told(image_id)
        return attributes_of(told.turns, self.vocabulary) if told else {}

    def attributes(self, ids: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
        """Of these images: codes of each facet [K], -1 where an image has none, and the values that they stand for.

        From the structured answers where the dialogues have them, else from the words of the five answers.
        """
        if not self.structured:
            found = [self.read(image_id) for image_id in ids]
            return _encode({name: [own.get(name) for own in found] for name in sorted({n for f in found for n in f})})
        rows = pa.array([self.catalogue.known.row(image_id) for image_id in ids], pa.int64())
        return _encode({name: self.facets.columns[name].take(rows).to_pylist() for name in self.structured})


def _encode(columns: Mapping[str, list[str | None]]) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    values = {name: sorted({value for value in column if value is not None}) for name, column in columns.items()}
    numbers = {name: {value: number for number, value in enumerate(found)} for name, found in values.items()}
    codes = {
        name: np.array([-1 if value is None else numbers[name][value] for value in column])
        for name, column in columns.items()
    }
    return codes, values


class Ingress:
    """HTTP in front of the others; reads pictures in threads."""

    def __init__(
        self,
        data: str,
        config: ServeConfig,
        keys: tuple[Key, ...],
        encoder: DeploymentHandle,
        shards: Sequence[DeploymentHandle],
        intake: DeploymentHandle,
    ):
        self.store, self.config, self.keys = Store(data), config, keys
        self.encoder, self.shards, self.intake = encoder, list(shards), intake
        # A call to a replica costs milliseconds, whatever it carries: what is asked at the same time goes in one.
        self.encoding = self._calls(encoder, "encode")
        self.searching = [self._calls(shard, "search") for shard in self.shards]
        self.late = f"no answer within {config.timeout_s:g} s"
        self.metrics = Metrics()
        self.now = _read_now(self.store, config.model)
        self.metrics.images.set(len(self.now.catalogue))
        self.ready, self.problem = False, ""
        self.following = asyncio.Lock()

    def __serve_build_asgi_app__(self) -> Any:
        # Into the replica's log, which Ray keeps; where there are no keys, nobody is told from another.
        AUDIT.handlers = [logging.StreamHandler() if self.keys else logging.NullHandler()]
        AUDIT.setLevel(logging.INFO)
        AUDIT.propagate = False
        most = self.config.ingress_replicas_max or self.config.ingress_replicas
        return make_api(self, self.config, Gate(self.keys, most))

    # --- editions -----------------------------------------------------------------------------------------

    async def keep_following(self) -> None:
        """For as long as the replica lives: look for another edition, and for the others to be ready."""
        while True:
            try:
                if not self.ready:
                    await self._prepare(self.now.edition)
                    self.ready = True
                await self.follow()
                self.metrics.images.set(len(self.now.catalogue))  # again, or Ray's exporter forgets it
                self.problem = ""
            except DeploymentUnavailableError:
                self.problem = "the replicas start"
            except Exception as error:  # a store that is away, a gallery whose model is gone: this edition stays
                with contextlib.suppress(Exception):  # what is removed goes all the same
                    await self._leave_out()
                self.problem = " ".join(str(error).split())
                log.warning("stays with gallery %s: %s", self.now.edition.gallery_name, self.problem)
                self.metrics.problems.inc(1, {"where": "following"})
            await asyncio.sleep(self.config.follow_s if self.ready else STARTING_S)

    async def follow(self) -> None:
        """Go on with the newest edition, if all replicas can.

        Raises:
            StoreError: there is one and it cannot be read; this one stays.
        """
        async with self.following:
            edition = await asyncio.to_thread(find_edition, self.store, self.config.model)
            if edition == self.now.edition:
                return
            if edition.digest != self.now.edition.digest:
                await self.encoder.prepare.remote(edition)
                await self.intake.carry.remote(edition)
            for left in reversed(range(READ_AGAIN)):
                try:
                    now = await asyncio.to_thread(_read_now, self.store, self.config.model)
                    await self._prepare(now.edition)
                    if set(self.now.edition.removed) <= set(now.edition.removed):
                        break  # else something was removed meanwhile, which must not come back
                except FileNotFoundError:  # an object was written anew while a replica opened it
                    if not left:
                        raise
            else:
                return  # the next look goes on
            self.now = now
            self.metrics.images.set(len(now.catalogue))

    async def _leave_out(self) -> None:
        """Go on with this edition without what has been removed since, whether or not a newer gallery can be served."""
        while True:
            before = self.now
            removed = tuple(await asyncio.to_thread(self.store.names, REMOVED))
            if set(removed) <= set(before.edition.removed):
                return
            try:
                now = await asyncio.to_thread(Now, dataclasses.replace(before.edition, removed=removed))
                await self._prepare(now.edition)
            except FileNotFoundError:  # an object that was added has been written anew: that is another edition
                await self.follow()
                continue
            if self.now is before:  # else another one is served meanwhile, perhaps with the same image
                self.now = now
                self.metrics.images.set(len(now.catalogue))

    async def _prepare(self, edition: Edition) -> None:
        """Have every replica load an edition. One that starts meanwhile loads it when it is first asked."""
        for handle, about in (
            (self.encoder, (edition,)),
            *((shard, (edition, len(self.shards))) for shard in self.shards),
        ):
            answers = await handle.broadcast("prepare", *about).results_async(
                timeout_s=PREPARE_S, return_exceptions=True
            )
            problems = [answer for answer in answers if isinstance(answer, Exception)]
            lost = [problem for problem in problems if isinstance(problem, RayActorError)]
            if len(problems) > len(lost):
                raise next(problem for problem in problems if not isinstance(problem, RayActorError))

    # --- asking the others --------------------------------------------------------------------------------

    async def _ask(self, handle: DeploymentHandle, method: str, *arguments: Any) -> Any:
        """A method of any replica; of another one where that dies.

        Raises:
            Overloaded: too many wait, or nobody answers in time.
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
                log.warning("asking again: %s", error)
                await asyncio.sleep(0.1 * 2**attempt)
        raise Overloaded("no replica answers")

    def _calls(self, handle: DeploymentHandle, method: str) -> Batches[Any, Any]:
        async def call(asked: list[Any]) -> Any:
            return await self._ask(handle, method, asked)

        return Batches(call, self.config.batch, GATHER_S, at_once=self.config.queue)

    async def _candidates(self, now: Now, pair: Pair, omega: float, top_k: int, where: Mapping[str, Any]) -> list[Hit]:
        """The best images of all shards."""
        rerank = self.config.rerank
        conditions = tuple((name, tuple(values)) for name, values in sorted(where.items()))
        asked = Question(now.edition, *pair, omega, max(top_k, rerank), conditions, rerank > 0, len(self.shards))
        with self.metrics.stage("gallery"):
            shares: list[Candidates] = await asyncio.gather(*(searching.ask(asked) for searching in self.searching))
        return rank(shares, top_k=top_k, omega=omega, rerank_first=rerank, global_dim=now.edition.global_dim)

    # --- what the interface needs -------------------------------------------------------------------------

    @_in_time
    async def search(
        self,
        query: str | bytes,
        *,
        omega: float,
        top_k: int,
        where: Mapping[str, list[str]],
        answers: Mapping[str, str | None],
        suggest: bool,
    ) -> Found:
        """Search by words, an image or one of the gallery; raises FacetError, WrongAnswer, ImageError,
        NotFound, Overloaded."""
        asked = query, omega, top_k, where, answers, suggest
        try:
            return await self._search(self.now, *asked)
        except FileNotFoundError:  # a new replica was asked for an edition whose objects were written anew
            await self.follow()
            return await self._search(self.now, *asked)

    async def _search(
        self,
        now: Now,
        query: str | bytes,
        omega: float,
        top_k: int,
        where: Mapping[str, list[str]],
        answers: Mapping[str, str | None],
        suggest: bool,
    ) -> Found:
        now.facets.check(where)  # here, so that what does not exist is refused alone and not with its batch
        with self.metrics.stage("encode"):
            if isinstance(query, Like):
                row = await self._row(now, query)
                if row is None:
                    raise NotFound(f"no image {query} in this gallery")
                pair = row
            elif isinstance(query, bytes):
                whole, local = await self._ask(self.encoder, "images", now.edition, [query], None)
                pair = whole[0], local[0]
            else:
                pair = await self.encoding.ask((now.edition, query))
        talking = suggest or bool(answers)
        if not talking:
            return Found(now, await self._candidates(now, pair, omega, top_k, where))
        hits = await self._candidates(now, pair, omega, max(top_k, POOL), where)
        fitting = {
            name: [value]
            for name, value in answers.items()
            if value is not None and name in now.structured and name not in where
        }
        if fitting:  # few words may have left the person out of the best, and no answer would bring them back
            fitting = {name: [value] for name, [value] in fitting.items() if value in now.possible(name)}
            agreeing = await self._candidates(now, pair, omega, POOL, {**where, **fitting})
            hits = list({hit.image_id: hit for hit in (*hits, *agreeing)}.values())
        if not hits:  # nobody fulfils the conditions, so there is nobody to be told from others
            return Found(now, [], [])
        with self.metrics.stage("conversation"):
            return await asyncio.to_thread(_converse, now, hits, top_k, answers)

    @_in_time
    async def explain(self, query: str, image_id: str, omega: float) -> Explained | None:
        """Why an image was found: similarity by part, what each word adds, which sentences are closest; None where
        there is no such image."""
        now = self.now
        image = await self._row(now, image_id)
        if image is None:
            return None
        told = now.catalogue.told(image_id)
        sentences = _sentences(told.turns, told.summary) if told else []
        words = query.split()[:WORDS]
        without = [" ".join(words[:n] + words[n + 1 :]) for n in range(len(words))]
        texts = [query, *without, *(text for _, text in sentences)]
        whole, local = await self._ask(self.encoder, "texts", now.edition, texts)

        def fused(pairs: Pair, other: Pair) -> np.ndarray:
            return (1 - omega) * pairs[0] @ other[0] + omega * pairs[1] @ other[1]

        against_image = fused((whole, local), image)
        against_query = fused((whole, local), (whole[0], local[0]))[1 + len(words) :]
        ordered = sorted(zip(sentences, against_query.tolist(), strict=True), key=lambda found: -found[1])
        return Explained(
            now,
            similarity=float(against_image[0]),
            global_similarity=float(whole[0] @ image[0]),
            local_similarity=float(local[0] @ image[1]),
            words=[
                Word(word=word, contribution=float(against_image[0] - against_image[1 + n]))
                for n, word in enumerate(words)
            ],
            sentences=[Sentence(source=source, text=text, similarity=value) for (source, text), value in ordered],
        )

    async def _row(self, now: Now, image_id: str) -> Pair | None:
        """An image's embeddings."""
        if image_id not in now.catalogue:
            return None
        rows = await asyncio.gather(
            *(self._ask(shard, "row", (now.edition, len(self.shards)), str(image_id)) for shard in self.shards)
        )
        row = next((row for row in rows if row is not None), None)
        if row is None:  # a replica opened this edition after the image was erased
            return None
        return row[: now.edition.global_dim], row[now.edition.global_dim :]

    @_in_time
    async def picture(self, image_id: str) -> Picture | None:
        """An image of the gallery as it came; None where there is none."""
        for again in (True, False):
            catalogue = self.now.catalogue
            try:
                return catalogue.cached(image_id) or await asyncio.to_thread(catalogue.picture, image_id)
            except StoreError:
                if not again:
                    raise
                await self.follow()  # its part may have been written anew when another image was erased
        return None

    # --- adding and removing ------------------------------------------------------------------------------

    @_in_time
    async def add(self, content: bytes, *, identity: int | None, camera: str | None, name: str, summary: str) -> Job:
        """Acknowledge an image; raises UserError where it cannot be added."""
        settings = await asyncio.to_thread(engine_settings, self.now.edition, self.config)
        refuse_without_engine(settings, summary)
        if arrival_id(content) in await asyncio.to_thread(removed_images, self.store):
            raise UserError("this image was deleted from the gallery, and does not come back")
        said = {"identity": identity, "camera": camera, "source_path": name, "summary": summary}
        image_id = await asyncio.to_thread(lambda: write_arrival(self.store, content, open_image(content).size, said))
        await self._wake()
        return Job(job=f"add-{image_id}", status="waiting", image_id=image_id)

    @_in_time
    async def remove(self, image_id: str) -> Job | None:
        """Take an image out of every search, and have it erased; None where there is none."""
        name = version_of([image_id])  # as `hide` calls it
        if image_id in self.now.catalogue:
            await asyncio.to_thread(hide, self.store, [image_id], True)
            await self._leave_out()
        elif await asyncio.to_thread(removal, self.store, name) is None:
            return None  # else the answer to the first request was lost
        await self._wake()
        return Job(job=f"delete-{name}", status="waiting", image_id=image_id)

    async def _wake(self) -> None:
        try:
            await self._ask(self.intake, "wake")
        except Overloaded:  # it looks by itself as well
            log.warning("the intake does not answer")

    @_in_time
    async def job(self, job: str) -> Job | None:
        """How far a job is; None where there is no such job."""
        kind, _, name = job.partition("-")
        if kind == "delete":
            if await asyncio.to_thread(removal, self.store, name) is None:
                return None
            pending = name in await asyncio.to_thread(pending_erasures, self.store)
            return Job(job=job, status="waiting" if pending else "done", detail=await self._why(pending))
        for again in (True, False):
            if name in self.now.catalogue:
                return Job(job=job, status="done", image_id=name)
            failed = await asyncio.to_thread(self.store.read_json, FAILED, f"{name}.json")
            if failed is not None:
                return Job(job=job, status="failed", image_id=name, detail=failed["detail"])
            if name in await asyncio.to_thread(waiting_images, self.store):
                return Job(job=job, status="waiting", image_id=name, detail=await self._why(True))
            if again:
                await self.follow()
        return None

    @_in_time
    async def status(self) -> Status:
        """What is served and what is not, for those who run it."""
        edition = self.now.edition
        arrivals = await asyncio.to_thread(waiting_images, self.store)
        erasures = await asyncio.to_thread(pending_erasures, self.store)
        return Status(
            model=edition.model_name,
            gallery=edition.gallery_name,
            images=len(self.now.catalogue),
            following=self.problem,
            intake=await self._why(True),
            arrivals=len(arrivals),
            erasures=len(erasures),
        )

    async def _why(self, waiting: bool) -> str:
        return await self._ask(self.intake, "status") if waiting else ""


def _read_now(store: Store, model: str) -> Now:
    for _ in range(READ_AGAIN):
        try:
            return Now(find_edition(store, model))
        except FileNotFoundError:
            continue
    return Now(find_edition(store, model))


def _converse(now: Now, hits: list[Hit], top_k: int, answers: Mapping[str, str | None]) -> Found:
    """Put candidates in the order of what the answers make of them, and find the question to ask next."""
    codes, values = now.attributes([hit.image_id for hit in hits])
    given: dict[str, int | None] = {}
    for facet, value in answers.items():
        if facet not in values:
            raise WrongAnswer(f"nothing is known of {facet!r}; the candidates differ in {', '.join(sorted(values))}")
        if value is not None and value not in now.possible(facet):
            raise WrongAnswer(f"{facet} cannot be {value!r}; it can be {', '.join(now.possible(facet))}")
        # What no candidate has tells none from another.
        given[facet] = values[facet].index(value) if value in values[facet] else None
    counts = {name: len(found) for name, found in values.items()}
    believed = beliefs(np.array([hit.similarity for hit in hits]), codes, counts, given)
    order = np.lexsort((np.arange(len(hits)), -believed))[:top_k]
    asked = next_question(believed, codes, counts, set(answers))
    question = None
    if asked is not None:
        shares = sorted(zip(values[asked.facet], asked.shares.tolist(), strict=True), key=lambda pair: -pair[1])
        question = Proposed(facet=asked.facet, text=wording(asked.facet), values=dict(shares))
    return Found(now, [hits[place] for place in order], [float(believed[place]) for place in order], question)


def _sentences(turns: Sequence[tuple[str, str]], summary: str) -> list[tuple[str, str]]:
    """What was said of an image, by where: the sentences of its summary, and each answer under its question."""
    told = [("summary", text) for text in re.split(r"(?<=[.!?])\s+", summary) if text.strip()]
    return told + [(question, answer) for question, answer in turns if answer.strip()]
