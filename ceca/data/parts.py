"""The bytes of a part of a table: Parquet."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from ceca.data.schema import OWN_SUMMARY, SUMMARY_OF, TIME, TRACKLET

ROW_GROUP = 128  # in rows: small enough to fetch one image, large enough to stream
OPTIONAL = (TIME, TRACKLET, OWN_SUMMARY, SUMMARY_OF)  # columns that a table may lack


def encode(rows: pa.Table) -> bytes:
    """Encode rows as a part: Parquet with row groups of ROW_GROUP rows, which `Store.take` relies on."""
    sink = io.BytesIO()
    pq.write_table(rows, sink, row_group_size=ROW_GROUP, compression=_compression(rows.schema))
    return sink.getvalue()


def decode(source: BinaryIO | pa.NativeFile, columns: Sequence[str] | None = None) -> pa.Table:
    """Decode the rows of a part.

    Not by `pq.read_table`: it scans as a data set, and one of Arrow's threads may let go of the last bytes after the
    table has been returned. If the interpreter is ending by then, the thread ends the process with signal 6.

    Args:
        source: a file of Parquet.
        columns: columns to read, in this order; None means all. One of OPTIONAL that is missing is read as null.

    Raises:
        pyarrow.ArrowInvalid: it is not Parquet, or lacks one of the columns.
    """
    # Ranges of an object are fetched together. For a file of this machine that is a thread more, and twice the time.
    file = pq.ParquetFile(source, pre_buffer=not isinstance(source, pa.NativeFile))
    return chosen(file.read(columns, use_threads=False), columns)  # several parts have a thread each


def chosen(table: pa.Table, columns: Sequence[str] | None) -> pa.Table:
    """Columns of a table, as `decode` gives them."""
    if columns is None:
        return table
    for field in OPTIONAL:
        if field.name in columns and field.name not in table.column_names:
            table = table.append_column(field, pa.nulls(len(table), field.type))
    if missing := sorted(set(columns).difference(table.column_names)):
        raise pa.ArrowInvalid(f"no column {', '.join(missing)}")
    return table.select(columns)


def _compression(schema: pa.Schema) -> str | dict[str, str]:
    """Compression of each column: zstd, but none for encoded images and embeddings, which do not get smaller."""
    if "image" in schema.names:
        return {name: "NONE" if name == "image" else "ZSTD" for name in schema.names}
    return "NONE" if "global" in schema.names else "ZSTD"
