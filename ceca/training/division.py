"""The consensus division of RDE: which pairs are clean, by the losses of both branches (method: The RDE baseline).

Notable: everything follows from the losses and (seed, epoch), so a run that resumes or changes its number of workers
finds the same division. The mixture is fitted as scikit-learn fits it, from the best split into two groups, which
k-means there finds from random starts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ceca.training.order import random_stream


class Fit(NamedTuple):
    """How closely a mixture is fitted: most iterations, gain of likelihood at which it stops, added variance."""

    iterations: int
    tolerance: float
    variance: float


FITS = {"quick": Fit(10, 1e-2, 5e-4), "close": Fit(100, 1e-4, 1e-6)}


def divide(losses: np.ndarray, seed: int, epoch: int, fit: str = "quick") -> np.ndarray:
    """Which pairs are clean, [P] booleans.

    Pairs that both branches call clean are clean, pairs that neither does are noisy, and the others are drawn.

    Args:
        losses: [2, P] of the pairs, by branch.
        seed: seed of the run.
        epoch: number of the epoch, from 0.
        fit: a key of `FITS`.
    """
    votes = np.sum([is_clean(clean_probability(of_branch, FITS[fit])) for of_branch in losses], axis=0)
    drawn = random_stream(seed, epoch, "division").integers(0, 2, losses.shape[1])
    return np.where(votes == 1, drawn == 1, votes == 2)


def is_clean(probability: np.ndarray) -> np.ndarray:
    """What one branch says, [P] booleans: clean above 0.5. If all are above, one in a hundred is called noisy."""
    threshold = 0.5
    if probability.min() > threshold:
        threshold = np.sort(probability)[len(probability) // 100]
    return probability > threshold


def clean_probability(losses: np.ndarray, fit: Fit) -> np.ndarray:
    """The probability that a pair belongs to the smaller losses of two, [P].

    The losses are scaled to 0 … 1, and a mixture of two Gaussians is fitted by expectation and maximisation.

    Args:
        losses: [P] of the pairs.
        fit: how closely.
    """
    x = np.asarray(losses, np.float64)
    spread = x.max() - x.min()
    x = (x - x.min()) / (spread if spread > 0 else 1.0)
    share = _best_split(x)
    before = -np.inf
    for _ in range(fit.iterations):
        components = _components(x, share, fit.variance)
        share, likelihood = _expectation(x, components)
        if abs(likelihood - before) < fit.tolerance:
            break
        before = likelihood
    share, _ = _expectation(x, components)
    return share[components.mean.argmin()]


class _Components(NamedTuple):
    """Two Gaussians: weight, mean and variance, [2] each."""

    weight: np.ndarray
    mean: np.ndarray
    variance: np.ndarray


def _best_split(x: np.ndarray) -> np.ndarray:
    """The two groups with the smallest squared distances to their means, as memberships [2, P]."""
    ordered = np.sort(x)
    counts = np.arange(1, len(x))
    sums = np.cumsum(ordered)
    # The smallest squared distances within groups are the largest squared sums of groups over their sizes.
    between = sums[:-1] ** 2 / counts + (sums[-1] - sums[:-1]) ** 2 / (len(x) - counts)
    limit = ordered[between.argmax()] if len(x) > 1 else ordered[0]
    return np.stack([x <= limit, x > limit]).astype(np.float64)


def _components(x: np.ndarray, share: np.ndarray, added_variance: float) -> _Components:
    """The Gaussians of two groups with memberships [2, P]."""
    size = share.sum(axis=1) + 10 * np.finfo(np.float64).eps
    mean = share @ x / size
    variance = (share * (x - mean[:, None]) ** 2).sum(axis=1) / size + added_variance
    return _Components(size / size.sum(), mean, variance)


def _expectation(x: np.ndarray, components: _Components) -> tuple[np.ndarray, float]:
    """The memberships [2, P], and the mean log-likelihood of a loss."""
    weight, mean, variance = (value[:, None] for value in components)
    logs = np.log(weight) - 0.5 * (np.log(2 * np.pi * variance) + (x - mean) ** 2 / variance)
    total = np.logaddexp(*logs)
    return np.exp(logs - total), float(total.mean())
