"""Rows and pictures of Parquet files, and of datasets that Hugging Face's library saved (Arrow's stream format)."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from ceca.data.store import Reject
from ceca.datasets.records import DatasetError
from ceca.datasets.rows import Row

BATCH = 4096  # rows in memory at once
STATE = "state.json"  # beside the files of a saved dataset


def parquet_rows(fs: Any, path: str, name: str) -> Iterator[Row | Reject]:
    """Rows of a Parquet file, without the bytes of its pictures.

    Raises:
        DatasetError: it is no such file.
    """
    with _explained(name), fs.open(path, "rb") as file:
        parquet = pq.ParquetFile(file)
        schema = parquet.schema_arrow
        pictures = picture_columns(schema)
        columns = [field.name for field in schema if field.name not in pictures]
        columns += [f"{column}.path" for column, inner in pictures.items() if inner == "path"]
        for group in range(parquet.num_row_groups):
            number = 0
            for batch in parquet.iter_batches(BATCH, row_groups=[group], columns=columns):
                yield from _rows(batch, pictures, name, group, number)
                number += len(batch)


def arrow_rows(fs: Any, path: str, name: str, names: Mapping[str, Sequence[str]]) -> Iterator[Row | Reject]:
    """Rows of a file of a saved dataset, without the bytes of its pictures.

    Args:
        fs: its filesystem.
        path: its path.
        name: its name, for people.
        names: column of numbers → the name of each number.

    Raises:
        DatasetError: it is no such file.
    """
    with _explained(name), _stream(fs, path) as stream:
        pictures = picture_columns(stream.schema)
        for group, batch in enumerate(stream):
            for row in _rows(batch, pictures, name, group, 0):
                if isinstance(row, Reject):
                    yield row
                    continue
                named = {
                    column: names[column][value] if column in names and isinstance(value, int) and value >= 0 else value
                    for column, value in row.values.items()
                }
                yield Row(named, row.where, row.place, row.inside)


def _rows(
    batch: pa.RecordBatch, pictures: Mapping[str, str], name: str, group: int, first: int
) -> Iterator[Row | Reject]:
    """Rows of a batch. The place of a picture is (file, group of rows, row); its path ends with its own name."""
    # A cell of bytes becomes an empty one: only a picture that is there has a place.
    given = {column: batch.column(column) for column in batch.schema.names if column not in pictures}
    paths = {
        column: batch.column(column).field("path").to_pylist()
        for column, inner in pictures.items()
        if inner == "path" and column in batch.schema.names
    }
    values = values_of(pa.RecordBatch.from_arrays(list(given.values()), names=list(given))) if given else []
    for number in range(batch.num_rows):
        where = f"{name} row {group}-{first + number}"
        value = values[number] if values else {}
        if isinstance(value, Exception):
            yield Reject(where, "bad_row", f"{where}: a cell cannot be read ({value})")
            continue
        row = dict(value)
        for column in pictures:
            own = (paths[column][number] if column in paths else None) or ""
            row[column] = "/".join(filter(None, (name, f"{group}-{first + number}", PurePosixPath(own).name)))
        yield Row(row, where, [name, group, first + number] if pictures else None, pictures)


def values_of(batch: pa.RecordBatch) -> list[dict[str, Any] | Exception]:
    """The rows of a batch. A row with a cell that cannot be read becomes its error."""
    try:
        return batch.to_pylist()  # type: ignore[no-any-return]
    except (ValueError, OverflowError, pa.ArrowException) as error:
        if len(batch) == 1:
            return [error]
    return [value for number in range(len(batch)) for value in values_of(batch.slice(number, 1))]


def picture_columns(schema: pa.Schema) -> dict[str, str]:
    """Columns that hold pictures: name → `path` if each is a struct with bytes and path, else empty."""
    found = {}
    for field in schema:
        if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type):
            found[field.name] = ""
        elif pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            found[field.name] = "path" if field.type.get_field_index("path") >= 0 else "bytes"
    return found


def read_cells(fs: Any, path: str, column: str, places: Sequence[Sequence[int]]) -> Iterator[bytes | None]:
    """Yield the pictures at these places (group, row) of a file; None where a cell is empty.

    Args:
        fs: the file's filesystem.
        path: its path.
        column: the column of the pictures.
        places: sorted.
    """
    groups = sorted({group for group, _ in places})
    wanted: dict[int, list[int]] = {group: [] for group in groups}
    for group, row in places:
        wanted[group].append(row)
    with contextlib.ExitStack() as opened:
        if path.endswith(".parquet"):
            parquet = pq.ParquetFile(opened.enter_context(fs.open(path, "rb")))
            for group in groups:
                yield from _cells_of_group(parquet, group, column, wanted[group])
            return
        for group, batch in enumerate(opened.enter_context(_stream(fs, path))):
            if group in wanted:
                yield from map(_content, batch.column(column).take(pa.array(wanted[group])).to_pylist())
            if group >= groups[-1]:
                return


def _cells_of_group(parquet: pq.ParquetFile, group: int, column: str, rows: Sequence[int]) -> Iterator[bytes | None]:
    """Cells of a row group, batch by batch: writers make groups of any size."""
    waiting, first = list(rows), 0
    for batch in parquet.iter_batches(256, row_groups=[group], columns=[column]):
        here = [row - first for row in waiting if row < first + len(batch)]
        yield from map(_content, batch.column(0).take(pa.array(here, pa.int64())).to_pylist())
        waiting, first = waiting[len(here) :], first + len(batch)
        if not waiting:
            return


def _content(cell: Any) -> bytes | None:
    content: bytes | None = cell.get("bytes") if isinstance(cell, dict) else cell
    return content


@contextlib.contextmanager
def _stream(fs: Any, path: str) -> Iterator[pa.RecordBatchStreamReader]:
    """The batches of an Arrow file; a local one is mapped and not read."""
    if isinstance(fs, LocalFileSystem):
        with pa.memory_map(path) as file:
            yield pa.ipc.open_stream(file)
    else:
        with fs.open(path, "rb") as file:
            yield pa.ipc.open_stream(file)


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except pa.ArrowException as error:
        raise DatasetError(
            f"{name} cannot be read: {' '.join(str(error).split())}; write or download it again"
        ) from None


def saved_files(fs: Any, root: str) -> list[tuple[str, str | None, dict[str, list[str]]]]:
    """Files of a dataset that `save_to_disk` wrote.

    Returns:
        Of each file the path below the folder, the split that its folder names, and the names of its numbers by column.

    Raises:
        DatasetError: the dataset has an order of its own, which is not read.
    """
    found = []
    folders = [""] if fs.exists(f"{root}/{STATE}") else _json(fs, f"{root}/dataset_dict.json")["splits"]
    for folder in folders:
        place = f"{root}/{folder}" if folder else root
        state, info = _json(fs, f"{place}/{STATE}"), _json(fs, f"{place}/dataset_info.json")
        if state.get("_indices_files"):
            raise DatasetError(f"{place} is a selection; save it again after flatten_indices()")
        features = info.get("features") or {}
        names = {column: about["names"] for column, about in features.items() if _is_named(about)}
        for file in state["_data_files"]:
            found.append((f"{folder}/{file['filename']}".lstrip("/"), folder or None, names))
    return found


def _is_named(feature: Any) -> bool:
    return isinstance(feature, dict) and isinstance(feature.get("names"), list)


def _json(fs: Any, path: str) -> dict[str, Any]:
    try:
        found = json.loads(fs.cat_file(path))
    except (FileNotFoundError, ValueError) as error:
        raise DatasetError(f"{path} is missing or not valid JSON ({error}); save the dataset again") from None
    return found if isinstance(found, dict) else {}
