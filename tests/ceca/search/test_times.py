"""Ranges of time: how they are written, and which times they hold."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ceca.search.columns import NEVER
from ceca.search.times import EPOCH, in_ranges, read_range, spell


def moment(*parts: int) -> int:
    return (datetime(*parts, tzinfo=UTC) - EPOCH) // (datetime.resolution)


@pytest.mark.parametrize(
    ("written", "first", "after"),
    [
        ("2026", (2026, 1, 1), (2027, 1, 1)),
        ("2026-12", (2026, 12, 1), (2027, 1, 1)),
        ("2028-02", (2028, 2, 1), (2028, 3, 1)),
        ("2026-01-31", (2026, 1, 31), (2026, 2, 1)),
        ("2026-01-31T12", (2026, 1, 31, 12), (2026, 1, 31, 13)),
        ("2026-01-31 12:30", (2026, 1, 31, 12, 30), (2026, 1, 31, 12, 31)),
        ("2026-01-31T12:30:05", (2026, 1, 31, 12, 30, 5), (2026, 1, 31, 12, 30, 6)),
        ("2026-01-31T12:30:05.25", (2026, 1, 31, 12, 30, 5, 250_000), (2026, 1, 31, 12, 30, 5, 250_001)),
        ("2026-01-31T12:30Z", (2026, 1, 31, 12, 30), (2026, 1, 31, 12, 31)),
        ("2026-01-31T12:30+05:30", (2026, 1, 31, 7), (2026, 1, 31, 7, 1)),
        ("2026-01-01..2026-02-01", (2026, 1, 1), (2026, 2, 2)),
        (" 2025 .. 2026-06 ", (2025, 1, 1), (2026, 7, 1)),
    ],
)
def test_a_time_stands_for_all_of_what_is_written(written: str, first: tuple[int, ...], after: tuple[int, ...]):
    assert read_range(written) == (moment(*first), moment(*after))


def test_a_range_without_an_end_goes_on():
    times = np.array([NEVER, moment(1, 1, 1), moment(2026, 1, 1), moment(9999, 12, 31)])
    assert in_ranges(times, ["2026.."]).tolist() == [False, False, True, True]
    assert in_ranges(times, ["..2026"]).tolist() == [False, True, True, False]
    assert in_ranges(times, ["9999", "0001-01"]).tolist() == [False, True, False, True]
    assert in_ranges(times, []).tolist() == [False] * 4


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("", "a range of time is written 2026-01-31, .*; found ''"),
        ("..", "found '..'"),
        ("yesterday", "found 'yesterday'"),
        ("2026-1-5", "found '2026-1-5'"),
        ("2026..2027..2028", "found '2027..2028'"),
        ("٢٠٢٦", "is written"),
        ("2026-02-30", "'2026-02-30' is no time: day is out of range"),
        ("0000", "'0000' is no time: year 0 is out of range"),
        ("2026-01-01T25", "hour must be in 0..23"),
        ("2026-01-01T12:00+99:00", "is no time"),
        ("2027..2026", "'2027..2026' ends before it begins"),
    ],
)
def test_what_is_no_range_is_said(written: str, says: str):
    with pytest.raises(ValueError, match=says):
        read_range(written)


@given(st.datetimes(timezones=st.just(UTC)))
def test_a_time_is_spelled_as_it_is_read(time: datetime):
    number = (time - EPOCH) // datetime.resolution
    begin, end = read_range(spell(number))
    assert begin == number
    assert end - begin in (1, 1_000_000)


@given(st.text(max_size=40))
def test_no_words_are_another_error(words: str):
    try:
        begin, end = read_range(words)
    except ValueError:
        return
    assert begin < end
