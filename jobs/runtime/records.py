"""Units of work as JSON: ranges of a table's rows, or named records, where each record is a list of its fields' values.

A unit of a million images' work is cut from the columns when it is asked for, so a plan holds the columns alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar, overload

import numpy as np

T = TypeVar("T")


class Units(Sequence[dict[str, list[list[int]]]]):
    """Units of work over rows of tables: name of each column → ranges of its rows, as of `ranges`.

    Args:
        size: rows of a unit at most.
        columns: name → row numbers, [N] each; a name that is given None is left out.
    """

    def __init__(self, size: int, **columns: np.ndarray | None):
        self.size = size
        self.columns = {name: rows for name, rows in columns.items() if rows is not None}
        self.rows = len(next(iter(self.columns.values())))

    def __len__(self) -> int:
        return -(-self.rows // self.size)

    @overload
    def __getitem__(self, unit: int) -> dict[str, list[list[int]]]: ...
    @overload
    def __getitem__(self, unit: slice) -> list[dict[str, list[list[int]]]]: ...
    def __getitem__(self, unit: Any) -> Any:
        if isinstance(unit, slice):
            return [self[number] for number in range(len(self))[unit]]
        start = range(len(self))[unit] * self.size
        return {name: ranges(rows[start : start + self.size]) for name, rows in self.columns.items()}

    @property
    def sizes(self) -> list[int]:
        """Rows of each unit."""
        return [min(self.size, self.rows - start) for start in range(0, self.rows, self.size)]


class Joined(Sequence[Any]):
    """Sequences one after the other, without a copy."""

    def __init__(self, *sequences: Sequence[Any]):
        self.sequences = sequences
        self.ends = list(itertools.accumulate(map(len, sequences)))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[one] for one in range(len(self))[number]]
        number = range(len(self))[number]
        which = next(which for which, end in enumerate(self.ends) if number < end)
        return self.sequences[which][number - (self.ends[which - 1] if which else 0)]


def ranges(rows: np.ndarray) -> list[list[int]]:
    """Row numbers [N], in their order, as ranges [first, after the last].

    >>> ranges(np.array([3, 4, 5, 9, 1, 2]))
    [[3, 6], [9, 10], [1, 3]]
    """
    cuts = np.flatnonzero(np.diff(rows) != 1) + 1
    firsts = rows[np.concatenate([[0], cuts])] if len(rows) else rows
    lasts = rows[np.concatenate([cuts - 1, [len(rows) - 1]])] if len(rows) else rows
    return np.stack([firsts, lasts + 1], axis=1).tolist()  # type: ignore[no-any-return]


def rows_in(spans: Iterable[Sequence[int]]) -> np.ndarray:
    """Row numbers [N] from the ranges that `ranges` made of them."""
    return np.concatenate([np.arange(0), *(np.arange(first, after) for first, after in spans)])


def to_json(records: Iterable[Any]) -> list[list[Any]]:
    """Write dataclass records as lists of their fields' values."""
    return [[getattr(record, field.name) for field in dataclasses.fields(record)] for record in records]


def from_json(kind: type[T], rows: Iterable[Sequence[Any]]) -> list[T]:
    """Read what `to_json` wrote; tuples inside a record come back as lists."""
    return [kind(*row) for row in rows]


def cut(items: Sequence[T], size: int) -> list[list[T]]:
    """Cut a sequence into consecutive lists of at most `size` items."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]
