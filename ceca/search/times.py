"""Ranges of time in the conditions of a search.

A time is written as far as it is known, and stands for all of that: `2026`, `2026-01`, `2026-01-31`, `2026-01-31T12`,
`2026-01-31T12:30`, `2026-01-31T12:30:05`. A range goes from the beginning of the first to the end of the second.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import numpy as np

from ceca.search.columns import NEVER

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LAST = np.iinfo(np.int64).max
WRITTEN = "a range of time is written 2026-01-31, 2026-01-01..2026-02-15, 2026-01-31T08:30.. or ..2026"
TIME_OF_DAY = r"[T ](\d\d)(?::(\d\d)(?::(\d\d)(?:\.(\d{1,6}))?)?)?(Z|[+-]\d\d:\d\d)?"
PARTS = re.compile(rf"(\d{{4}})(?:-(\d\d)(?:-(\d\d)(?:{TIME_OF_DAY})?)?)?", re.ASCII)
UNITS = (timedelta(days=1), timedelta(hours=1), timedelta(minutes=1), timedelta(seconds=1), timedelta(microseconds=1))


def read_range(text: str) -> tuple[int, int]:
    """Read a range of time; without a zone it is in UTC.

    >>> read_range("1970-01-01..1970-01-02")
    (0, 172800000000)

    Args:
        text: one time, or two with `..` between them; one of the two may be left out.

    Returns:
        Microseconds since 1970: the first of the range, and the first after it.

    Raises:
        ValueError: it is no range, or ends before it begins.
    """
    first, dots, second = (part.strip() for part in text.partition(".."))
    if not first and not second:
        raise ValueError(f"{WRITTEN}; found {text!r}")
    begin = _span(first)[0] if first else NEVER + 1
    end = _span(second if dots else first)[1] if second or not dots else LAST
    if end <= begin:
        raise ValueError(f"the range of time {text!r} ends before it begins")
    return begin, end


def _span(text: str) -> tuple[int, int]:
    """Microseconds since 1970 of a time as far as it is written: the first of it, and the first after it."""
    found = PARTS.fullmatch(text)
    if found is None:
        raise ValueError(f"{WRITTEN}; found {text!r}")
    *numbers, fraction, zone = found.groups()
    year, month, day, *clock = (None if number is None else int(number) for number in numbers)
    hour, minute, second = clock
    try:
        begin = datetime(year or 0, month or 1, day or 1, hour or 0, minute or 0, second or 0, tzinfo=UTC)
        if fraction:
            begin += timedelta(microseconds=int(fraction.ljust(6, "0")))
        if zone and zone != "Z":
            begin = begin.replace(tzinfo=datetime.fromisoformat(f"2000-01-01T00:00{zone}").tzinfo)
    except ValueError as error:
        raise ValueError(f"{text!r} is no time: {error}") from None
    first = (begin - EPOCH) // UNITS[-1]
    if day is not None:
        said = sum(part is not None for part in (*clock, fraction))
        return first, first + UNITS[said] // UNITS[-1]
    months = 12 * begin.year + begin.month + (0 if month else 11)  # the month after it, counted from 0
    if months >= 120_000:
        return first, LAST
    return first, (datetime(months // 12, months % 12 + 1, 1, tzinfo=UTC) - EPOCH) // UNITS[-1]


def in_ranges(times: np.ndarray, ranges: Sequence[str]) -> np.ndarray:
    """Which times [N], in microseconds since 1970, lie in one of some ranges: [N] booleans."""
    inside = np.zeros(len(times), np.bool_)
    for begin, end in map(read_range, ranges):
        inside |= (times >= begin) & (times < end)
    return inside


def spell(time: int) -> str:
    """A time in microseconds since 1970, as `read_range` reads it.

    >>> spell(0)
    '1970-01-01T00:00:00Z'
    """
    return (EPOCH + timedelta(microseconds=time)).isoformat().replace("+00:00", "Z")
