"""The tables below one dataset URI: atomic publication, manifests, resumable work.

A dataset is a folder of tables on any filesystem that fsspec knows (local path, file://, s3://). A table is

    <table>/manifest.json                       the current version; written last, so readers see the old or the new
    <table>/<version>/manifest.json             every published version
    <table>/<version>/part-00000.parquet        rows

A version's name is a digest of the table's inputs and settings, so the same work has the same name wherever and
whenever it runs. A stage splits its work into numbered *units*. A finished unit writes its parts first and a receipt
(`.work/<stage>/<version>/00000.json`) second. A stage that is started again skips units with a receipt, and it
publishes its tables when all units have one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from ceca.data.filesystems import StoreError, behind_proxy, below, filesystem, remove_exactly
from ceca.data.names import MANIFEST, WORK, part_name, receipt_name, rejects_table
from ceca.data.schema import REJECTS, SCHEMA_VERSION

ROW_GROUP = 128  # in rows: small enough to fetch one image, large enough to stream


@dataclasses.dataclass(frozen=True)
class Part:
    """One Parquet file of a table: path below the table, number of rows, size in bytes, SHA-256 of the content."""

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Description of a published version of a table.

    `made_from` maps each input, e.g. `images` or `model`, to its version or digest. `config` holds the stage's
    settings, `notes` the stage's own findings, and `created` is the time of publication (UTC).
    """

    table: str
    version: str
    rows: int
    parts: tuple[Part, ...]
    made_from: Mapping[str, str]
    config: Mapping[str, Any]
    notes: Mapping[str, Any]
    created: str
    schema_version: int = SCHEMA_VERSION


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


