"""Re-ranking by verdicts: the formula on small cases."""

from __future__ import annotations

import numpy as np

from ceca.search.reranking import rerank_by_verdicts, support, worth_asking


def test_support_counts_what_fits_against_what_differs():
    assert support(["fits", "unseen", "fits", "differs"]) == 1
    assert support(["differs", "differs"]) == -2
    assert support([]) == 0


def test_verdicts_move_an_image_by_their_weight():
    similarity, supported = np.array([[0.5, 0.48, 0.3]]), np.array([[-1, 1, 2]])
    assert np.allclose(rerank_by_verdicts(similarity, supported, 0.02), [[0.48, 0.5, 0.34]])
    assert np.array_equal(rerank_by_verdicts(similarity, supported, 0.0), similarity)


def test_only_queries_whose_first_two_are_close_are_worth_asking():
    similarity = np.array([[0.5, 0.25, 0.1], [0.5, 0.5, 0.4], [0.5, 0.375, 0.0]])
    assert worth_asking(similarity, 0.125).tolist() == [False, True, True]
    assert worth_asking(similarity, None).tolist() == [True, True, True]


def test_a_single_image_has_no_order_to_change():
    assert worth_asking(np.array([[0.5], [0.1]]), None).tolist() == [False, False]
