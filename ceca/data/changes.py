"""Changes of single images between publications: removed, waiting to be added, added.

    removed/<name>.json                   ids that no search may return, and whether they are to be erased
    removed/<name>.erased.json            the erasure is complete; nothing but these ids is left
    arrivals/<image id>-<request>.json    acknowledged, not yet searchable: the image and what was said about it
    added/<digest>/<content>.parquet      searchable: images embedded by the model of that digest
    failed/<image id>.json                why an image could not be added

Every change is an object of its own, so two writers lose nothing. Objects in `added` are immutable and named by their
content; the listing is the table.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import io
import re
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ceca.data.names import ADDED, ARRIVALS, FAILED, REMOVED
from ceca.data.parts import decode
from ceca.data.schema import image_id
from ceca.data.store import READERS, Store, StoreError, version_of

ERASED = ".erased.json"


def now() -> str:
    """Current time in UTC, as records write it, e.g. `2024-05-01T12:00:00Z`."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


# --- removed ----------------------------------------------------------------------------------------------


def hide(store: Store, image_ids: Collection[str], erase: bool = False) -> str:
    """Record that no search opened from now on may return these images.

    Args:
        store: the dataset.
        image_ids: the images to hide.
        erase: also request their erasure (`ceca.data.erase.finish`). A later call without it does not withdraw that.

    Returns:
        The record's name.
    """
    ids = sorted(set(image_ids))
    name = version_of(ids)
    before = removal(store, name) or {}
    if erase:
        store.remove(REMOVED, f"{name}{ERASED}")  # another ingest may have added the images again
    erase = erase or bool(before.get("erase"))
    store.write_json({"images": ids, "created": now(), "erase": erase}, REMOVED, f"{name}.json")
    return name


def removed_images(store: Store, names: Sequence[str] | None = None) -> set[str]:
    """Ids of images that no search may return, whatever a gallery still holds.

    Args:
        store: the dataset.
        names: objects below removed/ to consider; None means all.
    """
    listed = store.names(REMOVED) if names is None else names
    records = [name for name in listed if not name.endswith(ERASED)]
    with ThreadPoolExecutor(READERS) as readers:
        return {image for images in readers.map(functools.partial(_images_of, store), records) for image in images}


# (store, record) → its images. A record's name is a digest of its ids, so one read is enough.
_READ: dict[tuple[str, str], tuple[str, ...]] = {}


def _images_of(store: Store, name: str) -> tuple[str, ...]:
    images = _READ.get((store.uri, name))
    if images is None:
        record = removal(store, name.removesuffix(".json"))
        if record is None:
            return ()
        images = _READ[store.uri, name] = tuple(record["images"])
    return images


def removal(store: Store, name: str) -> dict[str, Any] | None:
    """Record of a removal; None if it does not exist."""
    record = store.read_record(REMOVED, f"{name}.json", kind="a removal", fields={"images": list})
    if record is not None and not all(isinstance(image, str) for image in record["images"]):
        place = store.place(REMOVED, f"{name}.json")
        raise StoreError(f"{place} is not a removal, for its ids are no words; remove it")
    return record


def mark_erased(store: Store, name: str) -> None:
    """Record that the images of a removal are erased."""
    store.write_json({"images": [], "erased": now()}, REMOVED, f"{name}{ERASED}")


def reopen(store: Store, image_ids: Collection[str]) -> None:
    """Record that the erasures of these images are not complete, because their rows were written again."""
    for name, images in _erasures(store, store.names(REMOVED)).items() if image_ids else ():
        if not set(image_ids).isdisjoint(images):
            store.remove(REMOVED, f"{name}{ERASED}")


def pending_erasures(store: Store) -> list[str]:
    """Names of the removals whose erasure was requested and is not complete."""
    listed = set(store.names(REMOVED))
    return sorted(_erasures(store, {name for name in listed if name.replace(".json", ERASED) not in listed}))


def erased_images(store: Store) -> set[str]:
    """Ids of all images whose erasure was ever requested."""
    return {image for images in _erasures(store, store.names(REMOVED)).values() for image in images}


def _erasures(store: Store, objects: Collection[str]) -> dict[str, list[str]]:
    """Removals among these objects that request erasure: name → ids of the images."""
    names = [name for name in objects if not name.endswith(ERASED)]
    with ThreadPoolExecutor(READERS) as readers:
        records = list(readers.map(lambda name: removal(store, name.removesuffix(".json")) or {}, names))
    return {
        name.removesuffix(".json"): record["images"]
        for name, record in zip(names, records, strict=True)
        if record.get("erase")
    }


