"""Tables of embeddings whose numbers lie in files of this machine, mapped into memory."""

from __future__ import annotations

import tempfile

import numpy as np
import pyarrow as pa

from ceca.data.store import Manifest, Store, StoreError
from ceca.environment import cache_folder
from ceca.search.shards import matrix


def read_mapped(store: Store, table: Manifest) -> pa.Table:
    """Rows of a table of embeddings, in order; no process holds all of the embeddings.

    The files have no name, so they are gone with the process. The machine reads and drops their pages as it needs.

    Args:
        store: the dataset.
        table: a version of a table with columns of embeddings, lists of one length each.

    Raises:
        StoreError: the table is empty, or there is no room for the files.
    """
    start = 0
    others: list[pa.Table] = []
    mapped: dict[str, np.ndarray] = {}
    names: list[str] = []
    for part in store.read_each(table):
        names = part.schema.names
        wide = {field.name: field.type for field in part.schema if pa.types.is_fixed_size_list(field.type)}
        for name, kind in wide.items():
            if name not in mapped:
                mapped[name] = _map_file((table.rows, kind.list_size), kind.value_type.to_pandas_dtype())
            mapped[name][start : start + part.num_rows] = matrix(part, name)
        others.append(part.drop_columns(list(wide)))
        start += part.num_rows
    whole = pa.concat_tables(others)
    columns = {name: _as_column(mapped[name]) if name in mapped else whole[name] for name in names}
    return pa.table(columns)


def _map_file(shape: tuple[int, int], dtype: type) -> np.ndarray:
    folder = cache_folder("evaluations")
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            return np.memmap(file, dtype, "w+", shape=shape)
    except OSError as error:
        raise StoreError(f"cannot write in {folder} ({error}); set CECA_CACHE to a folder with room") from error


def _as_column(rows: np.ndarray) -> pa.Array:
    """An Arrow column over the same memory."""
    count, width = rows.shape
    kind = pa.from_numpy_dtype(rows.dtype)
    flat = pa.Array.from_buffers(kind, count * width, [None, pa.py_buffer(rows)])
    return pa.FixedSizeListArray.from_arrays(flat, width)
