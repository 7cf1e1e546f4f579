"""Retrieval metrics against their definition in plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ceca.metrics import PER_QUERY, Matches, RetrievalMetrics, better, rank_embeddings, retrieval_metrics

SIZES = {
    "seed": st.integers(0, 10**6),
    "queries": st.integers(1, 9),
    "gallery": st.integers(1, 25),
    "people": st.integers(1, 6),
}


def metrics_by_loops(similarity, queries, gallery) -> list[float]:
    """Rank-1, 5, 10, mAP, mINP in percent; among equal similarities, other identities come first."""
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


def values(metrics) -> list[float]:
    names = ("rank1", "rank5", "rank10", "mean_average_precision", "mean_inverse_negative_penalty")
    return [getattr(metrics, name) for name in names]


@settings(max_examples=150, deadline=None)
@given(**SIZES, levels=st.integers(1, 40))
def test_metrics_equal_the_plain_loops_ties_and_missing_people_included(seed, queries, gallery, people, levels):
    random = np.random.default_rng(seed)
    similarity = random.integers(0, levels, (queries, gallery)) / levels
    described, shown = random.integers(0, people, queries), random.integers(0, people, gallery)
    metrics = retrieval_metrics(similarity, described, shown)
    assert values(metrics) == pytest.approx(metrics_by_loops(similarity, described, shown), abs=1e-9)
    assert metrics.rsum == pytest.approx(metrics.rank1 + metrics.rank5 + metrics.rank10)


@given(seed=st.integers(0, 10**6), block=st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_neither_blocks_nor_the_gallerys_order_matter(seed, block):
    random = np.random.default_rng(seed)
    similarity = random.integers(0, 5, (11, 20)) / 5
    described, shown, order = random.integers(0, 4, 11), random.integers(0, 4, 20), random.permutation(20)
    whole = retrieval_metrics(similarity, described, shown)
    assert values(retrieval_metrics(similarity, described, shown, block=block)) == pytest.approx(
        values(whole), abs=1e-9
    )
    shuffled = retrieval_metrics(similarity[:, order], described, shown[order])
    assert values(shuffled) == pytest.approx(values(whole), abs=1e-9)


def embedded(random: np.random.Generator, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Global and local embeddings on a coarse grid: sums are exact, and there are many ties."""
    return tuple(torch.from_numpy(random.integers(-2, 3, (rows, width)).astype(np.float32)) / 4 for width in (3, 5))


@settings(max_examples=60, deadline=None)
@given(**SIZES, strip=st.integers(1, 12))
def test_embeddings_rank_as_their_fused_similarity_does_for_every_omega_and_strip(
    seed, queries, gallery, people, strip
):
    random = np.random.default_rng(seed)
    texts, images = embedded(random, queries), embedded(random, gallery)
    described, shown = random.integers(0, people, queries), random.integers(0, people, gallery)
    omegas = (0.0, 0.25, 0.5, 1.0)
    figures = rank_embeddings(texts, images, Matches(described, shown), omegas, strip=strip)
    ranks = rank_embeddings(texts, images, Matches(described, shown), omegas, strip=strip, only_first=True)
    for omega in omegas:
        similarity = ((1 - omega) * texts[0] @ images[0].T + omega * texts[1] @ images[1].T).numpy()
        expected = metrics_by_loops(similarity, described, shown)
        assert values(RetrievalMetrics.of(figures[omega])) == pytest.approx(expected, abs=1e-9)
        assert values(RetrievalMetrics.of(ranks[omega]))[:3] == pytest.approx(expected[:3], abs=1e-9)
        assert np.array_equal(ranks[omega][:, 5], figures[omega][:, 5])


def test_the_figures_of_a_query_name_the_position_of_its_first_match():
    whole = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0]])
    gallery = torch.tensor([[1.0, 0], [0.8, 0.6], [0.6, 0.8]]), torch.ones(3, 1)
    (figures,) = rank_embeddings(whole, gallery, Matches([7], [1, 7, 7]), [0.0])[0.0]
    expected = {"rank1": 0, "rank5": 1, "rank10": 1, "average_precision": (1 / 2 + 2 / 3) / 2}
    expected |= {"inverse_negative_penalty": 2 / 3, "first": 2}
    expected |= {"best_own": 0.8, "best_other": 1.0}
    assert dict(zip(PER_QUERY, figures.tolist(), strict=True)) == pytest.approx(expected)


def test_some_queries_rank_as_they_do_among_all():
    random = np.random.default_rng(0)
    texts, images = embedded(random, 10), embedded(random, 30)
    matches = Matches(random.integers(0, 5, 10), random.integers(0, 5, 30))
    whole = rank_embeddings(texts, images, matches, [0.3])[0.3]
    part = rank_embeddings(tuple(side[4:7] for side in texts), images, matches.of(slice(4, 7)), [0.3])[0.3]
    np.testing.assert_allclose(part, whole[4:7], rtol=1e-12)


