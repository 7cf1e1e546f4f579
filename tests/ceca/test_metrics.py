"""Retrieval metrics against a definition in plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ceca.metrics import retrieval_metrics


def metrics_by_loops(similarity, queries, gallery) -> list[float]:
    """Rank-1, 5, 10, mAP, mINP in percent; of equal similarities, the non-matches come first."""
    rows = []
    for q, identity in enumerate(queries):
        order = sorted(range(len(gallery)), key=lambda g: (-similarity[q][g], gallery[g] == identity))
        hits = [position for position, g in enumerate(order, 1) if gallery[g] == identity]
        if not hits:
            rows.append([0.0] * 5)
            continue
        precision = [number / position for number, position in enumerate(hits, 1)]
        rows.append([*(float(hits[0] <= k) for k in (1, 5, 10)), sum(precision) / len(hits), len(hits) / hits[-1]])
    return [100 * sum(column) / len(rows) for column in zip(*rows, strict=True)]


def values(found) -> list[float]:
    names = ("rank1", "rank5", "rank10", "mean_average_precision", "mean_inverse_negative_penalty")
    return [getattr(found, name) for name in names]


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    queries=st.integers(1, 9),
    gallery=st.integers(1, 25),
    people=st.integers(1, 6),
    levels=st.integers(1, 40),
)
def test_metrics_equal_the_plain_loops_ties_and_missing_people_included(seed, queries, gallery, people, levels):
    random = np.random.default_rng(seed)
    similarity = random.integers(0, levels, (queries, gallery)) / levels
    asked, there = random.integers(0, people, queries), random.integers(0, people, gallery)
    found = retrieval_metrics(similarity, asked, there)
    assert values(found) == pytest.approx(metrics_by_loops(similarity, asked, there), abs=1e-9)
    assert found.rsum == pytest.approx(found.rank1 + found.rank5 + found.rank10)


@given(seed=st.integers(0, 10**6), block=st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_neither_blocks_nor_the_gallerys_order_matter(seed, block):
    random = np.random.default_rng(seed)
    similarity = random.integers(0, 5, (11, 20)) / 5
    asked, there, order = random.integers(0, 4, 11), random.integers(0, 4, 20), random.permutation(20)
    whole = retrieval_metrics(similarity, asked, there)
    assert values(retrieval_metrics(similarity, asked, there, block=block)) == pytest.approx(values(whole), abs=1e-9)
    shuffled = retrieval_metrics(similarity[:, order], asked, there[order])
    assert values(shuffled) == pytest.approx(values(whole), abs=1e-9)


def test_a_model_that_cannot_tell_images_apart_scores_worst():
    # One match among four equal images: it ranks last, at 4.
    found = retrieval_metrics(np.zeros((1, 4)), [1], [1, 2, 3, 4])
    assert values(found) == pytest.approx([0, 100, 100, 25, 25])


def test_a_person_who_is_not_in_the_gallery_counts_as_a_miss():
    found = retrieval_metrics(np.array([[0.9, 0.1], [0.9, 0.1]]), [1, 5], [1, 2])
    assert values(found) == pytest.approx([50, 50, 50, 50, 50])


def test_one_query_by_hand():
    # Order by similarity: no, yes, no, yes: AP = (1/2 + 2/4) / 2, INP = 2/4.
    found = retrieval_metrics(torch.tensor([[0.9, 0.8, 0.7, 0.6]]), torch.tensor([1]), torch.tensor([2, 1, 3, 1]))
    assert values(found) == pytest.approx([0, 100, 100, 50, 50])
    assert found.rsum == pytest.approx(200)


def test_a_similarity_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        retrieval_metrics(np.array([[float("nan")]]), [1], [1])


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        retrieval_metrics(np.zeros((3, 2)), [1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="not empty"):
        retrieval_metrics(np.zeros((0, 3)), [], [1, 2, 3])
