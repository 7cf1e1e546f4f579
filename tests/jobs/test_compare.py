"""What `ceca compare` trains and evaluates for a method, and how it sums the seeds up."""

from __future__ import annotations

import pytest

from ceca.errors import UserError
from jobs.compare import plan, summarise


def test_a_method_is_trained_under_its_own_name_with_its_own_seed():
    _, training, evaluation = plan("irra", "tiny", 2, "test")
    assert (training.name, training.seed, evaluation.model) == ("irra-2", 2, "irra-2")
    assert training.losses.terms == ("sdm", "identity", "words")
    assert training.model.backbone == "ceca-tiny"


def test_a_method_that_says_nothing_of_training_takes_the_models_of_ceca():
    _, training, evaluation = plan("agreement", "tiny", 1, "test")
    _, cecas_training, cecas_evaluation = plan("ceca", "tiny", 1, "test")
    assert training == cecas_training
    assert (evaluation.model, evaluation.neighbours) == ("ceca-1", 3)
    assert cecas_evaluation.neighbours == 0


def test_a_method_that_makes_other_dialogues_is_not_compared_on_those_that_are_there():
    with pytest.raises(UserError, match=r"`ceca dialogue --recipe common_summaries\+tiny` on a dataset of its own"):
        plan("common_summaries", "tiny", 0, "test")


def test_the_table_has_the_mean_and_the_deviation_of_the_sample():
    metrics = ("rank1", "rank5", "rank10", "mean_average_precision", "mean_inverse_negative_penalty", "rsum")
    found = summarise([dict.fromkeys(metrics, value) for value in (10.0, 12.0, 17.0)])
    assert found["rank1"] == pytest.approx((13.0, 13**0.5))
    assert summarise([dict.fromkeys(metrics, 10.0)])["rsum"] == (10.0, 0.0)
