"""Images that are added and removed one by one while the service runs: asked about, embedded, searchable; or erased.

What is acknowledged is in the store first, so that nothing is lost with a process:

    arrivals/<image id>.json    acknowledged, not yet searchable: the image and what was said of it
    added/<digest>/             searchable (`ceca.edition`)
    failed/<image id>.json      why an image could not be added
    removed/<name>.json         out of every search (`ceca.erase`); erased everywhere by this deployment

Each step leaves the store so that the next start goes on from it, and may be done twice.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import logging
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from ray import serve
from ray.serve.handle import DeploymentHandle

from ceca import schema
from ceca.config import DialogueConfig, ServeConfig, from_mapping
from ceca.datasets.images import open_image
from ceca.dialogue.conversation import Dialogue, DialogueError, Engine, Subject, converse
from ceca.dialogue.engines import make_engine
from ceca.edition import ADDED, Edition, find_edition, read_added, write_added
from ceca.erase import finish, pending_erasures
from ceca.errors import UserError
from ceca.samples import read_vocabulary, removed_images
from ceca.store import Store
from serve.metrics import Metrics

log = logging.getLogger(__name__)

AT_ONCE = 32  # images that are asked about and written together
POLL_S = 2.0  # between looks for what another ingress replica or another service has left
SMALL = 16  # so many small objects of `added` are joined into one
WHOLE = 1024  # images in an object that is not joined any more


def arrival_id(content: bytes) -> str:
    """The id of an image that is added: of its bytes, so that the same image is added once."""
    return schema.image_id(f"added/{hashlib.sha256(content).hexdigest()}")


def write_arrival(
    store: Store, content: bytes, *, identity: int | None, camera: str | None, name: str, summary: str
) -> str:
    """Acknowledge an image. Returns its id."""
    image_id = arrival_id(content)
    width, height = open_image(content).size
    told = {"identity": identity, "camera": camera, "source_path": name, "summary": summary}
    image = {"image": base64.b64encode(content).decode(), "width": width, "height": height}
    store.remove("failed", f"{image_id}.json")
    store.write_json(
        {"image_id": image_id, "request": uuid.uuid4().hex, **told, **image}, "arrivals", f"{image_id}.json"
    )
    return image_id


def engine_settings(edition: Edition, config: ServeConfig) -> DialogueConfig | None:
    """How an added image is asked about: as those of the dataset were. None where no engine can: they were imported, or
    answered by the simulated annotator, which knows drawn people only."""
    told = edition.told()
    if told is None or "engine" not in told.config or told.config.get("published"):
        return None
    settings = {**told.config, "only_missing": False}
    if config.engine_url:
        settings["openai"] = {**settings["openai"], "base_url": config.engine_url}
    found = from_mapping(DialogueConfig, settings, "dialogues")
    return None if found.engine == "oracle" else found


@serve.deployment
class Intake:
    """One replica, which does what the store says is to be done and then waits for more."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it, and so there is a loop to work in
        self, data: str, config: ServeConfig, settings: DialogueConfig | None, encoder: DeploymentHandle
    ):
        self.store, self.config, self.settings, self.encoder = Store(data), config, settings, encoder
        self.metrics = Metrics()
        self.engine: Engine | None = None  # started at the first image that needs it
        self.problem = ""
        self.more = asyncio.Event()
        self.work = asyncio.create_task(self._work())

    async def wake(self) -> None:
        """There is something to do."""
        self.more.set()

    async def status(self) -> str:
        """What keeps it from its work; empty where nothing does."""
        return self.problem

    async def _work(self) -> None:
        while True:
            self.more.clear()
            try:
                done = await self._turn()
                self.problem = ""
            except Exception as error:  # of the store, the engine, the encoder: all may come back
                log.warning("cannot go on: %s", error)
                self.problem, done = " ".join(str(error).split()), 0
                self.metrics.problems.inc(1, {"where": "intake"})
            if not done:
                try:
                    await asyncio.wait_for(self.more.wait(), POLL_S)
                except TimeoutError:
                    continue

    async def _turn(self) -> int:
        """Do what there is, at most `AT_ONCE` images; returns how many that were."""
        names = await asyncio.to_thread(self.store.names, "arrivals")
        self.metrics.arrivals.set(len(names))
        if names:
            await self._add_waiting(names[:AT_ONCE])
        pending = await asyncio.to_thread(pending_erasures, self.store)
        if pending:
            await asyncio.to_thread(finish, self.store, *pending)
        return len(names[:AT_ONCE])

    async def _add_waiting(self, names: Sequence[str]) -> None:
        """Make these arrivals searchable."""
        edition = await asyncio.to_thread(find_edition, self.store, self.config.model)
        there = await asyncio.to_thread(_added_ids, edition)
        gone = await asyncio.to_thread(removed_images, self.store)
        records: list[dict[str, Any]] = []
        for name in names:
            if name.removesuffix(".json") in there | gone:  # killed between writing it and this
                await asyncio.to_thread(self.store.remove, "arrivals", name)
                continue
            record = await asyncio.to_thread(self.store.read_json, "arrivals", name)
            if record is not None:
                records.append({**record, "image": base64.b64decode(record["image"])})
        await self._add(edition, records)
        await asyncio.to_thread(_join_small, edition)

    async def _add(self, edition: Edition, records: Sequence[dict[str, Any]]) -> None:
        """Ask about images, embed them, and write them where every search finds them."""
        told = await asyncio.gather(*(self._describe(record) for record in records))
        rows = []
        for record, found in zip(records, told, strict=True):
            if isinstance(found, DialogueError):
                await self._fail(record, found)
            else:
                rows.append({**record, **found})
        if rows:
            images, summaries = [row["image"] for row in rows], [row["summary"] for row in rows]
            pair = await self.encoder.images.remote(edition, images, summaries)
            table = added_table(rows, pair)
            await asyncio.to_thread(write_added, self.store, edition.digest, table)
        for record in rows:
            await asyncio.to_thread(self.store.remove, "arrivals", f"{record['image_id']}.json")

    async def _fail(self, record: dict[str, Any], error: DialogueError) -> None:
        image_id = record["image_id"]
        waiting = await asyncio.to_thread(self.store.read_json, "arrivals", f"{image_id}.json")
        if waiting is not None and waiting["request"] != record["request"]:
            return  # sent again meanwhile, perhaps with a summary: that one's turn comes
        problem = {"image_id": image_id, "reason": error.reason, "detail": error.detail}
        await asyncio.to_thread(self.store.write_json, problem, "failed", f"{image_id}.json")
        await asyncio.to_thread(self.store.remove, "arrivals", f"{image_id}.json")
        self.metrics.problems.inc(1, {"where": "dialogue"})

    async def _describe(self, record: dict[str, Any]) -> dict[str, Any] | DialogueError:
        """The dialogue about an image, or what its sender said of it."""
        if record["summary"]:
            given = {"turns": [], "attributes": {}, "flags": ["given"], "dialogue_model": "given"}
            return {**given, "summary": record["summary"]}
        if self.settings is None:
            return DialogueError("no_engine", NO_ENGINE)
        try:
            made = await self._converse(Subject(record["image_id"], record["image"]), self.settings)
        except DialogueError as error:
            return error
        turns = [{"question": turn.question, "answer": turn.answer} for turn in made.turns]
        assert self.engine is not None
        told = {"turns": turns, "attributes": dict(made.attributes), "flags": list(made.flags)}
        return {**told, "summary": made.summary, "dialogue_model": self.engine.model}

    async def _converse(self, subject: Subject, settings: DialogueConfig) -> Dialogue:
        choices = read_vocabulary(self.store) if settings.attributes else None
        if self.engine is None:
            self.engine = make_engine(settings, choices)
            await self.engine.start()
        return await converse(
            self.engine,
            subject,
            questions=settings.questions,
            answer_tokens=settings.answer_tokens,
            summary_tokens=settings.summary_tokens,
            choices=choices,
            attribute_tokens=settings.attribute_tokens,
        )

    async def carry(self, edition: Edition) -> None:
        """Embed with an edition's model what was added under another, before anybody is asked about that edition."""
        there = await asyncio.to_thread(_added_ids, edition) | edition.removed_ids
        for digest in await asyncio.to_thread(self.store.names, ADDED):
            if digest == edition.digest:
                continue
            for name in await asyncio.to_thread(self.store.names, ADDED, digest):
                table = await asyncio.to_thread(read_added, self.store, digest, name)
                rows = [row for row in table.to_pylist() if row["image_id"] not in there]
                for start in range(0, len(rows), AT_ONCE):
                    some = rows[start : start + AT_ONCE]
                    images, summaries = [row["image"] for row in some], [row["summary"] for row in some]
                    pair = await self.encoder.images.remote(edition, images, summaries)
                    gone = await asyncio.to_thread(removed_images, self.store)  # since the images were read
                    kept = [n for n, row in enumerate(some) if row["image_id"] not in gone]
                    some = [{**some[n], "attributes": dict(some[n]["attributes"])} for n in kept]
                    pair = pair[0][kept], pair[1][kept]
                    if some:
                        await asyncio.to_thread(write_added, self.store, edition.digest, added_table(some, pair))
                    there |= {row["image_id"] for row in some}


