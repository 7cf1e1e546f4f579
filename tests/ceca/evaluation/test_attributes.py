"""Errors by attribute, on a gallery whose errors are known."""

from __future__ import annotations

import numpy as np
import pytest

from ceca.evaluation.attributes import attribute_errors


def drawn(hat: str, coat: str, view: str) -> dict[str, object]:
    return {"attributes": {"hat": hat, "coat": coat}, "view": view, "lighting": "day", "occluded": False}


def test_a_wrong_first_place_counts_for_the_attributes_in_which_it_differs():
    gallery = [drawn("cap", "red", "front"), drawn("cap", "blue", "back"), drawn("none", "red", "front")]
    identities = np.arange(3)
    # The first query is answered right, the second by the first person, the third by the second.
    errors = attribute_errors(gallery, gallery, identities, identities, np.array([0, 0, 1]))
    assert (errors.wrong, errors.queries) == (2, 3)
    assert {name: wrong for name, (wrong, _) in errors.confused.items()} == {"hat": 0.5, "coat": 1.0}
    assert errors.rank1 == {
        "view: back": (0.0, 1),
        "view: front": (50.0, 2),
        "light: day": (pytest.approx(100 / 3), 3),
        "hidden in part: false": (pytest.approx(100 / 3), 3),
    }


def test_without_a_wrong_first_place_nothing_is_confused():
    gallery = [drawn("cap", "red", "front"), drawn("none", "blue", "back")]
    errors = attribute_errors(gallery, gallery, np.arange(2), np.arange(2), np.arange(2))
    assert errors.wrong == 0
    assert {wrong for wrong, _ in errors.confused.values()} == {0.0}
