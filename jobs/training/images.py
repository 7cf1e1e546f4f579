"""The encoded images of a training: in Ray's object store if they fit there, else in files of each machine.

Any sample is read in place, without a copy. The object store holds a part once for all machines. A training set that is
larger than that is kept as files below `CECA_CACHE`: a machine reads each part from the dataset once, when a sample of
it is needed for the first time, and the operating system keeps in memory what there is room for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import operator
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import ray
from filelock import FileLock

from ceca.data.files import writing
from ceca.data.store import Manifest, Store, StoreError, in_order, version_of
from ceca.environment import cache_folder
from jobs.runtime.console import console

FITS = 0.5  # share of the object stores that encoded images may take; the stream of batches needs the rest
TASK_BYTES = 64 * 2**20  # of images that one task fetches, or one part: a process costs more than a small read
OPEN = 256  # files that a process has open
KEPT_DAYS = 2  # files of a run that nobody used for so long are removed
FILES = "training"  # folder of the files below CECA_CACHE


class ImagePart(NamedTuple):
    """A part of a dataset's images table."""

    uri: str
    table: Manifest
    number: int

    def read(self) -> pa.Table:
        """Its encoded images."""
        return Store(self.uri).read_part(self.table, self.number, ["image"])


def parts_of(tables: Sequence[tuple[str, Manifest]]) -> list[ImagePart]:
    """The parts of the images tables of several datasets, one dataset after the other.

    Args:
        tables: URI and images table of each.
    """
    return [ImagePart(uri, table, number) for uri, table in tables for number in range(len(table.parts))]


class EncodedImages(Protocol):
    """Encoded images by part and row. It is sent to workers before it has read anything."""

    def read(self, parts: Sequence[int], rows: Sequence[int]) -> list[bytes]:
        """Encoded images at these places."""


@dataclasses.dataclass(frozen=True)
class InMemory:
    """Encoded images in Ray's object store.

    Args:
        references: part → reference to its column of encoded images.
    """

    references: dict[int, Any]
    columns: dict[int, pa.ChunkedArray] = dataclasses.field(default_factory=dict)

    def read(self, parts: Sequence[int], rows: Sequence[int]) -> list[bytes]:
        for part in parts:
            if part not in self.columns:
                self.columns[part] = ray.get(self.references[part])["image"]
        return [self.columns[part][row].as_py() for part, row in zip(parts, rows, strict=True)]


@dataclasses.dataclass(frozen=True)
class InFiles:
    """Encoded images in files of this machine, mapped into memory.

    Args:
        uri: the dataset of the training.
        run: the training, which alone uses these files.
        parts: the parts by number.
    """

    uri: str
    run: str
    parts: Mapping[int, ImagePart]
    columns: dict[int, pa.ChunkedArray] = dataclasses.field(default_factory=dict)

    def read(self, parts: Sequence[int], rows: Sequence[int]) -> list[bytes]:
        new = [part for part in dict.fromkeys(parts) if part not in self.columns]
        self.columns.update(zip(new, in_order(self._open, new), strict=True))
        images = [self.columns[part][row].as_py() for part, row in zip(parts, rows, strict=True)]
        while len(self.columns) > OPEN:
            self.columns.pop(next(iter(self.columns)))
        return images

    @property
    def folder(self) -> Path:
        """The files of this training on this machine."""
        return cache_folder(FILES, version_of([self.uri, self.run]))

    def _open(self, part: int) -> pa.ChunkedArray:
        stored = self.parts[part]
        path = self.folder / f"{stored.table.parts[stored.number].sha256}.arrow"
        if not path.exists():
            self._fetch(part, path)
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()["image"]

    def _fetch(self, part: int, path: Path) -> None:
        try:
            with FileLock(path.with_suffix(".lock")):  # one process of this machine reads it for all
                if path.exists():
                    return
                table = self.parts[part].read()
                with writing(path) as file, pa.ipc.new_file(file, table.schema) as writer:
                    writer.write_table(table)
        except OSError as error:
            message = f"cannot write {path} ({error}); set CECA_CACHE to a folder with room for all training images"
            raise StoreError(message) from error

    def remove(self) -> None:
        """Remove the files from this machine."""
        shutil.rmtree(self.folder, ignore_errors=True)


@ray.remote(num_cpus=0.5, max_retries=-1)  # on a full disk workers die until there is room again
def _load_parts(parts: Sequence[ImagePart]) -> tuple[pa.Table, ...] | pa.Table:
    loaded = tuple(part.read() for part in parts)
    return loaded if len(loaded) > 1 else loaded[0]  # as `num_returns` wants it


def hold_images(
    store: Store, tables: Sequence[tuple[str, Manifest]], parts: Collection[int], run: str, machines: dict[str, str]
) -> EncodedImages:
    """Encoded images for the workers of a training. Where they fit, Ray tasks begin to fetch them.

    Args:
        store: the dataset of the training.
        tables: URI and images table of each dataset that it reads.
        parts: numbers of the parts that are needed, counted through the tables.
        run: the training's folder below the dataset.
        machines: label selector of the machines that fetch them and hold them in memory.
    """
    stored = {part: found for part, found in enumerate(parts_of(tables)) if part in parts}
    needed = sum(table.parts[number].bytes for _, table, number in stored.values())
    room = FITS * ray.cluster_resources().get("object_store_memory", 0)
    if needed > room:
        console.print(
            f"train: {needed / 1e9:,.1f} GB of images, and Ray's object stores have room for {room / 1e9:,.1f}: "
            "each machine keeps them in files (CECA_CACHE)"
        )
        return InFiles(store.uri, run, stored)
    references: dict[int, Any] = {}
    bytes_before = np.cumsum([0, *(found.table.parts[found.number].bytes for found in stored.values())])[:-1]
    for _, group in itertools.groupby(zip(stored, bytes_before // TASK_BYTES, strict=True), key=operator.itemgetter(1)):
        numbers = [part for part, _ in group]
        fetch = _load_parts.options(label_selector=machines, num_returns=len(numbers))
        fetched = fetch.remote([stored[part] for part in numbers])
        references |= zip(numbers, fetched if len(numbers) > 1 else [fetched], strict=True)
    return InMemory(references)


@contextlib.contextmanager
def kept_while_training(images: EncodedImages) -> Iterator[None]:
    """Remove the files of this machine after a training, and those that an earlier one left behind."""
    if not isinstance(images, InFiles):
        yield
        return
    for folder in cache_folder(FILES).iterdir():
        with contextlib.suppress(OSError):
            newest = max(path.stat().st_mtime for path in (folder, *folder.iterdir()))
            if time.time() - newest > KEPT_DAYS * 86_400:
                shutil.rmtree(folder, ignore_errors=True)
    yield
    images.remove()
