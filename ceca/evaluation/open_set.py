"""Queries about people who are not in the gallery: how often a search names somebody all the same (open set).

Each query is asked twice: of the whole gallery, and of the gallery without the images of its person. Both follow from
two figures of a query (`ceca.metrics`): the similarity of the best image of its person, and of the best other image.

    identified     the person is there, the first hit shows them, and it is similar enough
    false alarm    the person is not there, and the first hit is similar enough
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ceca.metrics import PER_QUERY
from ceca.search.confidence import Calibration

FALSE_ALARMS = (0.01, 0.05, 0.1)  # shares at which figures are given
BINS = 10  # of a reliability diagram, of equally many queries


@dataclasses.dataclass(frozen=True)
class Trials:
    """Queries that were asked twice.

    Attributes:
        there: [T] similarity of the first hit where the person is in the gallery.
        right: [T] whether that hit shows the person.
        absent: [A] similarity of the first hit without the person's images.
    """

    there: np.ndarray
    right: np.ndarray
    absent: np.ndarray

    @classmethod
    def of(cls, per_query: np.ndarray) -> Trials:
        """The trials of an evaluation's figures [Q, 8], columns `PER_QUERY`."""
        own, other = (per_query[:, PER_QUERY.index(name)] for name in ("best_own", "best_other"))
        known = np.isfinite(own)
        return cls(np.maximum(own, other)[known], (own > other)[known], other[np.isfinite(other)])

    @property
    def outcomes(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Similarity, whether the first hit is right, and weight of all trials [T + A].

        People who are there and who are not weigh the same.
        """
        counts = len(self.there), len(self.absent)
        weights = np.concatenate([np.full(count, sum(counts) / 2 / max(count, 1)) for count in counts])
        right = np.concatenate([self.right, np.zeros(len(self.absent), bool)])
        return np.concatenate([self.there, self.absent]), right, weights


def calibrate(trials: Trials, omega: float, images: int) -> Calibration:
    """Fit the confidence to the trials of a validation split: isotonic regression, linear between its steps.

    A trial of the other outcome is added at either end, so that no confidence is 0 or 1: n trials cannot show more.

    Args:
        trials: of the validation split.
        omega: ω of their similarities.
        images: number of images in its gallery.
    """
    similarity, right, weights = trials.outcomes
    similarity = np.concatenate([[-1.0], similarity, [1.0]])
    right, weights = np.concatenate([[True], right, [False]]), np.concatenate([[1.0], weights, [1.0]])
    at, confidence = isotonic(similarity, right.astype(float), weights)
    calibration = Calibration(omega, images, tuple(at.tolist()), tuple(confidence.tolist()), ())
    choices = tuple((share, _least_confidence(calibration, trials, share)) for share in FALSE_ALARMS)
    return dataclasses.replace(calibration, min_confidence=choices)


def isotonic(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Isotonic regression by pooling adjacent violators.

    Returns:
        The mean x of each pool, ascending, and its mean y, which ascends too.
    """
    at, pool = np.unique(x, return_inverse=True)  # equal x have one value
    weight, total = np.bincount(pool, weights), np.bincount(pool, weights * y)
    pools: list[tuple[float, float, float]] = []  # weight, and weighted sums of x and y
    for here in zip(weight.tolist(), (weight * at).tolist(), total.tolist(), strict=True):
        pools.append(here)
        while len(pools) > 1 and pools[-2][2] * pools[-1][0] >= pools[-1][2] * pools[-2][0]:
            one, more = pools[-2:]
            pools[-2:] = [(one[0] + more[0], one[1] + more[1], one[2] + more[2])]
    weight, at, total = np.array(pools).T
    return at / weight, total / weight


def _least_confidence(calibration: Calibration, trials: Trials, share: float) -> float | None:
    """The lowest confidence that keeps false alarms at a share of the trials it was calibrated on, or below."""
    reached, counts = np.unique(calibration.confidence(trials.absent, calibration.images), return_counts=True)
    alarms = np.cumsum(counts[::-1])[::-1] / max(len(trials.absent), 1)  # share of absent people at least so confident
    fine = reached[alarms <= share]
    return float(fine[0]) if len(fine) else None


def rates(calibration: Calibration, trials: Trials, min_confidence: float, images: int) -> tuple[float, float]:
    """False alarms and identified people, shares of the queries, of searches with a least confidence.

    Args:
        calibration: of the model.
        trials: of the split that is measured.
        min_confidence: the least confidence.
        images: number of images in that split's gallery.
    """
    there, absent = (calibration.confidence(part, images) for part in (trials.there, trials.absent))
    return _share(absent >= min_confidence), _share((there >= min_confidence) & trials.right)


def open_set(trials: Trials, images: int, calibration: Calibration | None) -> dict[str, Any]:
    """The figures of an evaluation.

    Args:
        trials: of the split that is measured.
        images: number of images in its gallery.
        calibration: of the model, made on another split; None if there is none.

    Returns:
        `rates`: for each share of false alarms the similarity that gives it here, and the share identified by it.
        With a calibration also `confidence`: `rates` by the least confidence chosen on the validation split, and its
        `reliability`.
    """
    measured: dict[str, Any] = {"rates": [_rate(trials, share) for share in FALSE_ALARMS]}
    if calibration is None:
        return measured
    chosen = []
    for share, least in calibration.min_confidence:
        if least is not None:
            alarms, identified = rates(calibration, trials, least, images)
            figures = {"min_confidence": least, "false_alarms": alarms, "identified": identified}
            chosen.append({"chosen_for": share, **figures})
    bins = reliability(trials, images, calibration)
    error = sum(row["share"] * abs(row["confidence"] - row["right"]) for row in bins)
    return measured | {"confidence": {"rates": chosen, "reliability": bins, "calibration_error": error}}


def alarm_curve(trials: Trials, points: int = 101) -> list[tuple[float, float]]:
    """Share of false alarms and share identified, by the least similarity; at most this many points, ascending."""
    if not len(trials.absent):
        return []
    least = np.quantile(trials.absent, np.linspace(1, 0, points))
    return [(_share(trials.absent > at), _share((trials.there > at) & trials.right)) for at in least]


def _rate(trials: Trials, share: float) -> dict[str, Any]:
    """The similarity that a share of the absent people's first hits exceed, and who is identified above it."""
    if not len(trials.absent):
        return {"false_alarms": share, "similarity": None, "identified": None}
    least = float(np.quantile(trials.absent, 1 - share, method="higher"))
    identified = _share((trials.there > least) & trials.right)
    return {"false_alarms": share, "similarity": least, "identified": identified}


def reliability(trials: Trials, images: int, calibration: Calibration) -> list[dict[str, float]]:
    """Confidence and truth of the trials, in bins of equally many: `confidence` is the mean, `right` the share of first
    hits that show the person, `share` the bin's part of all."""
    similarity, right, weights = trials.outcomes
    confidence = calibration.confidence(similarity, images)
    bins = []
    for rows in np.array_split(np.argsort(confidence, kind="stable"), BINS):
        if len(rows):
            means = (float(np.average(part[rows], weights=weights[rows])) for part in (confidence, right))
            share = float(weights[rows].sum() / weights.sum())
            bins.append(dict(zip(("confidence", "right", "share"), (*means, share), strict=True)))
    return bins


def _share(true: np.ndarray | Sequence[bool]) -> float:
    return float(np.mean(true)) if len(true) else 0.0