def test_embeddings_that_are_not_numbers_or_not_as_many_as_their_identities_are_refused():
    texts, images = embedded(np.random.default_rng(0), 2), embedded(np.random.default_rng(1), 4)
    with pytest.raises(ValueError, match="2 queries and 3 images"):
        rank_embeddings(texts, images, Matches([1, 2], [1, 2, 3]), [0.3])
    images[0][2, 0] = float("nan")
    for only_first in (False, True):
        with pytest.raises(ValueError, match="NaN"):
            rank_embeddings(texts, images, Matches([1, 2], [1, 2, 3, 4]), [0.3], only_first=only_first)


def test_a_model_that_cannot_tell_images_apart_scores_worst():
    # One match among four equal images ranks last, at 4.
    metrics = retrieval_metrics(np.zeros((1, 4)), [1], [1, 2, 3, 4])
    assert values(metrics) == pytest.approx([0, 100, 100, 25, 25])


def test_a_person_who_is_not_in_the_gallery_counts_as_a_miss():
    metrics = retrieval_metrics(np.array([[0.9, 0.1], [0.9, 0.1]]), [1, 5], [1, 2])
    assert values(metrics) == pytest.approx([50, 50, 50, 50, 50])


def test_one_query_by_hand():
    # Order by similarity: no, yes, no, yes: AP = (1/2 + 2/4) / 2, INP = 2/4.
    metrics = retrieval_metrics(torch.tensor([[0.9, 0.8, 0.7, 0.6]]), torch.tensor([1]), torch.tensor([2, 1, 3, 1]))
    assert values(metrics) == pytest.approx([0, 100, 100, 50, 50])
    assert metrics.rsum == pytest.approx(200)


def test_a_similarity_that_is_not_a_number_is_refused():
    with pytest.raises(ValueError, match="NaN"):
        retrieval_metrics(np.array([[float("nan")]]), [1], [1])


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\[2, 3\]"):
        retrieval_metrics(np.zeros((3, 2)), [1, 2], [1, 2, 3])
    with pytest.raises(ValueError, match="not empty"):
        retrieval_metrics(np.zeros((0, 3)), [], [1, 2, 3])


def test_reranked_images_come_first_in_the_order_of_the_definition():
    source = torch.Generator().manual_seed(0)
    queries, gallery = (
        tuple(torch.nn.functional.normalize(torch.randn(count, width, generator=source), dim=1) for width in (4, 6))
        for count in (5, 30)
    )
    described, shown = np.arange(5) % 3, np.arange(30) % 3
    matches, omega, most = Matches(described, shown), 0.3, 12
    figures = rank_embeddings(queries, gallery, matches, [omega], rerank_first=most)[omega]
    between = (1 - omega) * gallery[0] @ gallery[0].T + omega * gallery[1] @ gallery[1].T
    orders = []
    for q in range(5):
        s = (1 - omega) * gallery[0] @ queries[0][q] + omega * gallery[1] @ queries[1][q]
        order = s.argsort(descending=True)
        best, first = order[:most], order[:5]
        weights = torch.exp(s[first] / 0.05) / torch.exp(s[first] / 0.05).sum()
        again = torch.tensor(
            [0.7 * s[i] + 0.3 * sum(w * between[j, i] for w, j in zip(weights, first, strict=True)) for i in best]
        )
        orders.append([*best[again.argsort(descending=True)].tolist(), *order[most:].tolist()])
    for q, order in enumerate(orders):
        hits = [place for place, column in enumerate(order, 1) if shown[column] == described[q]]
        assert figures[q][PER_QUERY.index("first")] == hits[0]
        precision = sum(n / place for n, place in enumerate(hits, 1)) / len(hits)
        assert figures[q][PER_QUERY.index("average_precision")] == pytest.approx(precision)
    assert np.array_equal(
        rank_embeddings(queries, gallery, matches, [omega], rerank_first=0)[omega],
        rank_embeddings(queries, gallery, matches, [omega])[omega],
    )


def test_a_better_epoch_has_a_higher_rank_1_or_the_same_and_a_higher_map():
    keys = ("rank1", "map")
    best = {"rank1": 50.0, "map": 40.0}
    assert better(best, None, keys)
    assert not better(best, best, keys)
    assert better({"rank1": 50.1, "map": 1.0}, best, keys)
    assert better({"rank1": 50.0, "map": 40.1}, best, keys)
    assert not better({"rank1": 49.9, "map": 99.0}, best, keys)
