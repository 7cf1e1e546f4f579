"""Merging the candidates of shards into one list."""

from __future__ import annotations

import numpy as np

from ceca.search.ranking import Candidates, rank


def candidates(**similarity: float) -> Candidates:
    values = np.array(list(similarity.values()), dtype=np.float32)
    return Candidates(list(similarity), [0] * len(values), values, values, values, None)


def test_shards_become_one_list_by_similarity_and_then_by_id() -> None:
    hits = rank([candidates(c=0.5, a=0.25), candidates(d=0.75, b=0.5)], top_k=3, omega=0.3)
    assert [(hit.image_id, hit.similarity) for hit in hits] == [("d", 0.75), ("b", 0.5), ("c", 0.5)]


def test_an_image_that_two_shards_hold_for_a_moment_is_one_hit() -> None:
    hits = rank([candidates(a=0.5, b=0.25), candidates(a=0.5, c=0.125)], top_k=3, omega=0.3)
    assert [hit.image_id for hit in hits] == ["a", "b", "c"]
