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
from serve.query import Like, Query, ShardQuery, freeze
from serve.refusals import NotFound, Overloaded, WrongAnswer
from serve.schema import Job, Proposed, Sentence, Status, Word

log = logging.getLogger(__name__)

ATTEMPTS = 4  # at a replica that dies while it is asked
POOL = 1000  # best images that a conversation is about
WORDS = 60  # of a query whose share in a similarity is computed
GATHER_S = 0.001  # that a question waits for others that go to the same replica
STARTING_S = 0.3  # between looks whether the others are there
PREPARE_S = 600.0  # that replicas get to load the next edition
READ_AGAIN = 3  # where objects of `added` were joined between listing and reading them

Pair = tuple[np.ndarray, np.ndarray]
P = ParamSpec("P")
R = TypeVar("R")


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


class Snapshot:
    """An edition and what the ingress knows of it; a request keeps the one it began with."""

    def __init__(self, edition: Edition):
        self.edition, self.catalogue = edition, Catalogue(edition)
        self.facets = self.catalogue.facets  # read now, not at the first search
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
        self.snapshot = read_snapshot(self.store, config.model)
        self.metrics.images.set(len(self.snapshot.catalogue))
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
                    await self._prepare(self.snapshot.edition)
                    self.ready = True
                await self.follow()
                self.metrics.images.set(len(self.snapshot.catalogue))  # again, or Ray's exporter forgets it
                self.problem = ""
            except DeploymentUnavailableError:
                self.problem = "the replicas start"
            except Exception as error:  # a store that is away, a gallery whose model is gone: this edition stays
                with contextlib.suppress(Exception):  # what is removed goes all the same
                    await self._leave_out()
                self.problem = " ".join(str(error).split())
                log.warning("stays with gallery %s: %s", self.snapshot.edition.gallery_name, self.problem)
                self.metrics.problems.inc(1, {"where": "following"})
            await asyncio.sleep(self.config.follow_s if self.ready else STARTING_S)

    async def follow(self) -> None:
        """Go on with the newest edition, if all replicas can.

        Raises:
            StoreError: there is one and it cannot be read; this one stays.
        """
        async with self.following:
            edition = await asyncio.to_thread(find_edition, self.store, self.config.model)
            if edition == self.snapshot.edition:
                return
            if edition.digest != self.snapshot.edition.digest:
                await self.encoder.prepare.remote(edition)
                await self.intake.carry.remote(edition)
            for left in reversed(range(READ_AGAIN)):
                try:
                    snapshot = await asyncio.to_thread(read_snapshot, self.store, self.config.model)
                    await self._prepare(snapshot.edition)
                    if set(self.snapshot.edition.removed) <= set(snapshot.edition.removed):
                        break  # else something was removed meanwhile, which must not come back
                except FileNotFoundError:  # an object was written anew while a replica opened it
                    if not left:
                        raise
            else:
                return  # the next look goes on
            self.snapshot = snapshot
            self.metrics.images.set(len(snapshot.catalogue))

    async def _leave_out(self) -> None:
        """Go on with this edition without what has been removed since, whether or not a newer gallery can be served."""
        while True:
            before = self.snapshot
            removed = tuple(await asyncio.to_thread(self.store.names, REMOVED))
            if set(removed) <= set(before.edition.removed):
                return
            try:
                snapshot = await asyncio.to_thread(Snapshot, dataclasses.replace(before.edition, removed=removed))
                await self._prepare(snapshot.edition)
            except FileNotFoundError:  # an object that was added has been written anew: that is another edition
                await self.follow()
                continue
            if self.snapshot is before:  # else another one is served meanwhile, perhaps with the same image
                self.snapshot = snapshot
                self.metrics.images.set(len(snapshot.catalogue))

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

    async def _candidates(self, snapshot: Snapshot, pair: Pair, query: Query) -> list[Hit]:
        """The best images of all shards."""
        rerank = self.config.rerank
        shard_query = ShardQuery(
            snapshot.edition,
            *pair,
            omega=query.omega,
            top_k=max(query.top_k, rerank),
            where=freeze(query.where),
            with_rows=rerank > 0,
            shards=len(self.shards),
        )
        with self.metrics.stage("gallery"):
            candidates: list[Candidates] = await asyncio.gather(*(each.ask(shard_query) for each in self.searching))
        return rank(
            candidates,
            top_k=query.top_k,
            omega=query.omega,
            rerank_first=rerank,
            global_dim=snapshot.edition.global_dim,
        )

    # --- what the interface needs -------------------------------------------------------------------------

    @_in_time
    async def search(self, query: Query) -> Found:
        """Search by words, an image or one of the gallery; raises FacetError, WrongAnswer, ImageError,
        NotFound, Overloaded."""
        try:
            return await self._search(self.snapshot, query)
        except FileNotFoundError:  # a new replica was asked for an edition whose objects were written anew
            await self.follow()
            return await self._search(self.snapshot, query)

    async def _search(self, snapshot: Snapshot, query: Query) -> Found:
        snapshot.facets.check(query.where)  # here, so that what does not exist is refused alone and not with its batch
        with self.metrics.stage("encode"):
            pair = await self._encode(snapshot, query)
        if not query.in_conversation:
            return Found(snapshot, await self._candidates(snapshot, pair, query))
        hits = await self._candidates(snapshot, pair, dataclasses.replace(query, top_k=max(query.top_k, POOL)))
        fitting = {
            name: [value]
            for name, value in query.answers.items()
            if value is not None and name in snapshot.structured and name not in query.where
        }
        if fitting:  # few words may have left the person out of the best, and no answer would bring them back
            known = {name: values for name, values in fitting.items() if values[0] in snapshot.possible(name)}
            narrowed = dataclasses.replace(query, top_k=POOL, where={**query.where, **known})
            agreeing = await self._candidates(snapshot, pair, narrowed)
            hits = list({hit.image_id: hit for hit in (*hits, *agreeing)}.values())
        if not hits:  # nobody fulfils the conditions, so there is nobody to be told from others
            return Found(snapshot, [], [])
        with self.metrics.stage("conversation"):
            return await asyncio.to_thread(_converse, snapshot, hits, query.top_k, query.answers)

    async def _encode(self, snapshot: Snapshot, query: Query) -> Pair:
        if isinstance(query.sample, Like):
            row = await self._row(snapshot, query.sample.image_id)
            if row is None:
                raise NotFound(f"no image {query.sample.image_id} in this gallery")
            return row
        if isinstance(query.sample, bytes):
            whole, local = await self._ask(self.encoder, "images", snapshot.edition, [query.sample], None)
            return whole[0], local[0]
        return await self.encoding.ask((snapshot.edition, query.sample))

    @_in_time
    async def explain(self, query: str, image_id: str, omega: float) -> Explained | None:
        """Why an image was found: similarity by part, what each word adds, which sentences are closest; None where
        there is no such image."""
        snapshot = self.snapshot
        image = await self._row(snapshot, image_id)
        if image is None:
            return None
        told = snapshot.catalogue.told(image_id)
        sentences = _sentences(told.turns, told.summary) if told else []
        words = query.split()[:WORDS]
        without = [" ".join(words[:n] + words[n + 1 :]) for n in range(len(words))]
        texts = [query, *without, *(text for _, text in sentences)]
        whole, local = await self._ask(self.encoder, "texts", snapshot.edition, texts)

        def fused(pairs: Pair, other: Pair) -> np.ndarray:
            return (1 - omega) * pairs[0] @ other[0] + omega * pairs[1] @ other[1]

        against_image = fused((whole, local), image)
        against_query = fused((whole, local), (whole[0], local[0]))[1 + len(words) :]
        ordered = sorted(zip(sentences, against_query.tolist(), strict=True), key=lambda found: -found[1])
        return Explained(
            snapshot,
            similarity=float(against_image[0]),
            global_similarity=float(whole[0] @ image[0]),
            local_similarity=float(local[0] @ image[1]),
            words=[
                Word(word=word, contribution=float(against_image[0] - against_image[1 + n]))
                for n, word in enumerate(words)
            ],
            sentences=[Sentence(source=source, text=text, similarity=value) for (source, text), value in ordered],
        )

    async def _row(self, snapshot: Snapshot, image_id: str) -> Pair | None:
        """An image's embeddings."""
        if image_id not in snapshot.catalogue:
            return None
        rows = await asyncio.gather(
            *(self._ask(shard, "row", (snapshot.edition, len(self.shards)), str(image_id)) for shard in self.shards)
        )
        row = next((row for row in rows if row is not None), None)
        if row is None:  # a replica opened this edition after the image was erased
            return None
        return row[: snapshot.edition.global_dim], row[snapshot.edition.global_dim :]

    @_in_time
    async def picture(self, image_id: str) -> Picture | None:
        """An image of the gallery as it came; None where there is none."""
        for again in (True, False):
            catalogue = self.snapshot.catalogue
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
        settings = await asyncio.to_thread(engine_settings, self.snapshot.edition, self.config)
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
        if image_id in self.snapshot.catalogue:
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
            if name in self.snapshot.catalogue:
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
        edition = self.snapshot.edition
        arrivals = await asyncio.to_thread(waiting_images, self.store)
        erasures = await asyncio.to_thread(pending_erasures, self.store)
        return Status(
            model=edition.model_name,
            gallery=edition.gallery_name,
            images=len(self.snapshot.catalogue),
            following=self.problem,
            intake=await self._why(True),
            arrivals=len(arrivals),
            erasures=len(erasures),
        )

    async def _why(self, waiting: bool) -> str:
        return await self._ask(self.intake, "status") if waiting else ""


