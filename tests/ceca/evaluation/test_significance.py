"""The paired bootstrap on cases with a known answer."""

from __future__ import annotations

import numpy as np
import pytest

from ceca.evaluation.significance import paired_bootstrap


def test_the_same_run_twice_differs_by_nothing():
    figures = np.random.default_rng(0).random(50)
    result = paired_bootstrap(figures, figures, np.arange(50))
    assert (result.mean, result.low, result.high, result.p) == (0, 0, 0, 1)


def test_a_run_that_is_better_for_everybody_is_significantly_better_by_just_that():
    figures = np.random.default_rng(0).random(50)
    result = paired_bootstrap(figures, figures + 0.1, np.arange(50))
    assert (result.mean, result.low, result.high) == pytest.approx((0.1, 0.1, 0.1))
    assert result.p < 0.001


def test_the_interval_is_that_of_the_normal_distribution_where_queries_are_independent():
    source = np.random.default_rng(1)
    difference = source.normal(0.5, 2.0, 1000)
    result = paired_bootstrap(np.zeros(1000), difference, np.arange(1000))
    half = 1.96 * difference.std() / 1000**0.5
    assert result.low == pytest.approx(difference.mean() - half, abs=0.01)
    assert result.high == pytest.approx(difference.mean() + half, abs=0.01)


def test_sentences_about_one_person_count_together():
    # Ten people, each described by 100 sentences that agree. They tell no more than ten sentences.
    people = np.repeat(np.arange(10), 100)
    difference = np.repeat(np.random.default_rng(2).normal(0.3, 1.0, 10), 100)
    together = paired_bootstrap(np.zeros(1000), difference, people)
    alone = paired_bootstrap(np.zeros(1000), difference, np.arange(1000))
    assert together.high - together.low > 5 * (alone.high - alone.low)


def test_runs_over_other_queries_are_refused():
    with pytest.raises(ValueError, match="share their queries, found 2, 3 and 3"):
        paired_bootstrap(np.zeros(2), np.zeros(3), np.zeros(3))
