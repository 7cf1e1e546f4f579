"""Errors by attribute, for drawn pedestrians: their true attributes are known."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# How an image was drawn: a condition's name → its column of the table of attributes.
CONDITIONS = {"view": "view", "light": "lighting", "hidden in part": "occluded"}


@dataclasses.dataclass(frozen=True)
class AttributeErrors:
    """Errors of a model's first places.

    Attributes:
        confused: attribute → (share of wrong first places that differ in it, the same for random other people).
        rank1: condition → (Rank-1 in percent, queries) of the queries about images drawn so.
        wrong: queries whose first place is another person.
        queries: all queries.
    """

    confused: dict[str, tuple[float, float]]
    rank1: dict[str, tuple[float, int]]
    wrong: int
    queries: int


def attribute_errors(
    queries: Sequence[Mapping[str, Any]],
    gallery: Sequence[Mapping[str, Any]],
    query_identities: np.ndarray,
    gallery_identities: np.ndarray,
    first: np.ndarray,
) -> AttributeErrors:
    """Compare the true attributes of the person described with those of the first place.

    Args:
        queries: the row of the table of attributes for each query's image, `attributes` as a mapping.
        gallery: the same for each gallery image.
        query_identities: [Q].
        gallery_identities: [G].
        first: [Q] gallery position of each query's first place.
    """
    right = gallery_identities[first] == query_identities
    stranger = np.random.default_rng(0).integers(len(gallery), size=len(queries))
    differs_in_identity = gallery_identities[stranger] != query_identities
    confused = {}
    for name in sorted({name for row in gallery for name in row["attributes"]}):
        wanted, has = (np.array([row["attributes"].get(name, "") for row in rows]) for rows in (queries, gallery))
        by_model, by_chance = (wanted != has[position] for position in (first, stranger))
        confused[name] = (
            float(by_model[~right].mean()) if (~right).any() else 0.0,
            float(by_chance[differs_in_identity].mean()),
        )
    rank1 = {}
    for condition, column in CONDITIONS.items():
        values = np.array([str(row[column]).lower() for row in queries])
        for value in sorted(set(values.tolist())):
            chosen = values == value
            rank1[f"{condition}: {value}"] = (100 * float(right[chosen].mean()), int(chosen.sum()))
    return AttributeErrors(confused, rank1, int((~right).sum()), len(right))