NO_ENGINE = (
    "no engine can look at a new image here, for the dataset's dialogues were imported or come from the simulated "
    "annotator; say in `summary` what the person looks like"
)


def added_table(rows: Sequence[dict[str, Any]], pair: tuple[np.ndarray, np.ndarray]) -> pa.Table:
    """Rows of schema.added with these embeddings [n, D] and [n, E]."""
    complete = [
        {
            **row,
            "identity": schema.NOBODY if row["identity"] is None else row["identity"],
            "split": ADDED,
            "global": pair[0][n].astype(np.float16),
            "local": pair[1][n].astype(np.float16),
        }
        for n, row in enumerate(rows)
    ]
    return pa.Table.from_pylist(complete, schema.added(pair[0].shape[1], pair[1].shape[1]))


def _added_ids(edition: Edition) -> set[str]:
    return {name for table in edition.read_added(["image_id"]) for name in table["image_id"].to_pylist()}


def _join_small(edition: Edition) -> None:
    """Write many small objects of `added` as one, without what is there twice or was removed."""
    store, digest = edition.store, edition.digest
    names = store.names(ADDED, digest)
    small = [name for name in names if _rows(store, digest, name) < WHOLE] if len(names) > SMALL else []
    if len(small) <= SMALL:
        return
    whole = pa.concat_tables([read_added(store, digest, name) for name in small])
    gone = removed_images(store)
    seen: set[str] = set()
    kept: list[int] = []
    for row, image_id in enumerate(whole["image_id"].to_pylist()):
        if image_id not in gone | seen:
            seen.add(image_id)
            kept.append(row)
    written = write_added(store, digest, whole.take(kept)) if kept else None
    for name in small:
        if name != written:
            store.remove(ADDED, digest, name)


def _rows(store: Store, digest: str, name: str) -> int:
    return read_added(store, digest, name, ["image_id"]).num_rows


def refuse_without_engine(settings: DialogueConfig | None, summary: str) -> None:
    """Say so at once where an image cannot be added.

    Raises:
        UserError: it has no summary, and no engine to write one.
    """
    if settings is None and not summary:
        raise UserError(NO_ENGINE)
