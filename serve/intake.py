"""Images that are added and removed one by one while the service runs: asked about, embedded, searchable; or erased.

What is acknowledged is in the store first, so that nothing is lost with a process:

    arrivals/<image id>-<request>.json    acknowledged, not yet searchable: the image and what was said of it
    added/<digest>/                       searchable (`ceca.search.edition`)
    failed/<image id>.json                why an image could not be added
    removed/<name>.json                   out of every search (`ceca.data.erase`); erased everywhere by this deployment

Each step leaves the store so that the next start goes on from it, and may be done twice.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import logging
import os
import socket
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ray.serve.handle import DeploymentHandle

from ceca.config import DialogueConfig, ServeConfig
from ceca.data import schema
from ceca.data.changes import ADDED, pending_erasures, read_added, removed_images, waiting_image, write_added
from ceca.data.erase import Busy, erase, finish, undisturbed
from ceca.data.lease import Holders, LeaseError
from ceca.data.names import ARRIVALS, FAILED
from ceca.data.store import Store
from ceca.dialogue.conversation import DialogueError, Subject
from ceca.errors import UserError
from ceca.search.edition import Edition, find_edition
from ceca.settings import from_mapping
from serve.describer import Questioner
from serve.metrics import Metrics

log = logging.getLogger(__name__)

AT_ONCE = 32  # images that are asked about and written together
POLL_S = 2.0  # between looks for what another ingress replica or another service has left
SMALL = 16  # so many small objects of `added` are joined into one
WHOLE = 1024  # images in an object that is not joined any more


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


class Intake:
    """One replica, which does what the store says is to be done and then waits for more."""

    async def __init__(  # type: ignore[misc]  # Ray awaits it, and so there is a loop to work in
        self, data: str, config: ServeConfig, settings: DialogueConfig | None, encoder: DeploymentHandle
    ):
        self.store, self.config, self.encoder = Store(data), config, encoder
        self.metrics = Metrics()
        self.more = asyncio.Event()
        self.questioner = Questioner(self.store, settings, config, self.more.set) if settings else None
        self.unasked: set[str] = set()  # arrivals that wait for its engine, and let others pass
        self.problem = self.postponed = ""
        self.holders = Holders(self.store)
        self.carrying = asyncio.Lock()
        self.work = asyncio.create_task(self._work())

    async def wake(self) -> None:
        """There is something to do."""
        self.more.set()

    async def status(self) -> str:
        """What keeps it from its work; empty where nothing does."""
        waits = self.questioner.problem if self.questioner else ""
        return "; ".join(filter(None, (self.problem, self.postponed, waits)))

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
                if self.questioner:
                    self.questioner.rest(wanted=bool(self.unasked))
                try:
                    await asyncio.wait_for(self.more.wait(), POLL_S)
                except TimeoutError:
                    continue

    async def _turn(self) -> int:
        """Do what there is, at most `AT_ONCE` images; returns how many that were."""
        try:
            pending = await asyncio.to_thread(pending_erasures, self.store)
            self.postponed = await asyncio.to_thread(self._erase, pending) if pending else ""
        finally:  # neither keeps the other from being done
            done = await self._add_some()
        return done

    def _erase(self, pending: Sequence[str]) -> str:
        """Erase, or say what that waits for."""
        who = f"the service (process {os.getpid()} on {socket.gethostname()})"
        try:
            with undisturbed(self.store, self.holders, who):
                finish(self.store, *pending)
        except (Busy, LeaseError) as error:
            return str(error)
        return ""

    async def _add_some(self) -> int:
        names = await asyncio.to_thread(self.store.names, ARRIVALS)
        self.metrics.arrivals.set(len(names))
        self.unasked &= set(names)
        if self.questioner and self.unasked and self.questioner.ready():
            self.unasked.clear()
        names = [name for name in names if name not in self.unasked][:AT_ONCE]
        if names:
            await self._add_waiting(names)
        return len(names)

    async def _add_waiting(self, names: Sequence[str]) -> None:
        """Make these arrivals searchable."""
        edition = await asyncio.to_thread(find_edition, self.store, self.config.model)
        there = await asyncio.to_thread(_added_ids, edition)
        gone = await asyncio.to_thread(removed_images, self.store)
        records: list[dict[str, Any]] = []
        for name in names:
            if waiting_image(name) in there | gone:  # killed between writing it and this, or sent twice
                await asyncio.to_thread(self.store.remove, ARRIVALS, name)
                continue
            record = await asyncio.to_thread(self.store.read_json, ARRIVALS, name)
            if record is None:
                continue
            if self.questioner and not record["summary"] and not self.questioner.ready():
                self.unasked.add(name)
            elif record["image_id"] not in (earlier["image_id"] for earlier in records):
                records.append({**record, "arrival": name, "image": base64.b64decode(record["image"])})
        await self._add(edition, records)
        await asyncio.to_thread(_join_small, edition)

    async def _add(self, edition: Edition, records: Sequence[dict[str, Any]]) -> None:
        """Ask about images, embed them, and write them where every search finds them."""
        told = await asyncio.gather(*(self._describe(record) for record in records), return_exceptions=True)
        rows = []
        for record, found in zip(records, told, strict=True):
            if isinstance(found, DialogueError):
                await self._fail(record, found)
            elif not isinstance(found, BaseException):
                rows.append({**record, **found})
        if rows:
            images, summaries = [row["image"] for row in rows], [row["summary"] for row in rows]
            pair = await self.encoder.images.remote(edition, images, summaries)
            await self._write(edition, rows, pair)
        for record in rows:
            await asyncio.to_thread(self.store.remove, ARRIVALS, record["arrival"])
        there = {record["image_id"] for record in rows}  # the next turn takes away what else was sent of them
        self.unasked = {name for name in self.unasked if waiting_image(name) not in there}
        for found in told:
            if isinstance(found, BaseException) and not isinstance(found, DialogueError):
                raise found

    async def _write(self, edition: Edition, rows: Sequence[dict[str, Any]], pair: tuple[np.ndarray, ...]) -> None:
        """Write rows where every search finds them, but for what has been removed since they were read."""
        await asyncio.to_thread(write_added, self.store, edition.digest, added_table(rows, pair))
        gone = await asyncio.to_thread(removed_images, self.store)  # after it: now an erasure that comes sees them
        if late := gone & {row["image_id"] for row in rows}:
            await asyncio.to_thread(erase, self.store, late)

    async def _fail(self, record: dict[str, Any], error: DialogueError) -> None:
        problem = {"image_id": record["image_id"], "reason": error.reason, "detail": error.detail}
        await asyncio.to_thread(self.store.write_json, problem, FAILED, f"{record['image_id']}.json")
        await asyncio.to_thread(self.store.remove, ARRIVALS, record["arrival"])
        self.metrics.problems.inc(1, {"where": "dialogue"})

    async def _describe(self, record: dict[str, Any]) -> dict[str, Any] | DialogueError:
        """The dialogue about an image, or what its sender said of it."""
        if record["summary"]:
            given = {"turns": [], "attributes": {}, "flags": ["given"], "dialogue_model": "given"}
            return {**given, "summary": record["summary"]}
        if self.questioner is None:
            return DialogueError("no_engine", NO_ENGINE)
        try:
            made = await self.questioner.converse(Subject(record["image_id"], record["image"]))
        except DialogueError as error:
            return error
        turns = [{"question": turn.question, "answer": turn.answer} for turn in made.turns]
        told = {"turns": turns, "attributes": dict(made.attributes), "flags": list(made.flags)}
        return {**told, "summary": made.summary, "dialogue_model": self.questioner.model}

    async def carry(self, edition: Edition) -> None:
        """Embed with an edition's model what was added under another, before anybody is asked about that edition."""
        async with self.carrying:  # every ingress replica asks for it
            await self._carry(edition)

    async def _carry(self, edition: Edition) -> None:
        names = await asyncio.to_thread(self.store.names, ADDED, edition.digest)  # with what another call has carried
        now = dataclasses.replace(edition, added=tuple(names))
        there = await asyncio.to_thread(_added_ids, now) | edition.removed_ids
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
                        await self._write(edition, some, pair)
                    there |= {row["image_id"] for row in some}


NO_ENGINE = (
    "no engine can look at a new image here, for the dataset's dialogues were imported or come from the simulated "
    "annotator; say in `summary` what the person looks like"
)


def added_table(rows: Sequence[dict[str, Any]], pair: tuple[np.ndarray, ...]) -> pa.Table:
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
    with store.open(ADDED, digest, name) as file:
        return pq.read_metadata(file).num_rows


def refuse_without_engine(settings: DialogueConfig | None, summary: str) -> None:
    """Say so at once where an image cannot be added.

    Raises:
        UserError: it has no summary, and no engine to write one.
    """
    if settings is None and not summary:
        raise UserError(NO_ENGINE)
