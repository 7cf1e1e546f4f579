"""Named records on their way to a worker: a unit of work is JSON, and each record is a list in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def to_json(records: Iterable[Any]) -> list[list[Any]]:
    """Write dataclass records as lists of their fields' values."""
    return [[getattr(record, field.name) for field in dataclasses.fields(record)] for record in records]


def from_json(kind: type[T], rows: Iterable[Sequence[Any]]) -> list[T]:
    """Read what `to_json` wrote; tuples inside a record come back as lists."""
    return [kind(*row) for row in rows]


def cut(items: Sequence[T], size: int) -> list[list[T]]:
    """Cut a sequence into consecutive lists of at most `size` items."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]