def read_snapshot(store: Store, model: str) -> Snapshot:
    for _ in range(READ_AGAIN):
        try:
            return Snapshot(find_edition(store, model))
        except FileNotFoundError:
            continue
    return Snapshot(find_edition(store, model))


def _converse(snapshot: Snapshot, hits: list[Hit], top_k: int, answers: Mapping[str, str | None]) -> Found:
    """Put candidates in the order of what the answers make of them, and find the question to ask next."""
    codes, values = snapshot.attributes([hit.image_id for hit in hits])
    given: dict[str, int | None] = {}
    for facet, value in answers.items():
        if facet not in values:
            raise WrongAnswer(f"nothing is known of {facet!r}; the candidates differ in {', '.join(sorted(values))}")
        if value is not None and value not in snapshot.possible(facet):
            raise WrongAnswer(f"{facet} cannot be {value!r}; it can be {', '.join(snapshot.possible(facet))}")
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
    return Found(snapshot, [hits[place] for place in order], [float(believed[place]) for place in order], question)


def _sentences(turns: Sequence[tuple[str, str]], summary: str) -> list[tuple[str, str]]:
    """What was said of an image, by where: the sentences of its summary, and each answer under its question."""
    told = [("summary", text) for text in re.split(r"(?<=[.!?])\s+", summary) if text.strip()]
    return told + [(question, answer) for question, answer in turns if answer.strip()]