class Store:
    """The tables below one dataset URI."""

    def __init__(self, uri: str):
        self.fs, self.root = filesystem(uri)
        # Workers of a job may run in another folder, where a relative path would be another place.
        self.uri = uri if "://" in uri else str(Path(uri).absolute())

    def path(self, *names: str) -> str:
        """Path of an object in the filesystem; errors as in `below`."""
        return below(self.root, *names)

    def place(self, *names: str) -> str:
        """URI of an object, for messages and other programs."""
        return "/".join([self.uri.rstrip("/"), *names])

    # --- plain objects ------------------------------------------------------------------------------------

    def read_bytes(self, *names: str) -> bytes:
        """Content of an object.

        Raises:
            FileNotFoundError: the object does not exist.
            StoreError: the store cannot be reached, or it refuses.
        """
        with self._explained("read", *names):
            return self.fs.cat_file(self.path(*names))

    def write_bytes(self, content: bytes, *names: str) -> None:
        """Write an object atomically: a reader sees the whole object, or the one before.

        Object stores write atomically; a local file is written under another name and then renamed.

        Raises:
            StoreError: the store cannot be reached, or it refuses.
        """
        path = self.path(*names)
        with self._explained("write", *names):
            if not isinstance(self.fs, LocalFileSystem):
                self.fs.pipe_file(path, content)
                return
            os.makedirs(os.path.dirname(path), exist_ok=True)
            aside = f"{path}.{uuid.uuid4().hex}.tmp"
            try:
                with open(aside, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(aside, path)
            finally:
                if os.path.exists(aside):
                    os.remove(aside)

    def write_json(self, content: Any, *names: str) -> None:
        """Write an object as JSON; atomic, and with errors, as `write_bytes`."""
        self.write_bytes(json.dumps(content, indent=1, sort_keys=True).encode(), *names)

    def read_json(self, *names: str) -> Any | None:
        """Content of a JSON object; None if the object does not exist.

        Raises:
            StoreError: the store cannot be reached, or the object is not valid JSON.
        """
        try:
            content = self.read_bytes(*names)
        except FileNotFoundError:
            return None
        try:
            return json.loads(content)
        except ValueError as error:
            raise StoreError(f"{self.place(*names)} is not valid JSON ({error}); remove it and run its stage") from None

    def read_record(self, *names: str, kind: str, fields: Mapping[str, Any]) -> dict[str, Any] | None:
        """Content of a JSON object that must be a record; None if the object does not exist.

        Args:
            names: its path below the dataset.
            kind: what it should be, for the error.
            fields: fields that it must have, and the type of each.

        Raises:
            StoreError: it is not such a record; the message names the object. Others as in `read_json`.
        """
        record = self.read_json(*names)
        if record is None:
            return None
        wrong = [name for name, kept in fields.items() if not isinstance(_get(record, name), kept)]
        if wrong:
            raise StoreError(
                f"{self.place(*names)} is not {kind}, for lack of {', '.join(wrong)}: found {json.dumps(record):.80}; "
                "remove it"
            )
        whole: dict[str, Any] = record
        return whole

    def names(self, *names: str) -> list[str]:
        """Sorted names of the objects in a folder, without unfinished ones; empty if the folder does not exist."""
        folder = self.path(*names)
        with self._explained("list", *names):
            if not self.fs.exists(folder):
                return []
            listed = sorted(Path(path).name for path in self.fs.ls(folder, detail=False))
        return [name for name in listed if not name.endswith(".tmp")]

    def walk(self, *names: str) -> list[str]:
        """Sorted paths, below the dataset, of all objects below a folder, also of unfinished ones."""
        with self._explained("list", *names):
            paths = self.fs.find(self.path(*names))
        return sorted(path[len(self.root) + 1 :] for path in paths)

    @contextlib.contextmanager
    def open(self, *names: str) -> Iterator[Any]:
        """Open an object to read ranges of it; errors as in `read_bytes`."""
        with self._explained("read", *names), self.fs.open(self.path(*names), "rb") as file:
            yield file

    def _explained(self, verb: str, *names: str) -> _Explained:
        return _Explained(f"cannot {verb} {self.place(*names)}")

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
            return Manifest(**{**record, "parts": tuple(Part(**part) for part in record["parts"])})
        except (KeyError, TypeError, ValueError) as error:
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
            raise StoreError(f"{place} is named by its manifest but missing; run its stage with --redo") from None
        if hashlib.sha256(content).hexdigest() != part.sha256:
            raise StoreError(
                f"{place} is damaged: {len(content)} bytes found, {part.bytes} published, and the digest differs; "
                "run its stage with --redo"
            )
        return pq.read_table(pa.BufferReader(content), columns=columns)

    def read(self, manifest: Manifest, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows of a table, in order. For tables that fit in memory; images are read part by part.

        Args:
            manifest: the table.
            columns: columns to read; None means all.

        Raises:
            StoreError: the table is empty.
        """
        if not manifest.parts:
            raise StoreError(f"table {manifest.table!r} in {self.uri} is empty; see its rejects")
        return pa.concat_tables([self.read_columns(manifest, n, columns) for n in range(len(manifest.parts))])

    def read_columns(self, manifest: Manifest, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Columns of one part. Fetches these columns alone, so the part's digest is not checked."""
        part = manifest.parts[number]
        with self.open(manifest.table, part.path) as file:
            return pq.read_table(file, columns=columns)

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
        tables, place_of, offset = [], {}, 0
        for part, wanted in rows_of.items():
            groups = sorted({row // ROW_GROUP for row in wanted})
            source = manifest.parts[part]
            with self.open(manifest.table, source.path) as file:
                table = pq.ParquetFile(file).read_row_groups(groups, columns=columns)
            starts = {group: position * ROW_GROUP for position, group in enumerate(groups)}
            for row in wanted:
                place_of[part, row] = offset + starts[row // ROW_GROUP] + row % ROW_GROUP
            offset += table.num_rows
            tables.append(table)
        return pa.concat_tables(tables).take([place_of[part, row] for part, row in rows])

    def rejects(self) -> pa.Table:
        """Rejected rows of the current version of every stage: schema `REJECTS`."""
        tables = [REJECTS.empty_table()]
        for stage in ("ingest", "dialogue", "evaluate", "index"):
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
            number: number of the part, which decides its name.
            rows: the part's rows.
        """
        content = encode(rows)
        path = part_name(version, number)
        self.write_bytes(content, table, path)
        return Part(path, rows.num_rows, len(content), hashlib.sha256(content).hexdigest())

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
        receipts = {}
        for name in self.names(WORK, stage, version):
            receipt: Any = self.read_json(WORK, stage, version, name)
            try:
                receipts[int(Path(name).stem)] = Receipt(
                    parts={table: Part(**part) for table, part in receipt["parts"].items()},
                    rejects=tuple(Reject(**reject) for reject in receipt["rejects"]),
                    counts=receipt["counts"],
                )
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise StoreError(
                    f"{self.place(WORK, stage, version, name)} is not a receipt ({plain(error)}); remove it, and its "
                    "unit is done again"
                ) from None
        return receipts

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

        Returns:
            The manifest of each table, by name.
        """
        receipts = list(receipts)
        rejected = [*rejects, *(reject for receipt in receipts for reject in receipt.rejects)]
        rows = pa.Table.from_pylist([{"stage": stage, **dataclasses.asdict(reject)} for reject in rejected], REJECTS)
        parts = {rejects_table(stage): [self.write_part(rejects_table(stage), version, 0, rows)]}
        for table in tables:
            parts[table] = [receipt.parts[table] for receipt in receipts if table in receipt.parts]
        notes = {**(notes or {}), "rejects": dict(Counter(reject.reason for reject in rejected))}
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        manifests = {}
        for table, table_parts in parts.items():
            rows_in_all = sum(part.rows for part in table_parts)
            manifest = Manifest(table, version, rows_in_all, tuple(table_parts), made_from, config, notes, created)
            self.write_json(dataclasses.asdict(manifest), table, version, MANIFEST)
            manifests[table] = manifest
        for table, manifest in manifests.items():
            self.write_json(dataclasses.asdict(manifest), table, MANIFEST)
        self.remove(WORK, stage, version)
        return manifests

    def remove(self, *names: str) -> None:
        """Remove a folder or object, if it exists."""
        with self._explained("remove", *names):
            remove_exactly(self.fs, self.path(*names))


def _get(record: Any, name: str) -> Any:
    return record.get(name) if isinstance(record, dict) else None


def plain(error: BaseException) -> str:
    """An error's kind and message on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def encode(rows: pa.Table) -> bytes:
    """Encode rows as a part: Parquet with row groups of ROW_GROUP rows, which `Store.take` relies on."""
    sink = io.BytesIO()
    pq.write_table(rows, sink, row_group_size=ROW_GROUP, compression=_compression(rows.schema))
    return sink.getvalue()


def _compression(schema: pa.Schema) -> str | dict[str, str]:
    """Compression of each column: zstd, but none for encoded images and embeddings, which do not get smaller."""
    if "image" in schema.names:
        return {name: "NONE" if name == "image" else "ZSTD" for name in schema.names}
    return "NONE" if "global" in schema.names else "ZSTD"


class _Explained:
    """Turns the errors of filesystems into a StoreError that says what was attempted and what to do."""

    def __init__(self, attempt: str):
        self.attempt = attempt

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> Literal[False]:
        if error is None or isinstance(error, StoreError):
            return False
        if isinstance(error, FileNotFoundError):
            if "cannot write" not in self.attempt:
                return False  # readers handle a missing object
            advice = "check that the bucket or folder exists"
        elif isinstance(error, PermissionError):
            # S3 answers the first request with a plain 403, also if this machine's clock is wrong.
            advice = (
                "check the permissions; for s3://, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                f"and that the clock of this machine is right{behind_proxy()}"
            )
        elif isinstance(error, OSError) and error.errno == 28:
            advice = "the disk is full: free some space and start the same command again, finished work is kept"
        elif isinstance(error, OSError | pa.ArrowException) or type(error).__module__.startswith(
            ("botocore", "aiobotocore")
        ):
            advice = f"check that the place exists and, for s3://, AWS_ENDPOINT_URL and the keys{behind_proxy()}"
        else:
            return False
        raise StoreError(f"{self.attempt}: {type(error).__name__}: {error}; {advice}") from error
