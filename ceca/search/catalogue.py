"""Catalogue of an edition: pictures, dialogues and facets of its images, looked up by image id.

Kept in memory are ids as numbers, the rows that they have in the tables, and facets as codes: tens of megabytes for a
million images. Texts and pictures are read when they are asked for, and the last ones are kept.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from ceca.data.parts import ROW_GROUP
from ceca.data.store import StoreError, in_order
from ceca.datasets.images import mime_type
from ceca.search.columns import Columns, open_columns
from ceca.search.edition import Edition
from ceca.search.facets import FACETS, Facets, facets_of
from ceca.search.sources import list_sources

CACHE_BYTES = 64 * 1024 * 1024  # encoded pictures kept in memory per process: a few thousand pedestrian crops
TEXT_BYTES = 64 * 1024 * 1024  # texts kept in memory per process: those of some 100,000 images

V = TypeVar("V")


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


class Recent(Generic[V]):
    """Keeps values up to a number of bytes, and drops the ones that were not used for longest. For several threads.

    Args:
        limit: bytes; the last value is kept in any case.
    """

    def __init__(self, limit: int):
        self.limit, self.bytes = limit, 0
        self.values: OrderedDict[object, tuple[V, int]] = OrderedDict()
        self.lock = threading.Lock()

    def get(self, key: object) -> V | None:
        with self.lock:
            if key not in self.values:
                return None
            self.values.move_to_end(key)
            return self.values[key][0]

    def keep(self, key: object, value: V, size: int) -> None:
        with self.lock:
            if key in self.values:
                return
            self.values[key] = value, size
            self.bytes += size
            while self.bytes > self.limit and len(self.values) > 1:
                self.bytes -= self.values.popitem(last=False)[1][1]

    def items(self) -> list[tuple[object, V, int]]:
        with self.lock:
            return [(key, value, size) for key, (value, size) in self.values.items()]


class Catalogue:
    """Pictures, dialogues and facets of exactly the images that an edition can find.

    Methods block, and they may run in threads. `ids` are the images' ids as numbers, sorted.

    Args:
        edition: the edition.
        before: the catalogue of an earlier edition: only what is new is read.

    Raises:
        StoreError: a table of the edition is gone.
        FileNotFoundError: an object of `added`, or a part, was replaced in the meantime. Methods raise it too.
    """

    columns: dict[str, Columns]

    def __init__(self, edition: Edition, before: Catalogue | None = None):
        self.edition = edition
        self.images = edition.manifest("images")
        self.sources = {table: list_sources(edition, table) for table in FACETS}
        self.columns = {
            table: open_columns(edition, table, self.sources[table], names, before.columns[table] if before else None)
            for table, names in FACETS.items()
        }
        ids = self.columns["gallery"].index.unique()
        self.ids = ids[~edition.is_removed(ids)]
        self._pictures: Recent[Picture] = Recent(CACHE_BYTES)
        self._texts: Recent[pa.Table] = Recent(TEXT_BYTES)
        current = {*self.columns["dialogues"].digests, *self.columns["images"].digests}
        for key, texts, size in before._texts.items() if before else ():
            if isinstance(key, tuple) and key[0] in current:  # else it may hold what was erased
                self._texts.keep(key, texts, size)

    @functools.cached_property
    def facets(self) -> Facets:
        """Facets of the images, in the order of `ids`."""
        return facets_of(self.ids, list(self.columns.values()))

    def positions(self, ids: Sequence[str]) -> np.ndarray:
        """Positions of images in `ids`: [N] int64, -1 for an image that the edition does not have."""
        wanted = np.array([int(image_id, 16) for image_id in ids], np.uint64)
        places = np.searchsorted(self.ids, wanted)
        inside = places < len(self.ids)
        found = inside & (self.ids[np.where(inside, places, 0)] == wanted) if len(self.ids) else inside
        return np.where(found, places, -1)

    def __contains__(self, image_id: str) -> bool:
        return bool(self.positions([image_id])[0] >= 0)

    def __len__(self) -> int:
        return len(self.ids)

    def _picture_row(self, image_id: str) -> int | None:
        return self.columns["images"].index.of(image_id) if image_id in self else None

    def _take(self, table: str, row: int, column: str) -> Any:
        """One value of a table."""
        source, inside = self.columns[table].place(row)
        return self.sources[table][source].take([inside], [column])[column][0].as_py()

    # --- texts --------------------------------------------------------------------------------------------

    def source_paths(self, ids: Sequence[str]) -> list[str | None]:
        """Path of each image in its source; None if the edition does not have the image."""
        known = [image_id in self for image_id in ids]
        rows = self._read_texts("images", ids, ("source_path",))
        return [row["source_path"] if row and is_known else None for row, is_known in zip(rows, known, strict=True)]

    def summary(self, image_id: str) -> str | None:
        """Summary of an image; None if it has no dialogue."""
        return self.summaries([image_id])[0]

    def summaries(self, ids: Sequence[str]) -> list[str | None]:
        """Summary of each image; None if it has no dialogue."""
        return [None if row is None else row["summary"] for row in self._read_texts("dialogues", ids, ("summary",))]

    def told(self, ids: Sequence[str]) -> list[Told | None]:
        """Dialogue about each image; None if there is none."""
        return [
            None
            if row is None
            else Told([(turn["question"], turn["answer"]) for turn in row["turns"] or ()], row["summary"])
            for row in self._read_texts("dialogues", ids, ("turns", "summary"))
        ]

    def _read_texts(self, table: str, ids: Sequence[str], columns: tuple[str, ...]) -> list[dict[str, Any] | None]:
        """Columns of each image's row of a table. Whole row groups are read, side by side, and kept."""
        held, sources = self.columns[table], self.sources[table]
        rows = held.index.find(np.array([int(image_id, 16) for image_id in ids], np.uint64)).tolist()
        places = [None if row < 0 else held.place(row) for row in rows]

        def read(group: tuple[int, int]) -> pa.Table:
            source, start = group
            key = held.digests[source], start, columns
            texts = self._texts.get(key)
            if texts is None:
                end = min(start + ROW_GROUP, int(held.starts[source + 1] - held.starts[source]))
                texts = sources[source].take(range(start, end), list(columns))
                self._texts.keep(key, texts, texts.nbytes)
            return texts

        wanted = list({(place[0], place[1] // ROW_GROUP * ROW_GROUP): None for place in places if place})
        tables = dict(zip(wanted, in_order(read, wanted), strict=True))
        return [
            None
            if place is None
            else tables[place[0], place[1] // ROW_GROUP * ROW_GROUP].slice(place[1] % ROW_GROUP, 1).to_pylist()[0]
            for place in places
        ]

    # --- pictures -----------------------------------------------------------------------------------------

    def cached(self, image_id: str) -> Picture | None:
        """Picture of an image if it is in memory, else None. Does not read the store."""
        return self._pictures.get(image_id)

    def picture(self, image_id: str) -> Picture | None:
        """Picture of an image; None if the edition does not have the image.

        Raises:
            StoreError: the picture cannot be read.
        """
        picture = self.cached(image_id)
        row = self._picture_row(image_id)
        if picture is not None or row is None:
            return picture
        try:
            content = self._take("images", row, "image")
        except FileNotFoundError:
            place = self.edition.store.place("images")
            raise StoreError(f"a part of {place} that holds {image_id} is gone") from None
        picture = Picture(content, mime_type(content), f'"{hashlib.sha256(content).hexdigest()[:32]}"')
        self._pictures.keep(image_id, picture, len(content))
        return picture
