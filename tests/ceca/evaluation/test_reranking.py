"""Figures of re-ranking by verdicts, and the weight of verdicts that help, tell nothing, or mislead."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ceca.evaluation.reranking import WEIGHTS, Best, learn_weight
from ceca.metrics import AHEAD, PER_QUERY, Matches, rank_strip
from ceca.search.reranking import rerank_by_verdicts

PEOPLE, IMAGES = 40, 4  # people of a gallery, and images of each


def figures_of(similarity: np.ndarray, queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    return rank_strip(similarity.copy(), Matches(queries, gallery), slice(0, len(queries)))


def best_of(similarity: np.ndarray, queries: np.ndarray, gallery: np.ndarray, count: int) -> tuple[Best, np.ndarray]:
    """The first images of each query, and their positions in the gallery."""
    first = np.argsort(-similarity, axis=1)[:, :count]
    best = Best(
        np.take_along_axis(similarity, first, axis=1),
        gallery[first] == queries[:, None],
        Matches(queries, gallery).count,
        queries,
        figures_of(similarity, queries, gallery),
    )
    return best, first


def test_a_query_by_hand():
    """Matches at ranks 2, 4 and 7; the first four are ranked again, and the two matches among them come first."""
    similarity = np.array([[0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]])
    gallery = np.array([0, 1, 0, 1, 0, 0, 1])
    best, _ = best_of(similarity, np.array([1]), gallery, 4)
    assert best.figures[0, 3] == pytest.approx((1 / 2 + 2 / 4 + 3 / 7) / 3)
    again = best.ranked_by(np.array([[0.1, 0.9, 0.2, 0.8]]))[0]
    rank1, rank5, rank10, precision, penalty, first = again[:6]
    assert (rank1, rank5, rank10, first) == (1, 1, 1, 1)
    assert precision == pytest.approx((1 / 1 + 2 / 2 + 3 / 7) / 3)
    assert penalty == pytest.approx(3 / 7)  # the last match is behind the first four


@given(st.integers(0, 2**32), st.integers(2, 12))
@settings(max_examples=50)
def test_the_figures_are_those_of_ranking_the_whole_gallery_again(seed: int, count: int):
    source = np.random.default_rng(seed)
    queries, gallery = source.integers(0, 6, 9), source.integers(0, 5, 12)  # person 5 is in no image
    similarity = source.permutation(9 * 12).reshape(9, 12) / 108
    best, first = best_of(similarity, queries, gallery, count)
    new = source.integers(0, 4, first.shape) / 4  # with equal similarities
    np.put_along_axis(similarity, first, new + AHEAD, axis=1)
    expected = figures_of(similarity, queries, gallery)
    columns = len(PER_QUERY) - 2  # the others are similarities
    assert np.allclose(best.ranked_by(new)[:, :columns], expected[:, :columns])
    assert np.array_equal(best.ranked_by(best.similarity), best.figures)


def learned(source: np.random.Generator, right: float, wrong: float, claims: int = 6) -> tuple[float, np.ndarray]:
    """The weight of verdicts that fit on own images at the rate `right` and on others at the rate `wrong`; and the
    gain of mAP on other queries with the same engine."""
    gains = []
    weight = 0.0
    for again in (False, True):
        gallery = np.repeat(np.arange(PEOPLE), IMAGES)
        queries = np.repeat(np.arange(PEOPLE), 2)
        own = gallery == queries[:, None]
        similarity = 0.3 + 0.08 * own + 0.05 * source.standard_normal(own.shape)
        best, first = best_of(similarity, queries, gallery, 10)
        fits = source.binomial(claims, np.where(np.take_along_axis(own, first, axis=1), right, wrong))
        support = 2 * fits - claims
        if not again:
            weight = learn_weight(best, support)
        ranked = best.ranked_by(rerank_by_verdicts(best.similarity, support, weight))
        gains.append(ranked[:, 3].mean() - best.figures[:, 3].mean())
    return weight, np.array(gains)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("right", "least"), [(0.95, 0.05), (0.85, 0.03), (0.7, 0.0)])
def test_verdicts_with_errors_raise_the_figures_of_queries_that_the_weight_was_not_learned_on(seed, right, least):
    weight, gains = learned(np.random.default_rng(seed), right, 0.5)
    assert weight > 0
    assert gains[1] > least


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("right", "wrong"), [(0.5, 0.5), (0.3, 0.6)])
def test_an_engine_that_guesses_or_misleads_gets_no_weight_and_changes_nothing(seed, right, wrong):
    weight, gains = learned(np.random.default_rng(seed), right, wrong)
    assert weight == 0
    assert gains.tolist() == [0, 0]


def test_a_gain_for_one_of_two_people_is_no_proof_and_a_gain_for_both_is():
    similarity = np.array([[0.5, 0.4], [0.5, 0.4]])
    own = np.array([[False, True], [True, False]])
    figures = np.zeros((2, 8))
    figures[:, 3] = 0.5, 1.0
    best = Best(similarity, own, np.array([1, 1]), np.array([0, 1]), figures)
    assert learn_weight(best, np.array([[-1, 1], [1, -1]])) == 0
    both = Best(similarity, own[[0, 0]], np.array([1, 1]), np.array([0, 1]), figures[[0, 0]])
    # Of the weights that put the second image first, the smallest.
    assert learn_weight(both, np.array([[-1, 1], [-1, 1]])) == min(w for w in WEIGHTS if 2 * w > 0.1)
