"""Approximate search: rows are chosen by short sketches of them, and compared exactly.

Embeddings of people spread along few directions: what their attributes say. A *sketch* of a row x is c = round(s·P·(x -
mean)) in 8 bits, where P are the `DIRECTIONS` principal directions of a sample of the rows and s makes the largest
number of the sample 127. A query q is compared with all sketches by c·(P·q): for any q, and so for any ω, that
estimates q·x up to a factor and a constant, which change no order. The rows that look best are compared exactly
(`ceca.search.topk`). With 1,536 numbers a row, sketches are a twelfth of what an exact search reads.

What is missed is a row that resembles the query only outside those directions. Whatever was removed or is excluded by a
condition is left out before rows are chosen. If no more rows are allowed than would be chosen, the answer is exact.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ceca.search.rounding import LARGEST, gamma
from ceca.search.topk import Best, Rows, best_among, multiply, spread

DIRECTIONS = 128
SAMPLE = 8192  # rows whose principal directions are taken
PER_HIT = 16  # least number of rows compared for each hit that is asked for
TOGETHER = 4096  # rows sketched at a time
STRIDE = 64  # one estimate of this number is in the sample that tells which ones are looked at


@dataclasses.dataclass(frozen=True)
class Sketches:
    """Sketches of N rows.

    Args:
        directions: [W + 1, M] fp32: s·P, and below it -s·P·mean.
        codes: sketches, [n, M] int8 each, N in all.
    """

    directions: np.ndarray
    codes: Sequence[np.ndarray]


def sketch_all(rows: Rows) -> Sketches:
    """Sketches of all rows, by their own principal directions."""
    directions = find_directions(rows, len(rows))
    return Sketches(directions, [sketch(rows, directions, 0, len(rows))])


def find_directions(rows: Rows, count: int) -> np.ndarray:
    """The principal directions of a sample, always the same one, of the first `count` rows: [W + 1, M]."""
    chosen = np.random.default_rng(0).choice(count, min(SAMPLE, count), replace=False)
    sample = rows[torch.from_numpy(np.sort(chosen))].float()
    mean = sample.mean(dim=0)
    sample -= mean
    principal = torch.linalg.eigh(sample.T @ sample).eigenvectors[:, -DIRECTIONS:]
    largest = float((sample @ principal).abs().max())
    scaled = principal * (LARGEST / largest if largest > 0 else 0.0)
    return torch.cat([scaled, -(mean @ scaled)[None]]).numpy()


def sketch(rows: Rows, directions: np.ndarray, first: int, last: int) -> np.ndarray:
    """Sketches [n, M] of the rows from `first` to before `last`, made from their 8 bits."""
    scales = rows.bounds[0].reshape(-1)
    matrix, constant = torch.from_numpy(directions[:-1]), torch.from_numpy(directions[-1])
    sketches = np.empty((last - first, directions.shape[1]), np.int8)
    for codes, start in zip(rows.codes, rows.starts.tolist(), strict=False):
        for low in range(max(start, first), min(start + len(codes), last), TOGETHER):
            high = min(low + TOGETHER, start + len(codes), last)
            part = torch.from_numpy(codes[low - start : high - start]).float()
            main = (part @ matrix) * torch.from_numpy(scales[low:high, None]) + constant
            sketches[low - first : high - first] = main.round().clamp(-LARGEST, LARGEST).numpy()
    return sketches


def find_near(
    rows: Rows, sketches: Sketches, queries: Tensor, k: int, share: float, allowed: Tensor | None = None
) -> Best:
    """Find k rows with large inner products.

    Args:
        rows: the rows to search, on a CPU.
        sketches: of these rows.
        queries: [Q, W] fp32.
        k: number of rows per query; at most N are found.
        share: share of all rows, 0 to 1, that are compared exactly, and at least `PER_HIT` for each of the k. If it
            leaves out no row that is allowed, the result is that of `top_k`.
        allowed: [N] booleans, rows that may be found; None means all.

    Returns:
        The best of the rows that were compared. If fewer than k rows are allowed, all of them.
    """
    k = min(k, len(rows))
    count = min(max(math.ceil(share * len(rows)), PER_HIT * k), len(rows))
    queries = queries.cpu()
    short = queries @ torch.from_numpy(sketches.directions[:-1])
    estimates = np.empty((len(queries), len(rows)), np.float32)
    multiply(sketches.codes, short, estimates)
    # Sums in another order differ by less: rows with one sketch are chosen together, so ties stay in the order of rows.
    errors = 2 * gamma(short.shape[1]) * LARGEST * math.sqrt(short.shape[1]) * short.norm(dim=1).numpy()
    refused = None if allowed is None else ~allowed.cpu().numpy()

    def near(query: Tensor, estimate: np.ndarray, error: np.float32) -> tuple[Tensor, Tensor]:
        if refused is not None:
            estimate[refused] = -np.inf
        return best_among(rows, query, largest(estimate, count, float(error)), k)

    over = spread(True)
    return Best(*(torch.stack(part) for part in zip(*over(near, queries, estimates, errors), strict=True)))


def largest(estimates: np.ndarray, count: int, margin: float) -> np.ndarray:
    """Find the largest of N numbers, and those that are less than the last of them by at most a margin.

    To partition all N takes twice as long. A sample gives a bound, and only numbers above it are partitioned.

    Args:
        estimates: [N] fp32; -inf is never found.
        count: how many, at most N.
        margin: not negative.

    Returns:
        Their places, ascending.
    """
    sample = estimates[::STRIDE]
    place = len(sample) - 2 * math.ceil(count / STRIDE) - 8  # about twice `count` are above it
    bound = np.partition(sample, place)[place] if place > 0 else -np.inf
    above = np.flatnonzero(estimates >= bound)
    if len(above) < count:
        above = np.arange(len(estimates))
    least = np.partition(estimates[above], len(above) - count)[len(above) - count] - margin
    least = max(least, np.finfo(np.float32).min)
    return above[estimates[above] >= least] if least >= bound else np.flatnonzero(estimates >= least)
