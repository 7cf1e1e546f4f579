"""Shards: the embeddings of a gallery as files on this machine, mapped into memory.

A stored object has `<digest>.npy`, its rows in fp16. Where a CPU searches, `<digest>.codes.npy` and
`<digest>.bounds.npy` are the same rows in 8 bits (`ceca.search.rounding`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ceca.data.changes import read_added
from ceca.data.store import Manifest, Store, StoreError, version_of
from ceca.environment import cache_folder
from ceca.search.edition import Edition
from ceca.search.rounding import Rounded, round_rows

CACHED_DAYS = 30  # a shard that was not opened for this long is removed


@dataclasses.dataclass(frozen=True)
class StoredPart:
    """A part of the gallery table."""

    store: Store
    manifest: Manifest
    number: int

    @property
    def digest(self) -> str:
        return self.manifest.parts[self.number].sha256

    def describe(self, columns: list[str]) -> pa.Table:
        """Small columns, read alone."""
        return self.store.read_columns(self.manifest, self.number, columns)

    def read(self, columns: list[str]) -> pa.Table:
        """Columns of the whole part, after its digest was checked."""
        return self.store.read_part(self.manifest, self.number, columns)


@dataclasses.dataclass(frozen=True)
class AddedObject:
    """An object of `added`: images that were added one by one."""

    edition: Edition
    name: str

    @property
    def digest(self) -> str:
        return Path(self.name).stem

    def read(self, columns: list[str]) -> pa.Table:
        return read_added(self.edition.store, self.edition.digest, self.name, columns)

    describe = read


def shards_folder(store: Store) -> Path:
    """Folder on this machine for the shards of a dataset."""
    return cache_folder("shards", version_of(store.uri))


def open_shards(sources: Sequence[StoredPart | AddedObject], folder: Path) -> list[Tensor]:
    """Map the shard of each source into memory; shards that are not in the folder are made first.

    Args:
        sources: stored objects with embeddings.
        folder: folder of the shards; a file is named by its source's digest.

    Returns:
        The embeddings of each source, fp16 [n, D + E].

    Raises:
        FileNotFoundError: a source was replaced in the meantime.
        StoreError: the folder cannot be written.
    """
    with _writing_in(folder):
        return [torch.from_numpy(_shard(source, folder)) for source in sources]


def open_rounded(sources: Sequence[StoredPart | AddedObject], shards: Sequence[Tensor], folder: Path) -> list[Rounded]:
    """Map each source's rows in 8 bits into memory; what is not in the folder is made first.

    Args:
        sources: stored objects with embeddings.
        shards: the rows of each, in fp16.
        folder: as in `open_shards`.

    Raises:
        StoreError: the folder cannot be written.
    """
    with _writing_in(folder):
        return [_rounded(source.digest, rows, folder) for source, rows in zip(sources, shards, strict=True)]


@contextlib.contextmanager
def _writing_in(folder: Path) -> Iterator[None]:
    """Turn errors of the folder into one that says what to do."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(f"cannot write in {folder} ({error}); set CECA_CACHE to a folder with room") from error


def sweep(folder: Path, current: set[str]) -> None:
    """Remove shards from this machine that no search needs. A process that has one mapped keeps its content.

    Args:
        folder: the shards of one dataset. Shards that are not current are removed at once, because they may hold images
            that were erased. Shards of other datasets are removed when they were not opened for `CACHED_DAYS`.
        current: digests of the shards to keep.
    """
    for file in folder.parent.glob("*/*"):
        if file.parent.is_symlink():  # it leads to files that are no shards
            continue
        try:
            age = time.time() - file.lstat().st_mtime
            outdated = file.parent == folder and file.name.partition(".")[0] not in current
            abandoned = file.suffix == ".tmp" and age > 3600  # its writer was killed
            if abandoned or (file.suffix == ".npy" and (outdated or age > CACHED_DAYS * 86_400)):
                file.unlink(missing_ok=True)
        except FileNotFoundError:  # another process was faster
            continue
        except OSError as error:
            raise StoreError(f"cannot remove {file} ({error}); set CECA_CACHE to a folder of your own") from error


def _shard(source: StoredPart | AddedObject, folder: Path) -> np.ndarray:
    """Map one shard, made first if it is missing."""
    if not re.fullmatch("[0-9a-f]+", source.digest):  # it comes from the dataset, and names a file here
        raise StoreError(
            f"the gallery names a part by {source.digest!r}, which is no digest; run the stage `index` again"
        )
    path = folder / f"{source.digest}.npy"
    if not _used(path):
        table = source.read(["global", "local"])
        _write(path, np.concatenate([matrix(table, "global"), matrix(table, "local")], axis=1))
    return _mapped(path)


def _rounded(digest: str, rows: Tensor, folder: Path) -> Rounded:
    """Map the rows of one shard in 8 bits, made first if they are missing."""
    codes, bounds = (folder / f"{digest}.{kind}.npy" for kind in ("codes", "bounds"))
    if not (_used(codes) and _used(bounds)):
        rounded = round_rows(rows)
        _write(codes, rounded.codes)
        _write(bounds, rounded.bounds)
    return Rounded(_mapped(codes), _mapped(bounds))


def _used(path: Path) -> bool:
    """Whether a file is there; `sweep` counts its days from now."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _write(path: Path, content: np.ndarray) -> None:
    """Write a file as a whole: another process sees nothing or all of it."""
    aside = path.parent / f"{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            np.save(file, content)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _mapped(path: Path) -> np.ndarray:
    # Copy-on-write, although nothing writes: torch warns of read-only arrays.
    return np.load(path, mmap_mode="c")


def matrix(table: pa.Table, column: str) -> np.ndarray:
    """Embedding column of a table as an array [N, D]."""
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table[column].chunks]
    return np.concatenate(chunks).reshape(table.num_rows, -1)
