"""Rows and pictures of Lance datasets. The library is the extra `lance` of this package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from ceca.data.lance import open_lance
from ceca.data.store import Reject
from ceca.datasets.records import DatasetError
from ceca.datasets.rows import Row
from ceca.datasets.sources.arrow import BATCH, picture_columns, values_of

VERSIONS = "_versions"  # folder in each Lance dataset
ENDING = ".lance"  # of such a folder's name


def lance_folders(fs: Any, root: str, there: Sequence[str]) -> list[str]:
    """Names of the Lance datasets in a folder; an empty one if the folder is such a dataset itself.

    Args:
        fs: its filesystem.
        root: its path.
        there: what it holds; names of folders end with a slash.
    """
    if fs.isdir(f"{root}/{VERSIONS}"):
        return [""]
    named = (name.rstrip("/") for name in there if name.endswith(f"{ENDING}/"))
    return [name for name in named if fs.isdir(f"{root}/{name}/{VERSIONS}")]


def lance_rows(fs: Any, path: str, name: str) -> Iterator[Row | Reject]:
    """Rows of the newest version of a Lance dataset, without the bytes of its pictures.

    The place of a picture is (dataset, version, row): it stays the same picture if rows are added meanwhile.

    Args:
        fs: its filesystem.
        path: its path.
        name: its name below the source.

    Raises:
        DatasetError: it cannot be read.
        UserError: the library is not installed.
    """
    with _explained(path):
        dataset = open_lance(fs, path)
        pictures = picture_columns(dataset.schema)
        columns = [field.name for field in dataset.schema if field.name not in pictures]
        paths = {column: f"{column}.path" for column, inner in pictures.items() if inner == "path"}
        number = 0
        shown = name or PurePosixPath(path).name
        for batch in dataset.to_batches(columns=[*columns, *paths.values()], batch_size=BATCH, scan_in_order=True):
            for value in values_of(batch):
                where = f"{shown} row {number}"
                if isinstance(value, Exception):
                    yield Reject(where, "bad_row", f"{where}: a cell cannot be read ({value})")
                else:
                    own = {column: value.pop(inner) or "" for column, inner in paths.items()}
                    for column in pictures:
                        base = PurePosixPath(own.get(column, "")).name
                        value[column] = "/".join(filter(None, (shown, str(number), base)))
                    yield Row(value, where, [name, dataset.version, number] if pictures else None, pictures)
                number += 1


def read_lance(fs: Any, path: str, column: str, places: Sequence[Sequence[int]]) -> Iterator[bytes | None]:
    """Yield the pictures at these places (version, row), sorted; None where a cell is empty."""
    for version in sorted({version for version, _ in places}):
        rows = [row for of, row in places if of == version]
        for cell in open_lance(fs, path, version).take(rows, columns=[column])[column].to_pylist():
            yield cell.get("bytes") if isinstance(cell, dict) else cell


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, pa.ArrowException) as error:
        raise DatasetError(f"{path} cannot be read as a Lance dataset: {' '.join(str(error).split()):.300}") from None
