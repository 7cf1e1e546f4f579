"""The tables below one dataset URI: atomic publication, manifests, resumable work.

A dataset is a folder of tables on any filesystem that fsspec knows (local path, file://, s3://). A table is

    <table>/manifest.json                       the current version; written last, so readers see the old or the new
    <table>/<version>/manifest.json             every published version
    <table>/<version>/part-00000-<hex>.parquet  rows; named by number and content

A version's name is a digest of the table's inputs and settings, so the same work has the same name wherever and
whenever it runs. A stage splits its work into numbered *units*. A finished unit writes its parts first and a receipt
(`.work/<stage>/<version>/00000.json`) second. A stage that is started again skips units with a receipt, and it
publishes its tables when all units have one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from ceca.data.filesystems import StoreError
from ceca.data.filesystems import filesystem as filesystem
from ceca.data.manifest import Manifest as Manifest
from ceca.data.manifest import MissingPart as MissingPart
from ceca.data.manifest import Part as Part
from ceca.data.names import MANIFEST, WORK, part_name, receipt_name, rejects_table
from ceca.data.objects import Objects, as_json
from ceca.data.parts import ROW_GROUP, chosen, decode, encode
from ceca.data.replacing import Check, unchecked
from ceca.data.schema import REJECTS, SCHEMA_VERSION

A = TypeVar("A")
B = TypeVar("B")
READERS = 8  # objects read at the same time
READERS_HERE = 4  # the same of small parts of this machine: more would wait for Python's lock
ROWS_TOGETHER = 2048  # in such parts


@dataclasses.dataclass(frozen=True)
class Reject:
    """A row that a stage could not use: its key, a short reason in snake_case, and a detail for people.

    Half characters, which JSON can spell and no table can hold, are written as escapes.
    """

    key: str
    reason: str
    detail: str

    def __post_init__(self) -> None:
        for name in ("key", "detail"):
            text = getattr(self, name).encode("utf-8", "backslashreplace").decode()
            object.__setattr__(self, name, text)


@dataclasses.dataclass(frozen=True)
class Receipt:
    """Proof that a unit of work is done: its part of each table, its rejected rows, and its counters."""

    parts: Mapping[str, Part]
    rejects: tuple[Reject, ...] = ()
    counts: Mapping[str, float] = dataclasses.field(default_factory=dict)


def version_of(*described: Any) -> str:
    """Name of a version: the first 12 hex digits of the SHA-256 of everything that decides the result."""
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:12]


class Store(Objects):
    """The tables below one dataset URI."""

    # --- reading tables -----------------------------------------------------------------------------------

    def manifest(self, table: str, version: str | None = None) -> Manifest | None:
        """Manifest of a version of a table; None if the version is not published.

        Args:
            table: name of the table.
            version: the version; by default the current one.

        Raises:
            StoreError: the manifest has another schema version, or it is not a manifest.
        """
        names = (table, MANIFEST) if version is None else (table, version, MANIFEST)
        record = self.read_json(*names)
        if record is None:
            return None
        schema_version = record.get("schema_version") if isinstance(record, dict) else None
        if schema_version != SCHEMA_VERSION:
            raise StoreError(
                f"{self.place(*names)} has schema version {schema_version}, this program reads {SCHEMA_VERSION}; "
                f"make the table again with this program, or use the program that wrote it"
            )
        try:
            manifest = Manifest(**{**record, "parts": tuple(Part(**part) for part in record["parts"])})
            manifest.check()
            return manifest
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{self.place(*names)} is not a manifest of this program ({plain(error)}); remove it and run the stage "
                "again"
            ) from None

    def current(self, table: str, made_by: str | None = None) -> Manifest:
        """Manifest of the current version of a table that must exist.

        Args:
            table: name of the table.
            made_by: the stage that makes it, for the error; by default the table's name.

        Raises:
            StoreError: the table is not published; the message names the stage to run.
        """
        manifest = self.manifest(table)
        if manifest is None:
            raise StoreError(f"no table {table!r} in {self.uri}; run the stage `{made_by or table}` first")
        return manifest

    def belonging(self, table: str, images: Manifest) -> Manifest | None:
        """Manifest of the version of `captions` or `attributes` that belongs to these images; None if there is none.

        The current version may be of another run of ingest: two runs overlapped, or one ended between two tables.

        Args:
            table: name of the table.
            images: the version of the images table.
        """
        same_run = self.manifest(table, images.version)
        if same_run is not None:
            return same_run
        current = self.manifest(table)
        return current if current is not None and current.made_from.get("images") == images.version else None

    def captions(self, images: Manifest) -> Manifest:
        """Manifest of the captions that belong to these images.

        Raises:
            StoreError: there are none.
        """
        captions = self.belonging("captions", images)
        if captions is None:
            raise StoreError(
                f"no captions belong to images {images.version} in {self.uri}; run the stage `ingest` again"
            )
        return captions

    def read_part(self, manifest: Manifest, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Rows of one part, after its digest was checked.

        Args:
            manifest: the table.
            number: index of the part in the manifest.
            columns: columns to read; None means all.

        Raises:
            StoreError: the part is missing, or its digest is not the manifest's.
        """
        part = manifest.parts[number]
        place = self.place(manifest.table, part.path)
        try:
            content = self.read_bytes(manifest.table, part.path)
        except FileNotFoundError:
            raise MissingPart.at(place) from None
        if hashlib.sha256(content).hexdigest() != part.sha256:
            raise StoreError(
                f"{place} is damaged: {len(content)} bytes found, {part.bytes} published, and the digest differs; "
                "run its stage with --redo"
            )
        return decode(pa.BufferReader(content), columns)

    def read(self, manifest: Manifest, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of a table, in order. For tables that fit in memory; images are read part by part.

        Args:
            manifest: the table.
            columns: columns to read; None means all.

        Raises:
            StoreError: the table is empty.
        """
        return pa.concat_tables(self.read_each(manifest, columns))

    def read_each(self, manifest: Manifest, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """Columns of every part, one part after the other; the next ones are read meanwhile. No digest is checked.

        Raises:
            StoreError: the table is empty.
        """
        if not manifest.parts:
            raise StoreError(f"table {manifest.table!r} in {self.uri} is empty; see its rejects")
        read = functools.partial(self.read_columns, manifest, columns=columns)
        return in_order(read, range(len(manifest.parts)), self.together(manifest))

    def together(self, manifest: Manifest) -> int:
        """Number of a table's parts that one thread reads one after the other: several small ones of this machine.

        A part that is here is read faster than another thread is told to read it.
        """
        if not isinstance(self.fs, LocalFileSystem) or not manifest.parts:
            return 1
        return max(1, ROWS_TOGETHER * len(manifest.parts) // max(1, manifest.rows))

    def read_columns(self, manifest: Manifest, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Columns of one part. Fetches these columns alone, so the part's digest is not checked."""
        with self._part(manifest, number) as file:
            return decode(file, columns)

    @contextlib.contextmanager
    def _part(self, manifest: Manifest, number: int) -> Iterator[Any]:
        """Open a part to read ranges of it.

        Raises:
            MissingPart: it is not there.
        """
        path = manifest.parts[number].path
        try:
            with self.open(manifest.table, path) as file:
                yield file
        except FileNotFoundError:
            raise MissingPart.at(self.place(manifest.table, path)) from None

    def take(
        self, manifest: Manifest, rows: Sequence[tuple[int, int]], columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Rows of a table by their places. Reads only the row groups that hold them.

        Args:
            manifest: the table.
            rows: places (part, row within the part).
            columns: columns to read; None means all.

        Returns:
            The rows, in the order of `rows`.
        """
        rows_of: dict[int, list[int]] = {}
        for part, row in rows:
            rows_of.setdefault(part, []).append(row)
        groups_of = {part: sorted({row // ROW_GROUP for row in wanted}) for part, wanted in rows_of.items()}

        def read(part: int) -> pa.Table:
            with self._part(manifest, part) as file:
                return chosen(pq.ParquetFile(file).read_row_groups(groups_of[part], columns=columns), columns)

        tables, place_of, offset = [], {}, 0
        for part, table in zip(rows_of, in_order(read, rows_of), strict=True):
            starts = {group: position * ROW_GROUP for position, group in enumerate(groups_of[part])}
            for row in rows_of[part]:
                place_of[part, row] = offset + starts[row // ROW_GROUP] + row % ROW_GROUP
            offset += table.num_rows
            tables.append(table)
        return pa.concat_tables(tables).take([place_of[part, row] for part, row in rows])

    def rejects(self) -> pa.Table:
        """Rejected rows of the current version of every stage: schema `REJECTS`."""
        tables = [REJECTS.empty_table()]
        for stage in ("ingest", "dialogue", "agree", "evaluate", "index"):
            manifest = self.manifest(rejects_table(stage))
            if manifest is not None and manifest.rows:
                tables.append(self.read(manifest))
        return pa.concat_tables(tables)

    # --- working and publishing ---------------------------------------------------------------------------

    def write_part(self, table: str, version: str, number: int, rows: pa.Table) -> Part:
        """Write one part. No reader sees it before a manifest names it.

        Args:
            table: name of the table.
            version: the version that the part belongs to.
            number: number of the part. Its name has the digest of the content too: a late process that does the same
                work otherwise does not change it.
            rows: the part's rows.
        """
        content = encode(rows)
        sha256 = hashlib.sha256(content).hexdigest()
        path = part_name(version, number, sha256)
        self.write_bytes(content, table, path)
        return Part(path, rows.num_rows, len(content), sha256)

    def write_receipt(self, stage: str, version: str, unit: int, receipt: Receipt) -> None:
        """Record that a unit is done. Its parts must be written before.

        Args:
            stage: name of the stage.
            version: the version that the stage makes.
            unit: number of the unit.
            receipt: what the unit made.
        """
        self.write_json(dataclasses.asdict(receipt), WORK, stage, version, receipt_name(unit))

    def receipts(self, stage: str, version: str) -> dict[int, Receipt]:
        """Finished units of a version: number of the unit → receipt."""
        return dict(in_order(functools.partial(self._receipt, stage, version), self.names(WORK, stage, version)))

    def _receipt(self, stage: str, version: str, name: str) -> tuple[int, Receipt]:
        receipt: Any = self.read_json(WORK, stage, version, name)
        try:
            return int(Path(name).stem), Receipt(
                parts={table: Part(**part) for table, part in receipt["parts"].items()},
                rejects=tuple(Reject(**reject) for reject in receipt["rejects"]),
                counts=receipt["counts"],
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{self.place(WORK, stage, version, name)} is not a receipt ({plain(error)}); remove it, and its "
                "unit is done again"
            ) from None

    def publish(
        self,
        stage: str,
        version: str,
        tables: Sequence[str],
        receipts: Iterable[Receipt],
        *,
        made_from: Mapping[str, str],
        config: Mapping[str, Any],
        rejects: Sequence[Reject] = (),
        notes: Mapping[str, Any] | None = None,
        check: Check = unchecked,
    ) -> dict[str, Manifest]:
        """Publish a stage's tables and remove its receipts.

        Args:
            stage: name of the stage.
            version: the version to publish.
            tables: names of the tables, in the order of publication; the table of rejects comes before them.
            receipts: receipts of all units, in the order of their parts.
            made_from: each input, e.g. `images` or `model` → its version or digest.
            config: the stage's settings.
            rejects: rows rejected while the stage planned its units; the units' rejects are in their receipts.
            notes: findings of the stage, kept in the manifests.
            check: raises an error if this process may not publish any more.

        Returns:
            The manifest of each table, by name.

        Raises:
            StoreError: a part is gone, so nothing is published. Others as of `check`.
        """
        receipts = list(receipts)
        rejected = [*rejects, *(reject for receipt in receipts for reject in receipt.rejects)]
        rows = pa.Table.from_pylist([{"stage": stage, **dataclasses.asdict(reject)} for reject in rejected], REJECTS)
        parts = {rejects_table(stage): [self.write_part(rejects_table(stage), version, 0, rows)]}
        for table in tables:
            parts[table] = [receipt.parts[table] for receipt in receipts if table in receipt.parts]
        notes = {**(notes or {}), "rejects": dict(Counter(reject.reason for reject in rejected))}
        manifests = {}
        for table, table_parts in parts.items():
            rows_in_all = sum(part.rows for part in table_parts)
            manifests[table] = Manifest(table, version, rows_in_all, tuple(table_parts), made_from, config, notes, "")
        manifests = self.make_current(manifests.values(), check)
        check()  # else it may be the work of another process, which does it again
        self.remove(WORK, stage, version)
        return manifests

    def make_current(self, manifests: Iterable[Manifest], check: Check = unchecked) -> dict[str, Manifest]:
        """Make versions of tables the current ones, in this order. All of their parts are there, before and after.

        Args:
            manifests: the versions.
            check: raises an error if this process may not publish any more.

        Returns:
            The manifests as published, by table.

        Raises:
            StoreError: a part is gone, so the versions before stay current. Others as of `check`.
        """
        # A version that is current for the second time has another content: nobody takes it for the first time.
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        published = {manifest.table: dataclasses.replace(manifest, created=created) for manifest in manifests}
        contents = {table: as_json(dataclasses.asdict(manifest)) for table, manifest in published.items()}
        before = {table: self.manifest(table) for table in published}

        def write(table: str, *names: str) -> None:
            self.replace(lambda _: contents[table], table, *names, check=check)

        self._refuse_missing(published.values())
        try:
            for table, manifest in published.items():
                write(table, manifest.version, MANIFEST)
            for table in published:
                write(table, MANIFEST)
        finally:
            try:
                self._refuse_missing(published.values())
            except StoreError:  # removed while this process was stopped between a check and a write
                for table, manifest in reversed(published.items()):
                    self._withdraw(manifest, contents[table], before[table])
                raise
        return published

    def _withdraw(self, manifest: Manifest, content: bytes, before: Manifest | None) -> None:
        """Take back a version whose parts are gone: what was current before is current again, as it is now."""
        table, version = manifest.table, manifest.version
        earlier = self.read_json(table, before.version, MANIFEST) if before and before.version != version else None
        if earlier is not None:
            self.replace(lambda now: as_json(earlier) if now == content else None, table, MANIFEST)
        for names in ((table, MANIFEST), (table, version, MANIFEST)):
            if as_json(self.read_json(*names)) == content:
                self.remove(*names)

    def _refuse_missing(self, manifests: Iterable[Manifest]) -> None:
        """Refuse versions whose parts are not all there.

        Raises:
            StoreError: a part is gone.
        """
        for manifest in manifests:
            if gone := self.missing(manifest.table, manifest.parts):
                first = self.place(manifest.table, gone[0].path)
                raise StoreError(
                    f"{len(gone)} parts of {manifest.table} are gone, such as {first}: another process removed them "
                    "while this one was stopped; nothing is published, start the same command again"
                )

    def missing(self, table: str, parts: Collection[Part]) -> list[Part]:
        """Those of a table's parts that are not in the store with their size."""
        sizes: dict[str, int] = {}
        for folder in {part.path.rpartition("/")[0] for part in parts}:
            sizes |= self.sizes(table, folder)
        return [part for part in parts if sizes.get(f"{table}/{part.path}") != part.bytes]


def in_order(call: Callable[[A], B], arguments: Collection[A], together: int = 1) -> Iterator[B]:
    """Results of calls that wait for a store, in order. Several threads call; few results wait to be taken.

    Args:
        call: the function.
        arguments: of each call.
        together: number of calls that a thread makes one after the other, as `Store.together` has it.
    """
    if len(arguments) == 1:  # a picture, a text: no thread is worth it
        yield from map(call, arguments)
        return
    left = iter(arguments)
    waiting: deque[Future[list[B]]] = deque()
    with ThreadPoolExecutor(READERS if together == 1 else READERS_HERE) as readers:
        try:
            while some := list(itertools.islice(left, together)):
                waiting.append(readers.submit(lambda of: [call(argument) for argument in of], some))
                if len(waiting) > 2 * READERS:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def plain(error: BaseException) -> str:
    """An error's kind and message on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
