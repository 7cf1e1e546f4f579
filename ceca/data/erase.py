"""Erasing: delete removed images from every version of every table below a dataset's URI.

This is the one exception to "nothing published is changed in place". A part that holds such an image is written again
without it, under another name. A common summary that was written from such an image's summary gives way to the own ones
of the other images. Then the manifests that name the old part are written again with the new part. When no manifest
names the old part any more, it is removed. Versions keep their names.

A process that is killed at any moment loses no other row, and calling it again finishes the work. Two erasures at the
same time also lose nothing. No stage may work on the dataset meanwhile (`undisturbed`). The images to erase are
recorded in removed/ (`ceca.data.changes`).

An erasure that was stopped may be taken for dead, and a stage begins. So an erasure looks at its lease before each
step, and a stage leaves the images to erase out of what it publishes (`leave_out`): a step that was taken late then
removes nothing that a new table names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from ceca.data.changes import erased_images, mark_erased, removal, reopen, waiting_image, write_added
from ceca.data.lease import Holders, Lease, holding
from ceca.data.names import ADDED, ARRIVALS, FAILED, LISTING, MANIFEST, PART, REMOVED, WORK, rewritten_part_name
from ceca.data.objects import as_json
from ceca.data.parts import decode, encode
from ceca.data.replacing import Check, unchecked
from ceca.data.schema import OWN_SUMMARY, SUMMARY_OF, image_id, image_of
from ceca.data.store import READERS, Part, Receipt, Store, StoreError
from ceca.errors import UserError

ERASING, COLLECTING = "erase", "gc"  # names that stages wait for: of an erasure, of `ceca.data.garbage`
DOING = {ERASING: "erasing", COLLECTING: "gc"}
KEYS = ("image_id", "caption_id", "key")  # columns that name a row's image; a table's first of them counts
UNTOUCHED = 10  # seconds without a write after which an unfinished file has no writer any more

UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.tmp$")  # names of files that `Store.write_bytes` has not renamed yet

Watch = Callable[[str, int], None]  # called after each object: name of the step, number of objects in the step


class Busy(UserError):
    """A stage works on the dataset."""


@contextlib.contextmanager
def undisturbed(store: Store, holders: Holders, who: str, name: str = ERASING) -> Iterator[Lease]:
    """Keep stages away from the dataset while the context lasts: a stage would write again what it read before.

    Args:
        store: the dataset.
        holders: the holders of names, as seen so far.
        who: this process, as other processes print it (`ceca.data.lease.this_process`).
        name: the name to hold; stages wait until it is free.

    Raises:
        Busy: a stage works on the dataset.
        LeaseError: another process holds the name, or this one has lost it.
    """

    def refuse() -> None:
        # The stages of a pipeline hold names too, so the pipeline's own name does not matter.
        held = {other: by for other, by in holders.of().items() if other != name and not other.startswith("pipeline-")}
        for other, by in sorted(held.items()):
            raise Busy(f"{DOING[name]} waits until {other} ends, which is held by {by}")

    refuse()  # before the lease, so that no stage waits for an erasure that does not begin
    with holding(store, name, who, on_lost=lambda: None, say=lambda _: None) as lease:
        refuse()  # after it too: if a stage starts in this moment, at least one of the two sees the other
        yield lease


def finish(store: Store, *names: str, watch: Watch | None = None, check: Check = unchecked) -> dict[str, int]:
    """Erase the images of these removals in one pass, and record that they are erased.

    Images of all other erasures are erased too. They may have come back since; and if another process erases them now,
    this one must not write them again.

    Args:
        store: the dataset.
        names: names of the removals.
        watch: called after each object.
        check: called before each step; raises an error if stages may have begun meanwhile (`Lease.check`).

    Returns:
        As `erase`.

    Raises:
        StoreError: a removal does not exist, or as in `erase`.
    """
    ids = erased_images(store)
    for name in names:
        record = removal(store, name)
        if record is None:
            raise StoreError(f"no removal {store.place(REMOVED, f'{name}.json')}; name one that is there")
        ids.update(record["images"])
    erased = erase(store, ids, watch, check)
    for name in names:
        check()
        mark_erased(store, name)
    return erased


def erase(
    store: Store, image_ids: Collection[str], watch: Watch | None = None, check: Check = unchecked
) -> dict[str, int]:
    """Erase everything about these images below the dataset's URI, except their ids in removed/.

    Args:
        store: the dataset.
        image_ids: the images.
        watch: called after each object.
        check: called before each step.

    Returns:
        Table → number of rows erased from all its versions, or given their own summaries again; for arrivals/ and
        failed/ the number of objects.

    Raises:
        StoreError: an object cannot be read, so it may hold one of the images; or it cannot be written; or erased
            images come back.
    """
    ids, erased, watch = frozenset(image_ids), Counter[str](), watch or (lambda doing, total: None)
    if not ids:
        return {}
    for again in ("", " again", " again", " again"):  # another process may have written meanwhile
        # Arrivals first, so that few images are added after the search for rows below.
        for name in store.walk():
            folder, _, rest = name.partition("/")
            if folder in (ARRIVALS, FAILED) and waiting_image(rest) in ids:
                check()
                store.remove(name)
                erased[folder] += 1
        counts = {name: rows for name, rows in _count_rows(store, ids, watch, f"erase, look{again}") if rows}
        if not counts and not _unfinished(store, ids):
            break
        erased.update(_erase_objects(store, ids, counts, functools.partial(watch, f"erase{again}"), check))
    else:
        raise StoreError(
            f"what is erased comes back in {store.uri}: stop the stage or service that writes it, try again"
        )
    _remove_unfinished(store)
    return dict(sorted(erased.items()))


def without(rows: pa.Table, ids: Collection[str]) -> pa.Table:
    """The rows that do not belong to these images."""
    column = next((key for key in KEYS if key in rows.column_names), None)
    if column is None or not ids:
        return rows
    rest = rows.filter(pa.array([not _belongs(column, key, ids) for key in rows[column].to_pylist()], pa.bool_()))
    return _with_own_summaries(rest, ids) if SUMMARY_OF.name in rest.column_names else rest


def _with_own_summaries(rows: pa.Table, ids: Collection[str]) -> pa.Table:
    """Give dialogues their own summaries again where the common one was written from those of these images."""
    of = rows[SUMMARY_OF.name].to_pylist()
    drop = pa.array([not set(images or ()).isdisjoint(ids) for images in of], pa.bool_())
    own = rows[OWN_SUMMARY.name]
    columns = {
        "summary": pc.if_else(drop, own, rows["summary"]),
        OWN_SUMMARY.name: pc.if_else(drop, pa.scalar(None, own.type), own),
        SUMMARY_OF.name: pa.array(
            [[] if gone else one for gone, one in zip(drop.to_pylist(), of, strict=True)], SUMMARY_OF.type
        ),
    }
    return pa.table([columns.get(name, rows[name]) for name in rows.column_names], schema=rows.schema)


def leave_out(store: Store, receipts: Iterable[Receipt], image_ids: Collection[str]) -> list[Receipt]:
    """Leave erased images out of what a stage publishes: they were erased after it had read them.

    Parts that hold such images are written again. Their erasure counts as pending again, since it has the old parts to
    remove.

    Args:
        store: the dataset.
        receipts: what the stage has made.
        image_ids: the images whose erasure was requested (`ceca.data.changes.erased_images`).

    Returns:
        The receipts without rows and rejects of these images.
    """
    receipts, ids = list(receipts), frozenset(image_ids)
    if not ids:
        return receipts
    parts = {f"{table}/{part.path}": part for receipt in receipts for table, part in receipt.parts.items()}
    with ThreadPoolExecutor(READERS) as readers:
        keys_of = dict(zip(parts, readers.map(functools.partial(_read_keys, store), parts), strict=True))
    found: dict[str, set[str]] = {}  # part → the images that it holds
    for name, (column, keys, of) in keys_of.items():
        images = {key if column == "image_id" else image_of(key) for key in keys if _belongs(column, key, ids)}
        images |= ids & {image for written_from in of for image in written_from}
        if images:
            found[name] = images
    reopen(store, set().union(*found.values()))
    rest: dict[str, Part | None] = {}
    for name in found:
        part = parts[name]
        rows = _read_rest(store, name, ids, part.sha256)
        table = name.removesuffix(f"/{part.path}")
        rest[name] = Part(**_write_again(store, table, part.path, rows)) if rows.num_rows else None
    return [
        Receipt(
            parts={
                table: kept
                for table, part in receipt.parts.items()
                if (kept := rest.get(f"{table}/{part.path}", part)) is not None
            },
            rejects=tuple(reject for reject in receipt.rejects if not _belongs("key", reject.key, ids)),
            counts=receipt.counts,
        )
        for receipt in receipts
    ]


def _erase_objects(
    store: Store, ids: Collection[str], counts: Mapping[str, int], done: Callable[[int], None], check: Check
) -> Counter[str]:
    """Erase images from the objects that hold rows of them.

    Args:
        store: the dataset.
        ids: the images.
        counts: object → number of its rows that belong to the images.
        done: called after each object with the number of objects.
        check: called before each step.

    Returns:
        Table or folder → number of rows erased.
    """
    erased: Counter[str] = Counter()
    parts: dict[str, set[str]] = defaultdict(set)
    alone = []
    for name in sorted(counts):
        if part := PART.fullmatch(name):
            parts[part["table"]].add(name)
        else:
            alone.append(name)
    # A unit of unfinished work is a slice of the list of images. The list gets shorter, so unfinished work starts over.
    # The table images comes last, so that a second run after a kill removes the work too.
    start_over = bool(parts) or _unfinished(store, ids)
    if start_over:
        check()
        store.remove(WORK)
    for name in alone:
        check()
        _erase_object(store, name, ids)
        erased[name.rpartition("/")[0] if name.startswith(f"{ADDED}/") else name] += counts[name]
        done(len(counts))
    for table in sorted(parts, key=lambda table: (table == "images", table)):
        for _ in _erase_table(store, table, parts[table], ids, check):
            done(len(counts))
        erased[table] += sum(counts[name] for name in parts[table])
    if start_over:
        check()
        store.remove(WORK)
    return erased


def _count_rows(store: Store, ids: Collection[str], watch: Watch, step: str) -> Iterator[tuple[str, int]]:
    """Yield every Parquet object with the number of its rows that belong to these images, or are written from them."""
    names = [name for name in store.walk() if name.endswith(".parquet")]

    def count(name: str) -> int:
        column, keys, of = _read_keys(store, name)
        rows = zip(keys, of or [[]] * len(keys), strict=True)
        return sum(_belongs(column, key, ids) or not set(images).isdisjoint(ids) for key, images in rows)

    with ThreadPoolExecutor(READERS) as readers:
        for name, rows in zip(names, readers.map(count, names), strict=True):
            watch(step, len(names))
            yield name, rows


def _read_keys(store: Store, name: str) -> tuple[str, list[str], list[list[str]]]:
    """Read what names the images of an object's rows; all is empty if it has nothing of the kind, or is gone.

    Returns:
        The name and the values of the column of keys, and of each row the images that its summary was written from,
        if it is an object of common summaries.
    """
    try:
        with store.open(name) as file:
            parquet = pq.ParquetFile(file)
            names = parquet.schema_arrow.names
            column = next((key for key in KEYS if key in names), "")
            if not column:
                return "", [], []
            of = [SUMMARY_OF.name] if SUMMARY_OF.name in names else []
            rows = parquet.read(columns=[column, *of])
            return column, rows[column].to_pylist(), [images or [] for name in of for images in rows[name].to_pylist()]
    except FileNotFoundError:
        return "", [], []


def _belongs(column: str, key: str, ids: Collection[str]) -> bool:
    """Whether a row belongs to one of these images.

    Args:
        column: the column that names the row's image.
        key: the row's value in it. The key of a reject is an image id, a caption id or a path.
        ids: the images.
    """
    if column == "image_id":
        return key in ids
    of_caption = image_of(key) in ids
    return of_caption if column == "caption_id" else of_caption or key in ids or image_id(key) in ids


def _unfinished(store: Store, ids: Collection[str]) -> bool:
    """Whether unfinished work may name one of these images: a receipt's reject does, or there are listed records."""
    if store.names(WORK, LISTING):
        return True
    receipts = (store.read_json(name) or {} for name in store.walk(WORK) if name.endswith(".json"))
    return any(_belongs("key", reject["key"], ids) for receipt in receipts for reject in receipt.get("rejects", ()))


