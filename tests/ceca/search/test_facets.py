"""Filters: which images a search may find, and the errors for unknown facets and values."""

from __future__ import annotations

import pyarrow as pa
import pytest

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
    assert facets().where(parse_conditions(words)).nonzero()[:, 0].tolist() == rows


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


def test_an_error_does_not_list_thousands_of_people():
    many = Facets({"identity": pa.array([str(n) for n in range(1000)]).dictionary_encode()}, 1000)
    with pytest.raises(FacetError, match="and 980 more"):
        many.where({"identity": ["nobody"]})
