"""Confidence in first hits, and searches for people who are not there."""

from __future__ import annotations

import collections
import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ceca.data.store import Store
from ceca.datasets.drawn.attributes import sample_person
from ceca.evaluation.open_set import Trials, alarm_curve, calibrate, isotonic, open_set, rates
from ceca.metrics import PER_QUERY, Matches, rank_strip
from ceca.search.confidence import Calibration, NoConfidence, read_calibration, require_confidence
from ceca.search.ranking import Hit


def per_query(*pairs: tuple[float, float]) -> np.ndarray:
    """Figures of queries: similarity of the best image of the person, and of the best other image."""
    figures = np.zeros((len(pairs), len(PER_QUERY)))
    figures[:, [PER_QUERY.index(name) for name in ("best_own", "best_other")]] = pairs
    return figures


def test_a_query_is_asked_with_and_without_the_images_of_its_person():
    trials = Trials.of(per_query((0.9, 0.5), (0.4, 0.6), (-np.inf, 0.7), (0.8, -np.inf)))
    assert trials.there.tolist() == [0.9, 0.6, 0.8]
    assert trials.right.tolist() == [True, False, True]
    assert trials.absent.tolist() == [0.5, 0.6, 0.7]


def test_the_figures_of_a_query_are_the_best_of_its_own_and_of_the_other_images():
    similarity = np.random.default_rng(0).random((6, 20))
    described, shown = np.array([0, 1, 2, 3, 9, 0]), np.arange(20) % 5
    figures = rank_strip(similarity.copy(), Matches(described, shown), slice(0, 6))
    own = described[:, None] == shown
    assert figures[:, 6] == pytest.approx(np.where(own, similarity, -np.inf).max(axis=1))
    assert figures[:, 7] == pytest.approx(np.where(own, -np.inf, similarity).max(axis=1))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 8), st.booleans(), st.integers(1, 3)), min_size=1, max_size=25))
def test_pools_are_the_isotonic_regression_by_its_definition(trials):
    x, y, weights = (np.array(column, float) for column in zip(*trials, strict=True))
    at, value = isotonic(x, y, weights)
    assert (np.diff(at) > 0).all()
    assert (np.diff(value) > 0).all()
    for here in np.unique(x):  # the largest mean, over all that end here or later, of the smallest that begin before
        by_min_max = max(
            min(
                np.average(y[(x >= low) & (x <= high)], weights=weights[(x >= low) & (x <= high)])
                for high in np.unique(x[x >= here])
            )
            for low in np.unique(x[x <= here])
        )
        assert np.isclose(value, by_min_max).any()


def asked_for(seed: int, people: int, images: int = 2) -> tuple[np.ndarray, int]:
    """Figures of searches for drawn people, and the number of images.

    A sentence and an image each tell most attributes of a person. Shared attributes, rare ones more, stand for a model;
    the people, and who looks like whom, are those of the drawn datasets.
    """
    rng = np.random.default_rng(seed)
    drawn = [dataclasses.asdict(sample_person(rng)) for _ in range(people)]
    shares = collections.Counter(trait for person in drawn for trait in person.items())
    place = {trait: number for number, trait in enumerate(sorted(shares))}
    told = np.zeros((people, images + 1, len(place)))
    for number, person in enumerate(drawn):
        for trait in person.items():
            told[number, :, place[trait]] = np.log(people / shares[trait]) * (rng.random(images + 1) < 0.85)
    told /= np.linalg.norm(told, axis=2, keepdims=True)
    matches = Matches(np.arange(people), np.repeat(np.arange(people), images))
    similarity = told[:, 0] @ told[:, 1:].reshape(people * images, -1).T
    return rank_strip(similarity, matches, slice(0, people)), people * images