def _read_rest(store: Store, name: str, ids: Collection[str], sha256: str | None = None) -> pa.Table:
    """Read the rows of an object that do not belong to these images.

    Args:
        store: the dataset.
        name: the object.
        ids: the images.
        sha256: the published digest, if there is one.

    Raises:
        StoreError: the content has another digest.
        FileNotFoundError: the object is gone.
    """
    content = store.read_bytes(name)
    if sha256 not in (None, hashlib.sha256(content).hexdigest()):
        # Writing it again would hide the damage.
        raise StoreError(
            f"{store.place(name)} is damaged: its digest is not the published one; remove this object and its "
            "version's manifest, erase again, and run its stage with --redo"
        )
    return without(decode(pa.BufferReader(content)), ids)


def _erase_object(store: Store, name: str, ids: Collection[str]) -> None:
    """Erase images from an object that no manifest names: one of `added`, or an evaluation's figures per caption."""
    try:
        rest = _read_rest(store, name, ids)
    except FileNotFoundError:
        return  # another erasure replaced it, or it was joined with others; the next pass finds its rows
    if not name.startswith(f"{ADDED}/"):
        store.write_bytes(encode(rest), name)
        return
    if rest.num_rows:  # written before the old object is removed: better a row twice than not at all
        write_added(store, name.split("/")[1], rest)
    store.remove(name)


