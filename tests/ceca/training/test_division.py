"""The consensus division of RDE against a plain restatement of its description (method: The RDE baseline)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ceca.training.division import FITS, clean_probability, divide, is_clean
from ceca.training.order import random_stream


def density(x: float, mean: float, variance: float) -> float:
    return math.exp(-((x - mean) ** 2) / (2 * variance)) / math.sqrt(2 * math.pi * variance)


def restated_probability(losses: list[float], iterations: int, tolerance: float, added: float) -> list[float]:
    """Two Gaussians over losses scaled to 0 … 1, one pair at a time; the probability of the smaller ones."""
    low, high = min(losses), max(losses)
    x = [(loss - low) / (high - low) for loss in losses]

    def scatter(group: list[float]) -> float:
        return sum((value - sum(group) / len(group)) ** 2 for value in group)

    ordered = sorted(x)
    cut = min(range(1, len(x)), key=lambda n: scatter(ordered[:n]) + scatter(ordered[n:]))
    share = [1.0 if value <= ordered[cut - 1] else 0.0 for value in x]  # of the first Gaussian
    before = -math.inf
    for _ in range(iterations):
        parts = []
        for of_part in (share, [1 - s for s in share]):
            size = sum(of_part)
            mean = sum(s * value for s, value in zip(of_part, x, strict=True)) / size
            variance = sum(s * (value - mean) ** 2 for s, value in zip(of_part, x, strict=True)) / size + added
            parts.append((size / len(x), mean, variance))
        each = [[weight * density(value, mean, variance) for weight, mean, variance in parts] for value in x]
        share = [first / (first + second) for first, second in each]
        likelihood = sum(math.log(first + second) for first, second in each) / len(x)
        if abs(likelihood - before) < tolerance:
            break
        before = likelihood
    return share if parts[0][1] < parts[1][1] else [1 - s for s in share]


def random_losses(seed: int, pairs: int = 150) -> np.ndarray:
    """Losses of two branches: many small ones and some large ones, which the branches mostly agree on."""
    random = np.random.default_rng(seed)
    noisy = random.random(pairs) < random.uniform(0.1, 0.8)
    spread = random.uniform(0.05, 0.6, size=(2, 1))
    return 0.2 + noisy * random.uniform(0.3, 1.5) + spread * random.gamma(2.0, 0.5, size=(2, pairs))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("seed", range(8))
def test_clean_pairs_are_those_of_a_plain_restatement(seed: int, fit: str) -> None:
    losses = random_losses(seed)
    restated = [restated_probability(list(of_branch), *FITS[fit]) for of_branch in losses]
    for of_branch, expected in zip(losses, restated, strict=True):
        np.testing.assert_allclose(clean_probability(of_branch, FITS[fit]), expected, atol=1e-9)
    found = divide(losses, seed=seed, epoch=3, fit=fit)
    drawn = random_stream(seed, 3, "division").integers(0, 2, losses.shape[1])
    for pair in range(losses.shape[1]):
        calls = [probability[pair] > 0.5 for probability in restated]
        assert found[pair] == (calls[0] if calls[0] == calls[1] else bool(drawn[pair])), pair


def test_pairs_on_which_the_branches_differ_get_labels_that_change_with_the_epoch_and_are_half_clean() -> None:
    random = np.random.default_rng(0)
    clean, noisy = random.normal(0, 0.02, 4000), random.normal(1, 0.02, 4000)
    losses = np.stack([np.r_[clean, noisy], np.r_[noisy, clean]])
    first, again, later = (divide(losses, seed=1, epoch=epoch) for epoch in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, later)
    assert first.mean() == pytest.approx(0.5, abs=0.03)


def test_losses_that_hardly_differ_have_a_division_too() -> None:
    """Equal ones, two, and one: nothing divides by zero, and a mixture that calls all clean gives one in a hundred."""
    assert divide(np.ones((2, 300)), 0, 0).shape == (300,)
    assert list(divide(np.array([[0.0, 1.0], [0.0, 1.0]]), 0, 0)) == [True, False]
    assert divide(np.ones((2, 1)), 0, 0).shape == (1,)
    assert is_clean(np.linspace(0.6, 0.9, 300)).sum() == 300 - 4