# --- waiting to be added ----------------------------------------------------------------------------------


def arrival_id(content: bytes) -> str:
    """Id of an image added alone, derived from its bytes: the same image is added once."""
    return image_id(f"added/{hashlib.sha256(content).hexdigest()}")


def write_arrival(store: Store, content: bytes, size: tuple[int, int], said: Mapping[str, Any]) -> str:
    """Acknowledge an image.

    Args:
        store: the dataset.
        content: the encoded image.
        size: its width and height in pixels.
        said: `identity`, `camera`, `time` (ISO 8601), `source_path` and `summary`, if known.

    Returns:
        The image's id.
    """
    key = arrival_id(content)
    image = {"image": base64.b64encode(content).decode(), "width": size[0], "height": size[1]}
    store.remove(FAILED, f"{key}.json")
    # An object per request: finishing an earlier request does not remove a later one.
    store.write_json({"image_id": key, **said, **image}, ARRIVALS, f"{key}-{uuid.uuid4().hex}.json")
    return key


def read_arrival(store: Store, name: str) -> dict[str, Any] | None:
    """An acknowledged image; None if it was taken meanwhile.

    Raises:
        StoreError: the object is no such record.
    """
    fields = {"image_id": str, "image": str, "width": int, "height": int, "source_path": str, "summary": str}
    return store.read_record(ARRIVALS, name, kind="an image to be added", fields=fields)


def waiting_image(name: str) -> str:
    """Image id in the name of an object of `arrivals` or `failed`."""
    return re.sub(r"(-[0-9a-f]{32})?\.json$", "", name)


def waiting_images(store: Store) -> list[str]:
    """Ids of acknowledged images that are not searchable yet, with repetitions."""
    return [waiting_image(name) for name in store.names(ARRIVALS)]


def unadded_images(store: Store) -> set[str]:
    """Ids of images that wait to be added, or could not be added."""
    return {waiting_image(name) for folder in (ARRIVALS, FAILED) for name in store.names(folder)}


def mentioned_images(store: Store) -> set[str]:
    """Ids of images that were removed, wait to be added, or could not be added."""
    return unadded_images(store) | removed_images(store)


# --- added ------------------------------------------------------------------------------------------------


def write_added(store: Store, digest: str, rows: pa.Table) -> str:
    """Write one object of `added`, named by its content.

    Args:
        store: the dataset.
        digest: the model that embedded the rows.
        rows: schema `ceca.data.schema.added`.

    Returns:
        The object's name.
    """
    sink = io.BytesIO()
    pq.write_table(rows, sink, row_group_size=1, compression="ZSTD")  # pictures are read one at a time
    content = sink.getvalue()
    name = f"{hashlib.sha256(content).hexdigest()[:16]}.parquet"
    store.write_bytes(content, ADDED, digest, name)
    return name


def added_objects(store: Store, digest: str) -> tuple[str, ...]:
    """Names of the objects of images that a model embedded one by one.

    Raises:
        StoreError: something else is among them.
    """
    names = tuple(store.names(ADDED, digest))
    for name in names:
        if not re.fullmatch(r"[0-9a-f]{16}\.parquet", name):
            raise StoreError(
                f"{store.place(ADDED, digest, name)} is no object of added images, whose names are 16 hex digits and "
                ".parquet; remove it"
            )
    return names


def read_added(store: Store, digest: str, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Rows of one object of `added`.

    Raises:
        FileNotFoundError: another object has replaced it.
    """
    if columns is None:
        return decode(io.BytesIO(store.read_bytes(ADDED, digest, name)))
    with store.open(ADDED, digest, name) as file:  # only these columns: images are most of the bytes
        return decode(file, columns)


def added_images(store: Store) -> dict[str, int]:
    """Images added one by one, by any model: image id → identity."""

    def read(name: str) -> dict[str, list[Any]]:
        with store.open(name) as file:
            return decode(file, ["image_id", "identity"]).to_pydict()

    for _ in range(100):
        names = [name for name in store.walk(ADDED) if name.endswith(".parquet")]
        with ThreadPoolExecutor(READERS) as readers, contextlib.suppress(FileNotFoundError):
            tables = list(readers.map(read, names))
            return {key: who for rows in tables for key, who in zip(rows["image_id"], rows["identity"], strict=True)}
        # An object was replaced while it was read, so list the objects again.
    raise StoreError(f"{store.place(ADDED)} changes all the time; stop the service that writes it and try again")