def _erase_table(store: Store, table: str, names: Collection[str], ids: Collection[str], check: Check) -> Iterator[str]:
    """Erase images from parts of a table (`names`: paths below the dataset), and yield each part's path when done."""
    published = {
        part["path"]: part["sha256"]
        for _, manifest in _manifests(store, table)
        for part in manifest["parts"]
        if f"{table}/{part['path']}" in names
    }
    replacements: dict[str, dict[str, Any] | None] = {}
    for path, sha256 in published.items():
        with contextlib.suppress(FileNotFoundError):  # another erasure replaced it; the next pass finds its rows
            check()
            rest = _read_rest(store, f"{table}/{path}", ids, sha256)
            replacements[path] = _write_again(store, table, path, rest) if rest.num_rows else None
        yield f"{table}/{path}"
    while _replace_parts(store, table, replacements, check):
        pass  # another erasure may have written a manifest that it had read before
    for name in sorted(names):
        check()
        store.remove(name)
        if name.removeprefix(f"{table}/") not in published:  # left by work that was killed
            yield name
    _replace_parts(store, table, replacements, check)


def _replace_parts(
    store: Store, table: str, replacements: Mapping[str, dict[str, Any] | None], check: Check = unchecked
) -> bool:
    """Replace or drop parts in all manifests of a table, keeping their order.

    Args:
        store: the dataset.
        table: name of the table.
        replacements: path of an old part → the new part, or None to drop it.
        check: called before each write.

    Returns:
        Whether a manifest named an old part.
    """

    def make(now: bytes | None) -> bytes | None:
        manifest = json.loads(now) if now is not None else {"parts": []}
        if not any(part["path"] in replacements for part in manifest["parts"]):
            return None
        parts = [part for old in manifest["parts"] if (part := replacements.get(old["path"], old)) is not None]
        return as_json({**manifest, "parts": parts, "rows": sum(part["rows"] for part in parts)})

    changed = False
    for name, manifest in _manifests(store, table):
        if any(part["path"] in replacements for part in manifest["parts"]):
            store.replace(make, name, check=check)
            changed = True
    return changed


