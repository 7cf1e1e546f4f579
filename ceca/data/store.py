"""One dataset URI, many tables: atomic publication, manifests, resumable work.

A dataset is a folder of tables on any filesystem fsspec knows (local path, file://, s3://). A table is

    <table>/manifest.json                       the current version; written last, so readers see old or new
    <table>/<version>/manifest.json             every published version
    <table>/<version>/part-00000.parquet        rows

and a version is a digest of what the table is made from and how, so the same work has the same name wherever
and whenever it runs. A stage cuts its work into numbered *units*. A finished unit leaves its parts and then a
receipt (`.work/<stage>/<version>/00000.json`): a stage that was killed skips the units that have one, and the
tables are published when every unit has.
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

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from ceca.data.names import MANIFEST, WORK, part_name, receipt_name, rejects_table
from ceca.data.schema import REJECTS, SCHEMA_VERSION
from ceca.errors import UserError

ROW_GROUP = 128  # rows: small enough to fetch one image, large enough to stream


class StoreError(UserError):
    """The dataset URI cannot be read or written, or holds something unexpected."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One Parquet file of a table: path below the table, rows, size in bytes, SHA-256 of its content."""

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a published version of a table is: its parts, what it was made from, and with which settings."""

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
    """A row that a stage could not use: its key, a short reason in snake_case, and what was found."""

    key: str
    reason: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Receipt:
    """Proof that a unit of work is done: the parts it wrote, the rows it rejected, what it counted."""

    parts: Mapping[str, Part]
    rejects: tuple[Reject, ...] = ()
    counts: Mapping[str, float] = dataclasses.field(default_factory=dict)


def version_of(*described: Any) -> str:
    """A version's name: 12 hex digits of the digest of everything that decides the result."""
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:12]


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a URI and the path in it. For s3://, endpoint and keys come from the AWS_* variables.

    Raises:
        StoreError: the URI's scheme is not known.
    """
    if not uri:
        raise StoreError("no dataset URI given: pass --data with a folder, file://… or s3://bucket/prefix")
    options: dict[str, Any] = {}
    if uri.startswith("s3://"):
        # Listings are never cached: another process may have published a second ago. Checksums of the protocol only
        # where it needs them: some servers send the whole object's with a range of it, and parts have digests of ours.
        checksums = ("request_checksum_calculation", "response_checksum_validation")
        # The endpoint is found by itself, too; named, it tells fsspec's instances apart, which it keeps by options.
        options = {
            "use_listings_cache": False,
            "endpoint_url": os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None,
            "config_kwargs": dict.fromkeys(checksums, "when_required"),
        }
    try:
        fs, path = fsspec.core.url_to_fs(uri, **options)
    except (ValueError, ImportError) as error:
        raise StoreError(f"cannot use {uri!r}: {error}; use a folder, file://… or s3://bucket/prefix") from None
    return fs, path.rstrip("/")


class Store:
    """The tables below one dataset URI."""

    def __init__(self, uri: str):
        self.fs, self.root = filesystem(uri)
        # A job's workers may run in another folder, so a relative path would mean another place there.
        self.uri = uri if "://" in uri else str(Path(uri).absolute())

    def path(self, *names: str) -> str:
        return "/".join([self.root, *names])

    def place(self, *names: str) -> str:
        """The same as `path`, as a URI for messages and other programs."""
        return "/".join([self.uri.rstrip("/"), *names])

    # --- plain objects ------------------------------------------------------------------------------------

    def read_bytes(self, *names: str) -> bytes:
        """Content of one object.

        Raises:
            FileNotFoundError: there is no such object.
            StoreError: the store cannot be reached or refuses.
        """
        with self._explained("read", *names):
            return self.fs.cat_file(self.path(*names))

    def write_bytes(self, content: bytes, *names: str) -> None:
        """Write one object atomically: a reader sees all of it or nothing.

        An object store does that by itself; a local file is written aside and renamed.
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
        self.write_bytes(json.dumps(content, indent=1, sort_keys=True).encode(), *names)

    def read_json(self, *names: str) -> Any | None:
        """Content of a JSON object, or None where there is no such object."""
        try:
            content = self.read_bytes(*names)
        except FileNotFoundError:
            return None
        try:
            return json.loads(content)
        except ValueError as error:
            raise StoreError(f"{self.place(*names)} is not valid JSON ({error}); remove it and run its stage") from None

    def names(self, *names: str) -> list[str]:
        """The objects in a folder that may not be there, sorted, without those that are being written aside."""
        folder = self.path(*names)
        with self._explained("list", *names):
            if not self.fs.exists(folder):
                return []
            found = sorted(Path(path).name for path in self.fs.ls(folder, detail=False))
        return [name for name in found if not name.endswith(".tmp")]

    def walk(self, *names: str) -> list[str]:
        """Every object below a folder, also those being written aside, by its path below the dataset, sorted."""
        with self._explained("list", *names):
            found = self.fs.find(self.path(*names))
        return sorted(path[len(self.root) + 1 :] for path in found)

    @contextlib.contextmanager
    def open(self, *names: str) -> Iterator[Any]:
        """An object to read from a range at a time; errors as in `read_bytes`."""
        with self._explained("read", *names), self.fs.open(self.path(*names), "rb") as file:
            yield file

    def _explained(self, verb: str, *names: str) -> _Explained:
        return _Explained(f"cannot {verb} {self.place(*names)}")

    # --- reading tables -----------------------------------------------------------------------------------

    def manifest(self, table: str, version: str | None = None) -> Manifest | None:
        """The manifest of a table's current (or the named) version, or None where none is published.

        Raises:
            StoreError: it was written with another schema version, or is not a manifest.
        """
        names = (table, MANIFEST) if version is None else (table, version, MANIFEST)
        found = self.read_json(*names)
        if found is None:
            return None
        written = found.get("schema_version") if isinstance(found, dict) else None
        if written != SCHEMA_VERSION:
            raise StoreError(
                f"{self.place(*names)} has schema version {written}, this program reads {SCHEMA_VERSION}; "
                f"make the table again with this program, or use the program that wrote it"
            )
        return Manifest(**{**found, "parts": tuple(Part(**part) for part in found["parts"])})

    def current(self, table: str, made_by: str | None = None) -> Manifest:
        """The manifest of a table that must be there. `made_by` names the stage to run where it is not."""
        manifest = self.manifest(table)
        if manifest is None:
            raise StoreError(f"no table {table!r} in {self.uri}; run the stage `{made_by or table}` first")
        return manifest

    def read_part(self, manifest: Manifest, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """One part's rows.

        Raises:
            StoreError: the part is missing, or its content is not what the manifest says.
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
        """All rows of a table, in order. For tables that fit in memory; images are read by part."""
        if not manifest.parts:
            raise StoreError(f"table {manifest.table!r} in {self.uri} is empty; see its rejects")
        return pa.concat_tables([self.read_columns(manifest, n, columns) for n in range(len(manifest.parts))])

    def read_columns(self, manifest: Manifest, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Columns of one part, fetching those alone and so without a look at the part's digest."""
        part = manifest.parts[number]
        with self.open(manifest.table, part.path) as file:
            return pq.read_table(file, columns=columns)

    def take(
        self, manifest: Manifest, rows: Sequence[tuple[int, int]], columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Rows by (part, row in part), in the order asked for; reads only the row groups that hold them."""
        by_part: dict[int, list[int]] = {}
        for part, row in rows:
            by_part.setdefault(part, []).append(row)
        tables, place_of, offset = [], {}, 0
        for part, wanted in by_part.items():
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
        """The rejected rows of every stage's current version."""
        tables = [REJECTS.empty_table()]
        for stage in ("ingest", "dialogue", "evaluate", "index"):
            manifest = self.manifest(rejects_table(stage))
            if manifest is not None and manifest.rows:
                tables.append(self.read(manifest))
        return pa.concat_tables(tables)

    # --- working and publishing ---------------------------------------------------------------------------

    def write_part(self, table: str, version: str, number: int, rows: pa.Table) -> Part:
        """Write one part aside; nobody reads it before a manifest names it."""
        content = encode(rows)
        path = part_name(version, number)
        self.write_bytes(content, table, path)
        return Part(path, rows.num_rows, len(content), hashlib.sha256(content).hexdigest())

    def write_receipt(self, stage: str, version: str, unit: int, receipt: Receipt) -> None:
        """Say that a unit is done. Comes after its parts, never before."""
        self.write_json(dataclasses.asdict(receipt), WORK, stage, version, receipt_name(unit))

    def receipts(self, stage: str, version: str) -> dict[int, Receipt]:
        """The units of this version that are done."""
        found = {}
        for name in self.names(WORK, stage, version):
            receipt = json.loads(self.read_bytes(WORK, stage, version, name))
            found[int(Path(name).stem)] = Receipt(
                parts={table: Part(**part) for table, part in receipt["parts"].items()},
                rejects=tuple(Reject(**reject) for reject in receipt["rejects"]),
                counts=receipt["counts"],
            )
        return found

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
        """Publish a stage's tables (rejects first, the last named table last) and clear its receipts.

        `rejects` are those found while planning; the units' own come with their receipts.
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
        for table, written in parts.items():
            manifest = Manifest(
                table, version, sum(part.rows for part in written), tuple(written), made_from, config, notes, created
            )
            self.write_json(dataclasses.asdict(manifest), table, version, MANIFEST)
            manifests[table] = manifest
        for table, manifest in manifests.items():
            self.write_json(dataclasses.asdict(manifest), table, MANIFEST)
        self.remove(WORK, stage, version)
        return manifests

    def remove(self, *names: str) -> None:
        """Remove a folder or object that may not be there."""
        with self._explained("remove", *names):
            if self.fs.exists(self.path(*names)):
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    self.fs.rm(self.path(*names), recursive=True)


def encode(rows: pa.Table) -> bytes:
    """A part's content: Parquet in row groups of ROW_GROUP, by which `Store.take` finds a row."""
    sink = io.BytesIO()
    pq.write_table(rows, sink, row_group_size=ROW_GROUP, compression=_compression(rows.schema))
    return sink.getvalue()


def _compression(schema: pa.Schema) -> str | dict[str, str]:
    """zstd for text; none for encoded images and embeddings, which do not get smaller."""
    if "image" in schema.names:
        return {name: "NONE" if name == "image" else "ZSTD" for name in schema.names}
    return "NONE" if "global" in schema.names else "ZSTD"


class _Explained:
    """Turns a filesystem's many errors into one that says what was attempted and what to do."""

    def __init__(self, attempt: str):
        self.attempt = attempt

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> Literal[False]:
        if error is None or isinstance(error, StoreError):
            return False
        if isinstance(error, FileNotFoundError):
            if "cannot write" not in self.attempt:
                return False  # to the reader, a missing object is an answer
            advice = "check that the bucket or folder exists"
        elif isinstance(error, PermissionError):
            # S3 says no more than 403 to what it is asked first, also where a clock is wrong.
            advice = (
                "check the permissions; for s3://, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "and that the clock of this machine is right"
            )
        elif isinstance(error, OSError) and error.errno == 28:
            advice = "the disk is full: free some space and start the same command again, finished work is kept"
        elif isinstance(error, OSError | pa.ArrowException) or type(error).__module__.startswith(
            ("botocore", "aiobotocore")
        ):
            advice = "check that the place exists and, for s3://, AWS_ENDPOINT_URL and the keys"
        else:
            return False
        raise StoreError(f"{self.attempt}: {type(error).__name__}: {error}; {advice}") from error
