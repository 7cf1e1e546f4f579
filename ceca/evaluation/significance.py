"""Tell whether one run is better than another: a paired bootstrap over the people described.

Notable: people are resampled, not queries. Sentences about one person are easy or hard together, and resampling them
one by one would report significance where there is none.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa

# Figures that are compared, by the column of a per-query table (without its similarity).
COMPARED = {"Rank-1": "rank1", "Rank-5": "rank5", "Rank-10": "rank10", "AP": "average_precision"}


@dataclasses.dataclass(frozen=True)
class Difference:
    """The second run minus the first: the mean, its 95 % interval, and the two-sided p-value of no difference."""

    mean: float
    low: float
    high: float
    p: float

    def cells(self) -> list[str]:
        """The difference as cells of a table: mean, interval, p-value."""
        return [f"{self.mean:+.2f}", f"{self.low:+.2f} … {self.high:+.2f}", f"{self.p:.4f}"]


def compare_runs(first: pa.Table, second: pa.Table, similarity: str = "fused") -> dict[str, Difference]:
    """Compare two per-query tables with the same queries in the same order: figure → difference in percent points."""
    people = first["identity"].to_numpy()
    return {
        label: paired_bootstrap(
            100 * first[f"{similarity}_{column}"].to_numpy(), 100 * second[f"{similarity}_{column}"].to_numpy(), people
        )
        for label, column in COMPARED.items()
    }


def paired_bootstrap(
    first: np.ndarray, second: np.ndarray, identities: np.ndarray, *, resamples: int = 10_000, seed: int = 0
) -> Difference:
    """Compare two runs over the same queries.

    People are drawn with replacement, each together with all queries that describe them.

    Args:
        first: [Q] figures of the first run, one per query.
        second: [Q] figures of the second run, in the same order.
        identities: [Q], the person that each query describes.
        resamples: number of bootstrap samples.
        seed: seed of the bootstrap.

    Raises:
        ValueError: lengths differ, or there is no query.
    """
    if not len(first) or not len(first) == len(second) == len(identities):
        raise ValueError(f"runs must share their queries, found {len(first)}, {len(second)} and {len(identities)}")
    difference = np.asarray(second, np.float64) - np.asarray(first, np.float64)
    _, person = np.unique(identities, return_inverse=True)
    sums, counts = np.bincount(person, difference), np.bincount(person)
    source = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, 2**22 // len(sums))
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        times = source.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=rows)
        means[start : start + rows] = (times @ sums) / (times @ counts)
    low, high = np.quantile(means, [0.025, 0.975])
    beyond = min((np.sum(means <= 0) + 1), (np.sum(means >= 0) + 1)) / (resamples + 1)
    return Difference(float(difference.mean()), float(low), float(high), min(1.0, 2 * float(beyond)))
