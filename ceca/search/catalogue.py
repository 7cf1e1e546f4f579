"""Catalogue of an edition: pictures, dialogues and facets of its images, looked up by image id.

Ids are kept as 64-bit numbers and texts as Arrow columns, so a million images take hundreds of megabytes instead of
gigabytes.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import threading
from collections import OrderedDict

import numpy as np
import pyarrow as pa

from ceca.data.changes import read_added
from ceca.data.store import StoreError
from ceca.datasets.images import mime_type
from ceca.search.edition import Edition
from ceca.search.facets import Facets, open_facets

CACHE_BYTES = 64 * 1024 * 1024  # encoded pictures kept in memory per process: a few thousand pedestrian crops


@dataclasses.dataclass(frozen=True)
class Picture:
    """An unchanged image: encoded bytes, media type, and an HTTP entity tag made from the bytes."""

    content: bytes
    media_type: str
    etag: str


@dataclasses.dataclass(frozen=True)
class Told:
    """A dialogue about an image: its turns (question, answer) and its summary."""

    turns: list[tuple[str, str]]
    summary: str


class Index:
    """Finds row numbers by image id.

    Args:
        ids: the image id of each row, 16 hex digits each. If an id is repeated, its first row counts.
    """

    def __init__(self, ids: pa.ChunkedArray | list[str]):
        numbers = np.array([int(image_id, 16) for image_id in _listed(ids)], dtype=np.uint64)
        self.order = np.argsort(numbers, kind="stable")
        self.sorted = numbers[self.order]

    def __len__(self) -> int:
        return len(self.sorted)

    def row(self, image_id: str) -> int | None:
        """Row number of an image; None if it is not there."""
        number = np.uint64(int(image_id, 16))
        place = int(np.searchsorted(self.sorted, number))
        return int(self.order[place]) if place < len(self.sorted) and self.sorted[place] == number else None


def _listed(ids: pa.ChunkedArray | list[str]) -> list[str]:
    return ids if isinstance(ids, list) else ids.to_pylist()


class Catalogue:
    """Pictures, dialogues and facets of exactly the images that an edition can find.

    Methods block, and they may run in threads. `ids` are the images' ids, sorted.
    """

    def __init__(self, edition: Edition):
        self.edition = edition
        store = self.store = edition.store
        self.images = edition.manifest("images")
        added = edition.read_added(["image_id"])
        added_ids = [image_id for table in added for image_id in table["image_id"].to_pylist()]
        indexed_ids = store.read(edition.manifest("gallery"), ["image_id"])["image_id"].to_pylist()
        self.ids = sorted({*indexed_ids, *added_ids} - edition.removed_ids)
        self.known = Index(self.ids)
        # Pictures are in the rows of the images table, followed by the rows of each object of `added`.
        stored_ids = store.read(self.images, ["image_id"])["image_id"].to_pylist()
        sizes = [*(part.rows for part in self.images.parts), *map(len, added)]
        self.starts = np.cumsum([0, *sizes])  # first row of each part and object
        self.pictured = Index(stored_ids + added_ids)
        dialogues = edition.told()
        columns = ["image_id", "turns", "summary"]
        tables = [store.read(dialogues, columns)] if dialogues else []
        self.dialogues = pa.concat_tables([*tables, *edition.read_added(columns)]) if tables or added else None
        self.described = Index(self.dialogues["image_id"] if self.dialogues else [])
        self._cache: OrderedDict[str, Picture] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    @functools.cached_property
    def facets(self) -> Facets:
        """Facets of the images, in the order of `ids`."""
        return open_facets(self.edition, self.ids)

    def __contains__(self, image_id: str) -> bool:
        return self.known.row(image_id) is not None

    def __len__(self) -> int:
        return len(self.ids)

    @functools.cached_property
    def _paths(self) -> pa.ChunkedArray:
        """Source path of each picture, in the order of `pictured`."""
        stored = self.store.read(self.images, ["source_path"])
        return pa.concat_tables([stored, *self.edition.read_added(["source_path"])])["source_path"]

    def source_path(self, image_id: str) -> str | None:
        """Path of an image in its source; None if the edition does not have the image."""
        row = self.pictured.row(image_id) if image_id in self else None
        return None if row is None else self._paths[row].as_py()

    def summary(self, image_id: str) -> str | None:
        """Summary of an image; None if it has no dialogue."""
        row = self.described.row(image_id)
        return None if row is None or self.dialogues is None else self.dialogues["summary"][row].as_py()

    def told(self, image_id: str) -> Told | None:
        """Dialogue about an image; None if there is none."""
        row = self.described.row(image_id)
        if row is None or self.dialogues is None:
            return None
        turns = self.dialogues["turns"][row].as_py() or []
        return Told([(turn["question"], turn["answer"]) for turn in turns], self.dialogues["summary"][row].as_py())

    def cached(self, image_id: str) -> Picture | None:
        """Picture of an image if it is in memory, else None. Does not read the store."""
        with self._lock:
            picture = self._cache.get(image_id)
            if picture is not None:
                self._cache.move_to_end(image_id)
            return picture

    def picture(self, image_id: str) -> Picture | None:
        """Picture of an image; None if the edition does not have the image.

        Raises:
            StoreError: the picture cannot be read.
        """
        picture = self.cached(image_id)
        row = self.pictured.row(image_id) if image_id in self else None
        if picture is not None or row is None:
            return picture
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        row_in_part = row - int(self.starts[part])
        try:
            if part < len(self.images.parts):
                content = self.store.take(self.images, [(part, row_in_part)], ["image"])["image"][0].as_py()
            else:
                name = self.edition.added[part - len(self.images.parts)]
                content = read_added(self.store, self.edition.digest, name, ["image"])["image"][row_in_part].as_py()
        except FileNotFoundError:
            raise StoreError(f"a part of {self.store.place('images')} that holds {image_id} is gone") from None
        picture = Picture(content, mime_type(content), f'"{hashlib.sha256(content).hexdigest()[:32]}"')
        self._keep(image_id, picture)
        return picture

    def _keep(self, image_id: str, picture: Picture) -> None:
        """Keep a picture in memory, and drop the ones that were not used for longest."""
        with self._lock:
            if image_id in self._cache:
                return
            self._cache[image_id] = picture
            self._cached_bytes += len(picture.content)
            while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
                _, oldest = self._cache.popitem(last=False)
                self._cached_bytes -= len(oldest.content)
