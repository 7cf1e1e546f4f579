"""The intake: makes added images searchable and erases removed ones, one by one while the service runs.

An acknowledged change is in the store first, so nothing is lost with a process:

    arrivals/<image id>-<request>.json    acknowledged, not yet searchable: the image and its sender's details
    added/<digest>/                       searchable (`ceca.search.edition`)
    failed/<image id>.json                why an image could not be added
    removed/<name>.json                   out of every search (`ceca.data.erase`); this deployment erases it everywhere

After each step a new start can continue from the store, and each step may be repeated. Plain Python; `serve.app` makes
it a deployment.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import logging
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ray.serve.handle import DeploymentHandle

from ceca.config import ServeConfig
from ceca.data import schema
from ceca.data.changes import (
    ADDED,
    pending_erasures,
    read_added,
    read_arrival,
    removed_images,
    waiting_image,
    write_added,
)
from ceca.data.erase import Busy, erase, finish, undisturbed
from ceca.data.lease import Holders, LeaseError, this_process
from ceca.data.names import ARRIVALS, FAILED
from ceca.data.store import Store, StoreError
from ceca.dialogue.conversation import DialogueError, Subject
from ceca.search.edition import Edition, find_edition
from serve.describer import EngineSettings, Questioner
from serve.metrics import Metrics
from serve.sessions import Sessions

log = logging.getLogger(__name__)

AT_ONCE = 32  # most images that are described and written together
POLL_S = 2.0  # pause between two looks for changes by other ingress replicas or services
SMALL = 16  # more small objects of `added` than this are joined into one
WHOLE = 1024  # an object with this number of images is not small


class Intake:
    """The single replica that carries out the changes in the store and then waits for more.

    Args:
        data: dataset URI.
        config: settings of the service.
        settings: settings of the dialogue, or why no engine can look at new images.
        encoder: handle of `QueryEncoder`.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it, so there is an event loop for the task
        self, data: str, config: ServeConfig, settings: EngineSettings, encoder: DeploymentHandle
    ):
        self.store, self.config, self.encoder = Store(data), config, encoder
        self.metrics = Metrics()
        self.more = asyncio.Event()
        self.no_engine = settings if isinstance(settings, str) else ""
        self.questioner = None if isinstance(settings, str) else Questioner(self.store, settings, config, self.more.set)
        self.unasked: set[str] = set()  # arrivals that wait for the engine while others are carried out
        self.problem = self.postponed = ""
        self.holders = Holders(self.store)
        self.carrying = asyncio.Lock()
        self.sessions = Sessions(b"")  # signs none: keeps which have ended
        self.work = asyncio.create_task(self._work())

    async def wake(self) -> None:
        """Look for changes now."""
        self.more.set()

    async def status(self) -> str:
        """What keeps the intake from its work; empty if nothing does."""
        waits = self.questioner.problem if self.questioner else ""
        return "; ".join(filter(None, (self.problem, self.postponed, waits)))

    async def merge_ended(self, ended: dict[str, int]) -> dict[str, int]:
        """Sessions that ended on any ingress replica, with those that ended on one."""
        return self.sessions.merge(ended)

    async def _work(self) -> None:
        while True:
            self.more.clear()
            try:
                done = await self._turn()
                self.problem = ""
            except Exception as error:  # from the store, the engine or the encoder: each may work again later
                log.warning("cannot continue: %s", error)
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
        """Erase what is pending and add at most `AT_ONCE` images. Returns the number of added images."""
        try:
            pending = await asyncio.to_thread(pending_erasures, self.store)
            self.postponed = await asyncio.to_thread(self._erase, pending) if pending else ""
        finally:  # a failed erasure does not prevent additions
            done = await self._add_some()
        return done

    def _erase(self, pending: Sequence[str]) -> str:
        """Erase the pending removals. Returns what they wait for; empty if they are done."""
        try:
            with undisturbed(self.store, self.holders, this_process("the service")) as lease:
                finish(self.store, *pending, check=lease.check)
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
        """Make these arrivals searchable, except those that wait for the engine."""
        edition = await asyncio.to_thread(find_edition, self.store, self.config.model)
        added = await asyncio.to_thread(_added_ids, edition)
        removed = await asyncio.to_thread(removed_images, self.store)
        records: list[dict[str, Any]] = []
        for name in names:
            if waiting_image(name) in added | removed:  # sent twice, or a process was killed before this line
                await asyncio.to_thread(self.store.remove, ARRIVALS, name)
                continue
            try:
                record = await asyncio.to_thread(_read_arrival, self.store, name)
            except (StoreError, ValueError) as error:  # no such record; the others are added all the same
                unusable = DialogueError("bad_arrival", str(error))
                await self._fail({"image_id": waiting_image(name), "arrival": name}, unusable)
                continue
            if record is None:
                continue
            if self.questioner and not record["summary"] and not self.questioner.ready():
                self.unasked.add(name)
            elif record["image_id"] not in (earlier["image_id"] for earlier in records):
                records.append(record)
        await self._add(edition, records)
        await asyncio.to_thread(_join_small, edition)

    async def _add(self, edition: Edition, records: Sequence[dict[str, Any]]) -> None:
        """Describe images, embed them, and write them where every search finds them."""
        descriptions = await asyncio.gather(*(self._describe(record) for record in records), return_exceptions=True)
        rows = []
        for record, description in zip(records, descriptions, strict=True):
            if isinstance(description, DialogueError):
                await self._fail(record, description)
            elif not isinstance(description, BaseException):
                rows.append({**record, **description})
        if rows:
            images, summaries = [row["image"] for row in rows], [row["summary"] for row in rows]
            pair = await self.encoder.images.remote(edition, images, summaries)
            await self._write(edition, rows, pair)
        for record in rows:
            await asyncio.to_thread(self.store.remove, ARRIVALS, record["arrival"])
        written = {record["image_id"] for record in rows}  # the next turn removes further arrivals of these images
        self.unasked = {name for name in self.unasked if waiting_image(name) not in written}
        for description in descriptions:
            if isinstance(description, BaseException) and not isinstance(description, DialogueError):
                raise description

    async def _write(self, edition: Edition, rows: Sequence[dict[str, Any]], pair: tuple[np.ndarray, ...]) -> None:
        """Write rows where every search finds them, except images that were removed since the rows were read."""
        await asyncio.to_thread(write_added, self.store, edition.digest, added_table(rows, pair))
        removed = await asyncio.to_thread(removed_images, self.store)  # read last: a later erasure sees the rows itself
        if late := removed & {row["image_id"] for row in rows}:
            await asyncio.to_thread(erase, self.store, late)

    async def _fail(self, record: dict[str, Any], error: DialogueError) -> None:
        problem = {"image_id": record["image_id"], "reason": error.reason, "detail": error.detail}
        await asyncio.to_thread(self.store.write_json, problem, FAILED, f"{record['image_id']}.json")
        await asyncio.to_thread(self.store.remove, ARRIVALS, record["arrival"])
        self.metrics.problems.inc(1, {"where": "dialogue"})

    async def _describe(self, record: dict[str, Any]) -> dict[str, Any] | DialogueError:
        """The dialogue columns of an image, from the engine or from the sender's summary."""
        if record["summary"]:
            given = {"turns": [], "attributes": {}, "flags": ["given"], "dialogue_model": "given"}
            return {**given, "summary": record["summary"]}
        if self.questioner is None:
            return DialogueError("no_engine", self.no_engine)
        try:
            dialogue = await self.questioner.converse(Subject(record["image_id"], record["image"]))
        except DialogueError as error:
            return error
        return {
            "turns": [{"question": turn.question, "answer": turn.answer} for turn in dialogue.turns],
            "attributes": dict(dialogue.attributes),
            "flags": list(dialogue.flags),
            "summary": dialogue.summary,
            "dialogue_model": self.questioner.model,
        }

    async def carry(self, edition: Edition) -> None:
        """Embed with an edition's model the images that were added under another, before the edition is served."""
        async with self.carrying:  # every ingress replica calls this
            await self._carry(edition)

    async def _carry(self, edition: Edition) -> None:
        names = await asyncio.to_thread(self.store.names, ADDED, edition.digest)  # also what an earlier call carried
        current = dataclasses.replace(edition, added=tuple(names))
        known = await asyncio.to_thread(_added_ids, current) | edition.removed_ids
        for digest in await asyncio.to_thread(self.store.names, ADDED):
            if digest == edition.digest:
                continue
            for name in await asyncio.to_thread(self.store.names, ADDED, digest):
                table = await asyncio.to_thread(read_added, self.store, digest, name)
                rows = [row for row in table.to_pylist() if row["image_id"] not in known]
                for start in range(0, len(rows), AT_ONCE):
                    written = await self._embed_again(edition, rows[start : start + AT_ONCE])
                    known |= {row["image_id"] for row in written}

    async def _embed_again(self, edition: Edition, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Embed rows with an edition's model and write them. Returns the written rows: those not removed meanwhile."""
        images, summaries = [row["image"] for row in rows], [row["summary"] for row in rows]
        pair = await self.encoder.images.remote(edition, images, summaries)
        removed = await asyncio.to_thread(removed_images, self.store)  # since the images were read
        kept = [n for n, row in enumerate(rows) if row["image_id"] not in removed]
        written = [{**rows[n], "attributes": dict(rows[n]["attributes"])} for n in kept]
        if written:
            await self._write(edition, written, (pair[0][kept], pair[1][kept]))
        return written


def added_table(rows: Sequence[dict[str, Any]], pair: tuple[np.ndarray, ...]) -> pa.Table:
    """N rows of `schema.added` with their embeddings [N, D] and [N, E]."""
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


def _read_arrival(store: Store, name: str) -> dict[str, Any] | None:
    """An acknowledged image, decoded; None if it was taken meanwhile.

    Raises:
        StoreError, ValueError: the object is no such record.
    """
    record = read_arrival(store, name)
    if record is None:
        return None
    time = record.get("time")
    if not isinstance(time, str | None):
        raise ValueError(f"{time!r:.60} is no time")
    image = base64.b64decode(record["image"], validate=True)
    return {**record, "arrival": name, "image": image, "time": datetime.fromisoformat(time) if time else None}


def _added_ids(edition: Edition) -> set[str]:
    return {name for table in edition.read_added(["image_id"]) for name in table["image_id"].to_pylist()}


def _join_small(edition: Edition) -> None:
    """Join the small objects of `added` if there are many, without duplicate and removed images."""
    store, digest = edition.store, edition.digest
    names = store.names(ADDED, digest)
    small = [name for name in names if _rows(store, digest, name) < WHOLE] if len(names) > SMALL else []
    if len(small) <= SMALL:
        return
    tables = [read_added(store, digest, name) for name in small]
    whole = pa.concat_tables(tables, promote_options="default")  # older ones have no times
    left_out = set(removed_images(store))
    kept: list[int] = []
    for row, image_id in enumerate(whole["image_id"].to_pylist()):
        if image_id not in left_out:
            left_out.add(image_id)
            kept.append(row)
    written = write_added(store, digest, whole.take(kept)) if kept else None
    for name in small:
        if name != written:
            store.remove(ADDED, digest, name)


def _rows(store: Store, digest: str, name: str) -> int:
    with store.open(ADDED, digest, name) as file:
        return pq.read_metadata(file).num_rows
