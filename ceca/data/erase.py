"""Erasing: nothing below a dataset's URI holds images that were removed, in any version of any table.

It is the one exception to "nothing published is changed in place". A part that holds such an image is written again
without it under another name, then the manifests that name the old part name the new one, and when none names the old
part any more it is removed. Versions keep their names. Killed at any moment nothing else is lost, and the same call
finishes; so does another erasure at the same time. Callers keep stages away meanwhile (`undisturbed`).
Which images are to be erased is recorded in removed/ (`ceca.data.changes`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from ceca.data.changes import READERS, erased_images, mark_erased, removal, waiting_image, write_added
from ceca.data.lease import Holders, holding
from ceca.data.names import ADDED, ARRIVALS, FAILED, MANIFEST, PART, REMOVED, WORK, rewritten_part_name
from ceca.data.schema import image_id, image_of
from ceca.data.store import Part, Store, StoreError, encode
from ceca.errors import UserError

ERASING = "erase"  # the name that is held by who erases, and for which stages wait
KEYS = ("image_id", "caption_id", "key")  # columns that say whose a row is, the first that a table has; key: of rejects
UNTOUCHED = 10  # seconds without a write, after which nobody writes a file aside any more

ASIDE = re.compile(r"\.[0-9a-f]{32}\.tmp$")

Watch = Callable[[str, int], None]  # called after each object with what is done, and how many objects that concerns


class Busy(UserError):
    """A stage works on the dataset."""


@contextlib.contextmanager
def undisturbed(store: Store, holders: Holders, who: str) -> Iterator[None]:
    """While it lasts no stage works on the dataset: what it has read before, it would write again.

    Raises:
        Busy: one does. LeaseError: somebody else erases.
    """

    def refuse() -> None:
        # A pipeline's stages hold names of their own.
        held = {name: by for name, by in holders.of().items() if name != ERASING and not name.startswith("pipeline-")}
        for name, by in sorted(held.items()):
            raise Busy(f"erasing waits until {name} ends, which is held by {by}")

    refuse()  # first, so that no stage waits for an erasure that does not begin
    with holding(store, ERASING, who, on_lost=lambda: None, say=lambda _: None):
        refuse()  # of a stage that begins in this moment and this, at least one sees the other
        yield


def finish(store: Store, *names: str, watch: Watch | None = None) -> dict[str, int]:
    """Erase the images of these removals, all in one pass, and record that; returns rows erased by table.

    Those of all other erasures go too where they are met: they may have come back, and another process that erases them
    now must not get back from here what it has just erased.

    Raises:
        StoreError: there is no such removal, or as in `erase`.
    """
    ids = erased_images(store)
    for name in names:
        record = removal(store, name)
        if record is None:
            raise StoreError(f"no removal {store.place(REMOVED, f'{name}.json')}; name one that is there")
        ids.update(record["images"])
    erased = erase(store, ids, watch)
    for name in names:
        mark_erased(store, name)
    return erased

    # One was replaced meanwhile: look again.


def erase(store: Store, image_ids: Collection[str], watch: Watch | None = None) -> dict[str, int]:
    """Erase all there is of these images below the dataset's URI but the removals' own ids.

    Returns:
        Rows erased by table, over its versions; objects, of the folders that hold one an image.

    Raises:
        StoreError: an object cannot be read, so that nobody knows whether it holds one of them, or not be written, or
            what is erased comes back.
    """
    ids, erased, watch = frozenset(image_ids), Counter[str](), watch or (lambda doing, total: None)
    if not ids:
        return {}
    for again in ("", " again", " again", " again"):  # something may have been written meanwhile
        # What is to be added goes first, so that as little as can be is added after the look.
        for name in store.walk():
            folder, _, rest = name.partition("/")
            if folder in (ARRIVALS, FAILED) and waiting_image(rest) in ids:
                store.remove(name)
                erased[folder] += 1
        held = {name: rows for name, rows in _look(store, ids, watch, f"erase, look{again}") if rows}
        if not held and not _rejected(store, ids):
            break
        erased.update(_erase_held(store, ids, held, watch, f"erase{again}"))
    else:
        raise StoreError(
            f"what is erased comes back in {store.uri}: stop the stage or service that writes it, try again"
        )
    _remove_aside(store)
    return dict(sorted(erased.items()))


def _erase_held(store: Store, ids: Collection[str], held: Mapping[str, int], watch: Watch, doing: str) -> Counter[str]:
    """Erase from the objects that hold so many rows of these images."""
    erased: Counter[str] = Counter()
    parts: dict[str, set[str]] = defaultdict(set)
    alone = []
    for name in sorted(held):
        if found := PART.fullmatch(name):
            parts[found["table"]].add(name)
        else:
            alone.append(name)
    # A unit of unfinished work is a slice of the list of images, which gets shorter: all of it begins anew. The table
    # images comes last, so that a second run after a kill knows that too.
    anew = bool(parts) or _rejected(store, ids)
    if anew:
        store.remove(WORK)
    for name in alone:
        _erase_object(store, name, ids)
        erased[name.rpartition("/")[0] if name.startswith(f"{ADDED}/") else name] += held[name]
        watch(doing, len(held))
    for table in sorted(parts, key=lambda table: (table == "images", table)):
        for _ in _erase_table(store, table, parts[table], ids):
            watch(doing, len(held))
        erased[table] += sum(held[name] for name in parts[table])
    if anew:
        store.remove(WORK)
    return erased


def _look(store: Store, ids: Collection[str], watch: Watch, doing: str) -> Iterator[tuple[str, int]]:
    """Every Parquet object, and how many rows of these images it holds."""
    names = [name for name in store.walk() if name.endswith(".parquet")]

    def look(name: str) -> int:
        column, keys = _keys(store, name)
        return sum(_is_of(column, key, ids) for key in keys)

    with ThreadPoolExecutor(READERS) as readers:
        for name, rows in zip(names, readers.map(look, names), strict=True):
            watch(doing, len(names))
            yield name, rows


def _keys(store: Store, name: str) -> tuple[str, list[str]]:
    """The column that says whose a row is, and what it holds; nothing where no column does or the object is gone."""
    try:
        with store.open(name) as file:
            parquet = pq.ParquetFile(file)
            column = next((key for key in KEYS if key in parquet.schema_arrow.names), "")
            return column, parquet.read(columns=[column])[column].to_pylist() if column else []
    except FileNotFoundError:
        return "", []


def _is_of(column: str, key: str, ids: Collection[str]) -> bool:
    """Whether a row is of one of these images. The key of a reject is an image's, a caption's or a path."""
    if column == "image_id":
        return key in ids
    of_caption = image_of(key) in ids
    return of_caption if column == "caption_id" else of_caption or key in ids or image_id(key) in ids


def _rejected(store: Store, ids: Collection[str]) -> bool:
    """Whether unfinished work has met one of these images and could not use it."""
    receipts = (store.read_json(name) or {} for name in store.walk(WORK) if name.endswith(".json"))
    return any(_is_of("key", reject["key"], ids) for found in receipts for reject in found.get("rejects", ()))


def _rest(store: Store, name: str, ids: Collection[str], sha256: str | None = None) -> pa.Table:
    """The rows of an object that stay.

    Raises:
        StoreError: it has another digest than it should.
    """
    content = store.read_bytes(name)
    if sha256 not in (None, hashlib.sha256(content).hexdigest()):
        # Written again it would look whole.
        raise StoreError(
            f"{store.place(name)} is damaged: its digest is not the published one; remove this object and its "
            "version's manifest, erase again, and run its stage with --redo"
        )
    rows = pq.read_table(pa.BufferReader(content))
    column = next(key for key in KEYS if key in rows.column_names)
    return rows.filter(pa.array([not _is_of(column, key, ids) for key in rows[column].to_pylist()], pa.bool_()))


def _erase_object(store: Store, name: str, ids: Collection[str]) -> None:
    """Erase from an object that no manifest names: an object of `added`, or the figures of an evaluation's captions."""
    try:
        rest = _rest(store, name, ids)
    except FileNotFoundError:
        return  # another erasure was here, or it was joined with others: the next look tells
    if not name.startswith(f"{ADDED}/"):
        store.write_bytes(encode(rest), name)
        return
    if rest.num_rows:  # for a moment both are there: better a row twice than not at all
        write_added(store, name.split("/")[1], rest)
    store.remove(name)


