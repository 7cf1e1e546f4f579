"""A dataset as WebDataset tar files: each image with its captions and all that is known of it."""

from __future__ import annotations

import io
import json
import tarfile
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from ceca.data.changes import erased_images, removed_images
from ceca.data.schema import NOBODY
from ceca.data.store import Manifest, Store

KINDS = {b"\x89PNG": "png", b"RIFF": "webp", b"BM": "bmp"}  # first bytes → ending; anything else is a JPEG


def samples(store: Store, split: str | None = None) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield images as they were read, and what is known of each; without those that were removed from search.

    Args:
        store: the dataset.
        split: only images of this split; None means all.

    Raises:
        StoreError: there are no images, or a table is damaged.
    """
    images = store.current("images", "ingest")
    captions = _texts(store, store.belonging("captions", images), "text")
    summaries = _texts(store, store.manifest("dialogues"), "summary")
    gone = removed_images(store) | erased_images(store)
    for number in range(len(images.parts)):
        for row in store.read_part(images, number).to_pylist():
            key = row["image_id"]
            if key in gone or split not in (None, row["split"]):
                continue
            known = {name: row[name] for name in ("image_id", "split", "camera", "source_path")}
            known["identity"] = None if row["identity"] == NOBODY else row["identity"]
            known |= {"time": row.get("time"), "tracklet": row.get("tracklet")}
            known |= {"captions": captions.get(key, []), "summary": next(iter(summaries.get(key, ())), None)}
            yield row["image"], known


def ending(content: bytes) -> str:
    """The usual ending of the name of an image's file."""
    return next((kind for first, kind in KINDS.items() if content.startswith(first)), "jpg")


def _texts(store: Store, manifest: Manifest | None, column: str) -> dict[str, list[str]]:
    """Texts of each image in a table, which may be missing."""
    found: dict[str, list[str]] = defaultdict(list)
    if manifest is not None and manifest.rows:
        rows = store.read(manifest, ["image_id", column])
        for key, text in zip(rows["image_id"].to_pylist(), rows[column].to_pylist(), strict=True):
            found[key].append(text)
    return found


def write_shards(store: Store, out: Store, *, split: str | None = None, images_per_file: int = 1000) -> Iterator[int]:
    """Write a dataset as tar files `people-000000.tar`, …: <id>.jpg, <id>.json, and <id>.txt with the first caption.

    Args:
        store: the dataset.
        out: where they are written.
        split: only images of this split; None means all.
        images_per_file: images in a file.

    Yields:
        The number of images in each file, once it is written.

    Raises:
        StoreError: as in `samples`, or the files cannot be written.
    """
    number, held = 0, 0
    sink, archive = _begin()
    for content, known in samples(store, split):
        if held == images_per_file:
            yield _end(out, number, held, sink, archive)
            number, held = number + 1, 0
            sink, archive = _begin()
        _add(archive, f"{known['image_id']}.{ending(content)}", content)
        known["time"] = known["time"].isoformat() if known["time"] else None
        _add(archive, f"{known['image_id']}.json", json.dumps(known, ensure_ascii=False).encode())
        if known["captions"]:
            _add(archive, f"{known['image_id']}.txt", known["captions"][0].encode())
        held += 1
    if held:
        yield _end(out, number, held, sink, archive)


def _begin() -> tuple[io.BytesIO, tarfile.TarFile]:
    sink = io.BytesIO()
    return sink, tarfile.open(fileobj=sink, mode="w")


def _end(out: Store, number: int, held: int, sink: io.BytesIO, archive: tarfile.TarFile) -> int:
    archive.close()
    out.write_bytes(sink.getvalue(), f"people-{number:06}.tar")
    return held


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # without time and owner: the same images make the same file
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
