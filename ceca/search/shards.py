"""Shards: the embeddings of a gallery as files on this machine, mapped into memory.

A stored object has `<digest>.npy`, its rows in fp16, and `<digest>.named.npy`, their image ids and identities. Where a
CPU searches, `<digest>.codes.npy` and `<digest>.bounds.npy` are the same rows in 8 bits (`ceca.search.rounding`).
Where it searches approximately, `<digest>.<version>.sketches.npy` holds the sketches of all parts, below the digest of
the first one (`ceca.search.sketches`).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ceca.data.files import writing
from ceca.data.keys import numbers
from ceca.data.store import Store, StoreError, version_of
from ceca.environment import cache_folder
from ceca.search.rounding import Rounded, round_rows
from ceca.search.sketches import Sketches, find_directions, sketch, sketch_all
from ceca.search.sources import Source
from ceca.search.topk import Rows

NAMED = np.dtype([("id", np.uint64), ("identity", np.int64)])


def shards_folder(store: Store) -> Path:
    """Folder on this machine for the shards of a dataset."""
    return cache_folder("shards", version_of(store.uri))


def open_shards(sources: Sequence[Source], folder: Path) -> list[Tensor]:
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


def open_rounded(sources: Sequence[Source], shards: Sequence[Tensor], folder: Path) -> list[Rounded]:
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


def open_sketches(parts: Sequence[str], rows: Rows, folder: Path) -> Sketches | None:
    """Map the sketches of rows into memory; what is not in the folder is made first.

    They depend on the parts alone: images that were added one by one have sketches by the same directions, made in
    memory, so that an edition with one more of them opens at once.

    Args:
        parts: digests of the first stored objects, those of the gallery's table.
        rows: the rows of all stored objects.
        folder: as in `open_shards`.

    Returns:
        None if there is no row.

    Raises:
        StoreError: the folder cannot be written.
    """
    count = int(rows.starts[len(parts)])
    if not count:
        return sketch_all(rows) if len(rows) else None
    path, height = folder / f"{parts[0]}.{version_of(list(parts))}.sketches.npy", 4 * (rows.width + 1)
    with _writing_in(folder):
        if not _used(path):
            for old in folder.glob(f"{parts[0]}.*.sketches.npy"):  # of another set of parts
                old.unlink(missing_ok=True)
            directions = find_directions(rows, count)
            # One file, so that nobody reads sketches beside the directions of another process.
            head = directions.view(np.int8).reshape(height, -1)
            _write(path, np.concatenate([head, sketch(rows, directions, 0, count)]))
        held = _mapped(path)
    directions = np.ascontiguousarray(held[:height]).view(np.float32).reshape(rows.width + 1, -1)
    return Sketches(directions, [held[height:], sketch(rows, directions, count, len(rows))])


def open_names(sources: Sequence[Source], folder: Path) -> np.ndarray:
    """Read the image ids and identities of all rows; what is not in the folder is read from the store first.

    Args:
        sources: stored objects of rows.
        folder: as in `open_shards`.

    Returns:
        [N] records of `NAMED`, in the order of the sources.

    Raises:
        FileNotFoundError, StoreError: as in `open_shards`.
    """
    with _writing_in(folder):
        return np.concatenate([np.empty(0, NAMED), *(_names(source, folder) for source in sources)])


@contextlib.contextmanager
def _writing_in(folder: Path) -> Iterator[None]:
    """Turn errors of the folder into one that says what to do."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise StoreError(f"cannot write in {folder} ({error}); set CECA_CACHE to a folder with room") from error


def _shard(source: Source, folder: Path) -> np.ndarray:
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


def _names(source: Source, folder: Path) -> np.ndarray:
    """Image ids and identities of one stored object."""
    path = folder / f"{source.digest}.named.npy"
    if not _used(path):
        table = source.describe(["image_id", "identity"])
        named = np.empty(table.num_rows, NAMED)
        named["id"], named["identity"] = numbers(table["image_id"]), table["identity"].to_numpy()
        _write(path, named)
    return np.load(path)


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
    with writing(path) as file:
        np.save(file, content)


def _mapped(path: Path) -> np.ndarray:
    # Copy-on-write, although nothing writes: torch warns of read-only arrays.
    return np.load(path, mmap_mode="c")


def matrix(table: pa.Table, column: str) -> np.ndarray:
    """Embedding column of a table as an array [N, D]."""
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table[column].chunks]
    return np.concatenate(chunks).reshape(table.num_rows, -1)
