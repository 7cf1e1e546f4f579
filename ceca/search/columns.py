"""Small columns of an edition's rows: image ids as numbers, facets as codes of their values, and times.

A million images take tens of megabytes. Parts are read side by side and once per machine: a file keeps what was read,
and a new edition reads only parts that are new.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from ceca.data.files import sweep, writing
from ceca.data.keys import Positions, numbers
from ceca.data.schema import NOBODY, TIME
from ceca.data.store import StoreError, in_order, version_of
from ceca.environment import cache_folder
from ceca.search.edition import Edition
from ceca.search.sources import Source

TOGETHER = 64  # parts whose columns are coded together: parts may be small
FEW = 64  # objects that are rather read again than written with all others to the file of this machine
NONE = -1  # code of a row without a value
NEVER = np.iinfo(np.int64).min  # time of a row without one


class Columns:
    """Image ids, columns of few values, and times, of N rows in the order of their stored objects.

    Args:
        sources: the stored objects.
        names: columns to read; of `attributes`, each attribute becomes a column; `time` becomes `times`.
        before: the same of an earlier edition, whose objects are not read again.

    Attributes:
        ids: [N] uint64.
        index: finds rows by id.
        starts: first row of each object, and N.
        codes: column → [N] int32, numbers of values; -1 for none.
        values: column → its values, by number.
        times: [N] int64, microseconds since 1970; NEVER for none. None if no row has a time.
    """

    starts: np.ndarray
    values: dict[str, pa.Array]
    times: np.ndarray | None

    def __init__(
        self,
        sources: Sequence[Source],
        names: Sequence[str] = (),
        before: Columns | None = None,
    ):
        self.digests = [source.digest for source in sources]
        kept = {} if before is None else {digest: place for place, digest in enumerate(before.digests)}
        new = [place for place, digest in enumerate(self.digests) if digest not in kept]
        held_lengths = np.diff(before.starts).tolist() if before else []
        lengths = np.array([held_lengths[kept[digest]] if digest in kept else 0 for digest in self.digests], np.int64)
        read = []  # of several parts together: places, ids, coded columns, times
        together = sources[new[0]].together if new else 1
        tables = in_order(lambda place: sources[place].describe(["image_id", *names]), new, together)
        for start in range(0, len(new), TOGETHER):
            places = new[start : start + TOGETHER]
            parts = list(itertools.islice(tables, len(places)))
            lengths[places] = list(map(len, parts))
            read.append((places, *_coded_table(pa.concat_tables(parts), names)))
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self.ids = np.empty(self.starts[-1], np.uint64)
        self.codes: dict[str, np.ndarray] = {}
        known: dict[str, dict[str, int]] = {}
        times = np.full(len(self.ids) if TIME.name in names else 0, NEVER)
        if before is not None:
            for name in before.values:
                known[name] = before._numbered(name)
                self.codes[name] = np.full(len(self.ids), NONE, np.int32)
            for place, digest in enumerate(self.digests):
                if digest in kept:
                    rows, held = self._rows(place), before._rows(kept[digest])
                    self.ids[rows] = before.ids[held]
                    for name, codes in before.codes.items():
                        self.codes[name][rows] = codes[held]
                    if before.times is not None:
                        times[rows] = before.times[held]
        for places, ids, coded, moments in read:
            numbered = np.concatenate([np.arange(*self.starts[place : place + 2]) for place in places])
            self.ids[numbered] = ids
            if moments is not None:
                times[numbered] = moments
            for name, (codes, values) in coded.items():
                if name not in self.codes:
                    self.codes[name] = np.full(len(self.ids), NONE, np.int32)
                numbers_of = known.setdefault(name, {})
                translated = [numbers_of.setdefault(value, len(numbers_of)) for value in values]
                self.codes[name][numbered] = np.array([*translated, NONE], np.int32)[codes]
        self.values = {name: pa.array(numbers_of, pa.string()) for name, numbers_of in known.items()}
        self.times = times if (times != NEVER).any() else None
        self._forget_unused()
        self.index = Positions(self.ids, first=True)

    def _numbered(self, name: str) -> dict[str, int]:
        return {value: number for number, value in enumerate(self.values[name].to_pylist())}

    def _rows(self, place: int) -> slice:
        """The rows of an object."""
        return slice(int(self.starts[place]), int(self.starts[place + 1]))

    def _forget_unused(self) -> None:
        """Leave out values that no row has: they may be of an image that was erased."""
        for name, values in self.values.items():
            used = np.zeros(len(values) + 1, np.bool_)
            used[self.codes[name]] = True
            if not used[:-1].all():
                self.codes[name], self.values[name] = self._narrowed(name, self.codes[name])

    def _narrowed(self, name: str, codes: np.ndarray) -> tuple[np.ndarray, pa.Array]:
        """Codes of some rows [M], numbered anew, and the values that they have."""
        used = np.zeros(len(self.values[name]) + 1, np.bool_)
        used[codes] = True
        narrow = np.cumsum(used, dtype=np.int32) - 1
        narrow[-1] = NONE
        return narrow[codes], self.values[name].filter(pa.array(used[:-1]))

    def place(self, row: int) -> tuple[int, int]:
        """The object of a row, and the row in it."""
        source = int(np.searchsorted(self.starts, row, side="right")) - 1
        return source, row - int(self.starts[source])

    def aligned(self, name: str, rows: np.ndarray) -> pa.DictionaryArray:
        """A column of chosen rows, with the values that they have; null for row -1 and where there is none."""
        if not len(self.ids):
            return pa.DictionaryArray.from_arrays(pa.nulls(len(rows), pa.int32()), pa.array([], pa.string()))
        codes, values = self._narrowed(name, np.where(rows >= 0, self.codes[name][rows], NONE))
        return pa.DictionaryArray.from_arrays(pa.array(codes, mask=codes < 0), values)

    def times_of(self, rows: np.ndarray) -> np.ndarray | None:
        """Times of chosen rows [M]; NEVER for row -1 and where there is none. None if none has a time."""
        if self.times is None:
            return None
        times = np.where(rows >= 0, self.times[rows], NEVER)
        return times if (times != NEVER).any() else None


def open_columns(
    edition: Edition, table: str, sources: Sequence[Source], names: Sequence[str], before: Columns | None = None
) -> Columns:
    """Columns of an edition's rows of a table, from the file of this machine where there is one.

    Args:
        edition: the edition.
        table: `gallery`, `images` or `dialogues`.
        sources: the stored objects of its rows, as `list_sources` gives them.
        names: as in `Columns`.
        before: the same of an earlier edition.

    Raises:
        FileNotFoundError: an object was replaced in the meantime.
    """
    digests = [source.digest for source in sources]
    if before is not None and before.digests == digests:
        return before
    folder = cache_folder("columns", f"{version_of(edition.store.uri)}-{table}")
    path = folder / f"{version_of(digests, names)}.npz"
    files = (_load(file, names) for file in (path, *folder.glob("*.npz")))
    held = before or next(filter(None, files), None)
    if held is not None and held.digests == digests:
        return held
    columns = Columns(sources, names, held)
    known = set(held.digests) if held else set()
    if held and known <= set(digests) and len(digests) - len(known) < FEW:
        return columns  # single images were added: the next process reads them again
    with contextlib.suppress(OSError, StoreError):  # without the file, the next process reads the table again
        _save(columns, names, path)
        sweep(folder, {path.stem})  # other files may hold what was erased
    return columns


def _save(columns: Columns, names: Sequence[str], path: Path) -> None:
    """Write columns to a file."""
    arrays = {f"codes{number}": columns.codes[name] for number, name in enumerate(columns.values)}
    if columns.times is not None:
        arrays["times"] = columns.times
    described = {
        "names": list(names),
        "digests": columns.digests,
        "values": {name: known.to_pylist() for name, known in columns.values.items()},
    }
    words = np.frombuffer(json.dumps(described).encode(), np.uint8)
    with writing(path) as file:
        np.savez(file, allow_pickle=False, ids=columns.ids, starts=columns.starts, described=words, **arrays)


def _load(path: Path, names: Sequence[str]) -> Columns | None:
    """Columns as `_save` wrote them; None if there is no such file, or if it has other columns."""
    try:
        os.utime(path)  # `sweep` counts days from now
        with np.load(path) as arrays:
            described = json.loads(arrays["described"].tobytes())
            if described["names"] != list(names):
                return None
            columns = Columns([])
            columns.digests, columns.ids, columns.starts = described["digests"], arrays["ids"], arrays["starts"]
            columns.values = {name: pa.array(known, pa.string()) for name, known in described["values"].items()}
            columns.codes = {name: arrays[f"codes{number}"] for number, name in enumerate(columns.values)}
            columns.times = arrays.get("times")
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    columns.index = Positions(columns.ids, first=True)
    return columns


Coded = tuple[np.ndarray, list[str]]  # codes [n], -1 for none, and the values that they number


def _coded_table(table: pa.Table, names: Sequence[str]) -> tuple[np.ndarray, dict[str, Coded], np.ndarray | None]:
    """Ids, coded columns and times of a table."""
    coded: dict[str, Coded] = {}
    times = None
    for name in names:
        column = table[name].combine_chunks()
        if name == TIME.name:
            times = column.cast(pa.int64()).fill_null(NEVER).to_numpy()
        else:
            coded |= _attributes(column) if name == "attributes" else {name: _coded(column, NOBODY)}
    return numbers(table["image_id"]), coded, times


def _coded(column: pa.Array, nothing: int | None = None) -> Coded:
    """A column of numbers or words; null and `nothing` are no value."""
    encoded = column.dictionary_encode()
    values = encoded.dictionary.to_pylist()
    codes = encoded.indices.fill_null(NONE).to_numpy(zero_copy_only=False)
    is_none = np.array([*(value is None or value == nothing for value in values), True])
    return np.where(is_none[codes], NONE, codes), [str(value) for value in values]


def _attributes(column: pa.MapArray) -> dict[str, Coded]:
    """Each attribute of a column of maps; of a repeated one the first value."""
    offsets = column.offsets.to_numpy()
    first, last = int(offsets[0]), int(offsets[-1])
    row_of = np.repeat(np.arange(len(column)), np.diff(offsets))
    names, name_list = _coded(column.keys.slice(first, last - first))
    values = column.items.slice(first, last - first)
    attributes = {}
    for number, name in enumerate(name_list):
        mine = np.flatnonzero(names == number)
        codes, known = _coded(values.take(pa.array(mine)))
        column_codes = np.full(len(column), NONE, np.int32)
        column_codes[row_of[mine][::-1]] = codes[::-1]  # so that the first one stays
        attributes[name] = column_codes, known
    return attributes