def _erase_table(store: Store, table: str, names: Collection[str], ids: Collection[str]) -> Iterator[str]:
    """Erase from these parts of a table; yields each of them on the way."""
    published = {
        part["path"]: part["sha256"]
        for _, manifest in _manifests(store, table)
        for part in manifest["parts"]
        if f"{table}/{part['path']}" in names
    }
    instead: dict[str, dict[str, Any] | None] = {}
    for path, sha256 in published.items():
        with contextlib.suppress(FileNotFoundError):  # another erasure was here: the next look tells
            rest = _rest(store, f"{table}/{path}", ids, sha256)
            instead[path] = _write_again(store, table, path, rest) if rest.num_rows else None
        yield f"{table}/{path}"
    while _name_instead(store, table, instead):
        pass  # until nobody else has written what it read before
    for name in sorted(names):
        store.remove(name)
        if name.removeprefix(f"{table}/") not in published:  # left by work that was killed
            yield name

    _name_instead(store, table, instead)


def _name_instead(store: Store, table: str, instead: Mapping[str, dict[str, Any] | None]) -> bool:
    """Have a table's manifests name other parts, or none, in the same order. Returns whether one named an old one."""
    changed = False
    for name, manifest in _manifests(store, table):
        if any(part["path"] in instead for part in manifest["parts"]):
            parts = [part for old in manifest["parts"] if (part := instead.get(old["path"], old)) is not None]
            store.write_json({**manifest, "parts": parts, "rows": sum(part["rows"] for part in parts)}, name)
            changed = True
    return changed


def _manifests(store: Store, table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """A table's manifests with their paths, each read when it is its turn: the current one last, as it is published.

    They are read as they are and not as `Manifest`: an older program's tables are erased from too.
    """
    of_version = re.compile(re.escape(f"{table}/") + "[^/]+/" + re.escape(MANIFEST))
    for name in [*filter(of_version.fullmatch, store.walk(table)), f"{table}/{MANIFEST}"]:
        manifest = store.read_json(name)
        if manifest is not None:
            yield name, manifest


def _write_again(store: Store, table: str, path: str, rows: pa.Table) -> dict[str, Any]:
    """Write what is left of a part under its name and the digest of what is left, as a manifest describes it."""
    content = encode(rows)
    sha256 = hashlib.sha256(content).hexdigest()
    old = PART.fullmatch(f"{table}/{path}")
    assert old is not None
    new = rewritten_part_name(old["version"], old["stem"], sha256)
    store.write_bytes(content, table, new)
    return dataclasses.asdict(Part(new, rows.num_rows, len(content), sha256))


def _remove_aside(store: Store) -> None:
    """Remove what killed processes were writing aside: nobody can tell whose it is."""
    if not isinstance(store.fs, LocalFileSystem):
        return  # there, a write leaves nothing under a name
    for name in filter(ASIDE.search, store.walk()):
        path = store.path(name)
        with contextlib.suppress(FileNotFoundError):  # it was finished
            while time.time() - os.path.getmtime(path) < UNTOUCHED:
                time.sleep(0.1)
            store.remove(name)
