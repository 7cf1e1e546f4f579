"""Filters: which images a search may find, and the errors for unknown facets and values."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from ceca.search.columns import NEVER
from ceca.search.facets import FacetError, Facets, parse_conditions


def facets() -> Facets:
    columns = {"camera": ["c1", "c2", None, "c1", "c3"], "hat": ["cap", None, "cap", "none", "cap"]}
    return Facets({name: pa.array(values).dictionary_encode() for name, values in columns.items()}, 5)


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        ((), [0, 1, 2, 3, 4]),
        (("camera=c1",), [0, 3]),
        (("camera=c1,c3",), [0, 3, 4]),
        (("camera=c1", "camera = c2"), [0, 1, 3]),
        (("camera=c1,c2", "hat=cap"), [0]),
        (("camera=c2", "hat=cap"), []),
    ],
)
def test_images_must_have_one_value_of_every_facet_named(words: tuple[str, ...], rows: list[int]):
    assert np.flatnonzero(facets().where(parse_conditions(words))).tolist() == rows


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("colour=red",), "no facet 'colour' to filter by; there are camera, hat"),
        (("hat=beret",), "no image has hat 'beret'; there are cap, none"),
        (("hat",), "a condition is written facet=value"),
    ],
)
def test_what_is_not_there_is_said_with_what_is(words: tuple[str, ...], says: str):
    with pytest.raises(FacetError, match=says):
        facets().where(parse_conditions(words))


def timed() -> Facets:
    """Images of 1970-01-01, of the next day, and one without a time."""
    return Facets(facets().columns, 5, np.array([0, 1, 24 * 3600 * 1_000_000, NEVER, 1]))


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        (("time=1970-01-01",), [0, 1, 4]),
        (("time=1970-01-01..1970-01-02",), [0, 1, 2, 4]),
        (("time=1970-01-02..", "hat=cap"), [2]),
        (("time=1970-01-01T00:00:00.000001,1970-01-02",), [1, 2, 4]),
        (("time=1971..",), []),
    ],
)
def test_images_must_be_of_one_of_the_ranges_of_time(words: tuple[str, ...], rows: list[int]):
    assert np.flatnonzero(timed().where(parse_conditions(words))).tolist() == rows


def test_the_values_of_time_are_the_first_and_the_last():
    assert timed().names == ["camera", "hat", "time"]
    assert timed().values("time") == ["1970-01-01T00:00:00Z", "1970-01-02T00:00:00Z"]


def test_a_wrong_range_of_time_is_said_and_without_times_there_is_no_such_facet():
    with pytest.raises(FacetError, match="found 'noon'"):
        timed().where({"time": ["1970", "noon"]})
    with pytest.raises(FacetError, match="no range of time was given"):
        timed().where({"time": []})
    with pytest.raises(FacetError, match="no facet 'time' to filter by; there are camera, hat"):
        facets().where({"time": ["1970"]})
    assert not facets().mask({"time": ["1970"]}).any()  # a shard without times


def test_an_error_does_not_list_thousands_of_people():
    many = Facets({"identity": pa.array([str(n) for n in range(1000)]).dictionary_encode()}, 1000)
    with pytest.raises(FacetError, match="and 980 more"):
        many.where({"identity": ["nobody"]})
