"""What the engine answers itself: images agree with what the likely ones show."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.selfanswers import own_support, stated_support
from ceca.dialogue.verdicts import Claim
from ceca.evaluation.reranking import Best
from jobs.evaluations.reranking import Side

SEEN = {"a": {"hat": "cap", "bag": "red"}, "b": {"hat": "none", "bag": "red"}, "c": {"hat": "none"}}
VOCABULARY = {"hat": ("none", "cap"), "bag": ("red", "blue")}
SIMILARITY = np.array([[0.1 * math.log(2), 0.0, 0.0]])  # beliefs 1/2, 1/4, 1/4
SIDE = Side(
    Best(SIMILARITY, np.zeros((1, 3), bool), np.array([1]), np.array([1]), np.zeros((1, 8))),
    np.array([["a", "b", "c"]], object),
    [(Claim("bag", "blue"), Claim("bag", "red"), Claim("hat", "none"))],
)


def test_claims_that_fit_count_against_those_that_differ():
    assert stated_support(SIDE, SEEN).tolist() == [[-1, 1, 1]]


def test_what_the_likely_images_show_is_taken_for_the_answer():
    nothing_stated = Side(SIDE.best, SIDE.ids, [()])
    agreement, questions = own_support(nothing_stated, SIMILARITY, SEEN, VOCABULARY, 1)
    # The hat tells most: half of the belief has a cap, half has none. Σ P² = 1/2, so each agrees by 0.
    assert agreement == pytest.approx(np.zeros((1, 3)))
    assert questions == 3
    likely = np.array([[0.1 * math.log(6), 0.0, 0.0]])  # 3/4, 1/8, 1/8: Σ P² = 10/16
    agreement, _ = own_support(nothing_stated, likely, SEEN, VOCABULARY, 1)
    assert agreement == pytest.approx(np.array([[12 / 16, 4 / 16, 4 / 16]]) - 10 / 16)


def test_what_the_description_states_is_not_asked():
    agreement, questions = own_support(SIDE, SIMILARITY, SEEN, VOCABULARY, 3)
    assert (agreement.tolist(), questions) == ([[0.0, 0.0, 0.0]], 0.0)