@pytest.mark.parametrize("people", [400, 800], ids=["as many people", "twice as many people"])
def test_a_confidence_chosen_for_5_percent_false_alarms_on_validation_gives_3_to_8_percent_on_test(people: int):
    figures, images = asked_for(2, 400)
    calibration = calibrate(Trials.of(figures), 0.3, images)
    chosen = dict(calibration.min_confidence)[0.05]
    assert chosen is not None
    assert rates(calibration, Trials.of(figures), chosen, images)[0] == pytest.approx(0.05, abs=0.005)
    figures, more_images = asked_for(52, people)
    trials = Trials.of(figures)
    measured = open_set(trials, more_images, calibration)["confidence"]
    assert measured["calibration_error"] < 0.06
    (rate,) = (rate for rate in measured["rates"] if rate["chosen_for"] == 0.05)
    assert rate["min_confidence"] == chosen
    assert 0.03 <= rate["false_alarms"] <= 0.08
    assert rate["identified"] > 0.9
    as_if_equal, _ = rates(calibration, trials, chosen, images)
    assert (rate["false_alarms"] < as_if_equal) == (more_images > images)


def test_more_is_identified_where_more_false_alarms_are_allowed():
    trials = Trials.of(asked_for(3, 100)[0])
    points = np.array(alarm_curve(trials))
    assert (np.diff(points, axis=0) >= 0).all()
    figures = open_set(trials, 200, None)
    assert "confidence" not in figures
    by_share = [rate["identified"] for rate in figures["rates"]]
    assert by_share == sorted(by_share)


def test_odds_fall_as_the_gallery_grows_and_no_confidence_is_certain():
    calibration = calibrate(Trials.of(per_query(*[(0.9, 0.1)] * 50, *[(0.2, 0.3)] * 50)), 0.3, 1000)
    low, high = calibration.confidence(np.array([-1.0, 1.0]), 1000)
    assert 0 < low < 0.1 < 0.9 < high < 1
    at = calibration.confidence(0.6, 1000)
    ten = calibration.confidence(0.6, 10_000)
    assert ten / (1 - ten) == pytest.approx(at / (1 - at) / 10)


def test_where_nobody_is_ever_told_apart_no_confidence_is_chosen():
    calibration = calibrate(Trials.of(per_query(*[(0.5, 0.5)] * 40)), 0.3, 10)
    assert dict(calibration.min_confidence) == {0.01: None, 0.05: None, 0.1: None}
    assert open_set(Trials.of(per_query((0.4, 0.3))), 10, calibration)["confidence"]["rates"] == []


def test_a_calibration_is_read_from_the_evaluation_of_the_validation_split(tmp_path):
    store = Store(str(tmp_path))
    assert read_calibration(store, "0123") is None
    store.write_json({"metrics": {}}, "evaluations", "0123", "val.json")
    assert read_calibration(store, "0123") is None
    calibration = Calibration(0.3, 100, (0.2, 0.8), (0.1, 0.9), ((0.05, 0.7), (0.01, None)))
    kept = json.loads(json.dumps(calibration.__dict__))
    store.write_json({"calibration": kept}, "evaluations", "0123", "val.json")
    assert read_calibration(store, "0123") == calibration


def test_the_confidence_of_a_search_is_that_of_its_most_similar_hit_and_of_this_omega_alone():
    calibration = Calibration(0.3, 100, (0.2, 0.8), (0.1, 0.9), ())
    hits = [Hit("a", 1, 0.4, 0, 0), Hit("b", 2, 0.5, 0, 0)]
    assert calibration.of_hits(hits, 0.3, 100) == pytest.approx(0.5)
    assert calibration.of_hits(hits, 0.5, 100) is None
    assert calibration.of_hits([], 0.3, 100) is None
    require_confidence(calibration, 0.3)
    with pytest.raises(NoConfidence, match=r"calibrated for ω = 0\.3, but this search has 0\.5"):
        require_confidence(calibration, 0.5)
    with pytest.raises(NoConfidence, match="ceca evaluate --split val"):
        require_confidence(None, 0.3)
