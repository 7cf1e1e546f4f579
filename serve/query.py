"""A search on its way through the service: the query as the ingress gets it, and the query that one shard gets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from ceca.search.edition import Edition
from serve.audit import hashed
from serve.schema import Rerank

# Normalised global and local embeddings: [D] and [E] of one item, [N, D] and [N, E] of several.
Embeddings = tuple[np.ndarray, np.ndarray]

Conditions = tuple[tuple[str, tuple[str, ...]], ...]  # facets and their values, hashable so that a mask can be cached


@dataclasses.dataclass(frozen=True)
class Like:
    """An image of the gallery, by id, as the sample to search with."""

    image_id: str


@dataclasses.dataclass(frozen=True)
class Query:
    """One search.

    Args:
        sample: what to search with: a description, an encoded image, or an image of the gallery.
        omega: ω, the weight of the local similarity, 0 … 1.
        top_k: number of images to return.
        offset: the first of them that is shown; the texts of those before are not read.
        where: facet → values; an image must have one of the values of every facet.
        answers: facet → the user's answer; None if the user does not know.
        suggest: also return the question whose answer would tell most.
        min_confidence: least confidence in the most similar image; below it there is no hit.
        rerank: let an engine look at the best images; None does not.
    """

    sample: str | bytes | Like
    omega: float
    top_k: int
    offset: int = 0
    where: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    answers: Mapping[str, str | None] = dataclasses.field(default_factory=dict)
    suggest: bool = False
    min_confidence: float = 0.0
    rerank: Rerank | None = None

    @property
    def text(self) -> str | None:
        """The description; None if the query is an image."""
        return self.sample if isinstance(self.sample, str) else None

    @property
    def in_conversation(self) -> bool:
        return self.suggest or bool(self.answers)

    @property
    def logged(self) -> str:
        """A hash of the sample, which the log holds in place of the words or the image."""
        return hashed(self.sample.image_id if isinstance(self.sample, Like) else self.sample)


@dataclasses.dataclass(frozen=True)
class ShardQuery:
    """A query to one shard of a gallery.

    Args:
        edition: the shard's edition.
        global_embedding: [D], normalised.
        local_embedding: [E], normalised.
        omega: ω, the weight of the local similarity.
        top_k: number of images to return.
        where: conditions that an image must fulfil.
        with_rows: return the images' embeddings too, for re-ranking.
        shards: number of shards that the gallery is cut into; it changes while a service is deployed again.
    """

    edition: Edition
    global_embedding: np.ndarray
    local_embedding: np.ndarray
    omega: float
    top_k: int
    where: Conditions = ()
    with_rows: bool = False
    shards: int = 1


def freeze(where: Mapping[str, Sequence[str]]) -> Conditions:
    """Conditions in a fixed order and hashable, so that equal ones are one kind of query."""
    return tuple((name, tuple(values)) for name, values in sorted(where.items()))