def _manifests(store: Store, table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the path and content of each manifest of a table, read one by one; the current version's comes last.

    They are read as plain JSON and not as `Manifest`, because tables of other schema versions are erased from too.
    """
    of_version = re.compile(re.escape(f"{table}/") + "[^/]+/" + re.escape(MANIFEST))
    for name in [*filter(of_version.fullmatch, store.walk(table)), f"{table}/{MANIFEST}"]:
        manifest = store.read_json(name)
        if manifest is not None:
            yield name, manifest


def _write_again(store: Store, table: str, path: str, rows: pa.Table) -> dict[str, Any]:
    """Write the rows that stay of a part (`path`: below its table) under a new name.

    Returns:
        The new part, as a manifest describes it.
    """
    content = encode(rows)
    sha256 = hashlib.sha256(content).hexdigest()
    new = rewritten_part_name(path, sha256)
    store.write_bytes(content, table, new)
    return dataclasses.asdict(Part(new, rows.num_rows, len(content), sha256))


def _remove_unfinished(store: Store) -> None:
    """Remove files that killed processes left unfinished: they may hold the images."""
    if not isinstance(store.fs, LocalFileSystem):
        return  # an object store keeps no unfinished objects
    for name in filter(UNFINISHED.search, store.walk()):
        path = store.path(name)
        with contextlib.suppress(FileNotFoundError):  # its writer has finished and renamed it
            while time.time() - os.path.getmtime(path) < UNTOUCHED:
                time.sleep(0.1)
            store.remove(name)
