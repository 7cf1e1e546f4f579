"""Rows rounded to 8 bits, half the bytes of fp16, with a proven bound on what the rounding can hide.

A row x of W numbers becomes a scale s = max|x| / 127 and codes c, whole numbers from -127 to 127. Let ρ = |x - s·c|.
The first pass of a search computes e = s·(c·q) instead of x·q. By Cauchy-Schwarz,

    |s·(c·q) - x·q| = |(s·c - x)·q| ≤ ρ·|q|                                                                   (1)

Both sides are computed in fp32. With u = 2^-24, an inner product of W numbers in fp32, summed in any order, is off by
at most γ(W)·|a|·|b| with γ(n) = n·u / (1 - n·u); each further operation adds one to n. So the computed e differs from
s·(c·q) by at most γ(W+1)·|s·c|·|q|, and what fp32 says of x·q, which is what a search ranks by, differs from x·q by at
most γ(W)·|x|·|q|. With |s·c| ≤ |x| + ρ and the norm n = |x| + ρ,

    |e - fp32(x·q)| ≤ (ρ + 2·γ(W+1)·n)·|q|                                                                    (2)

The ends of the interval are computed in fp32 too, by a product and a sum: off by at most 2·u of (n + slack)·|q|.
`slack` = (1 + 2^-20)·(ρ + 2·γ(W+4)·n) covers that: 2·(γ(W+4) - γ(W+1)) ≥ 6·u, and 2^-20 is 16·u. Hence

    e - slack·|q| ≤ fp32(x·q) ≤ e + slack·|q|                                                                 (3)

where |q| is rounded up. In bf16 the query is rounded to q', and results by at most r of their size; (3) then holds with
a further 1.01·n·(|q - q'| + r·(|q| + |q - q'|)) on both sides: |s·c·(q - q')| ≤ n·|q - q'|, a result is at most
(1 + γ)·n·|q'|, and 0.01 is more than γ(W+4) for each W up to 160,000.

These are kept for each row, so a row that rounds badly (one large number among small ones) has a wide interval, and no
other row has. Numbers below 2^-100 are beyond this: they are no embeddings.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from torch import Tensor

from ceca.environment import cache_folder

LARGEST = 127  # of a code
CONVERTED = 2048  # rows converted to fp32 at a time
UNIT = 2.0**-24  # rounding of one fp32 operation


@dataclasses.dataclass(frozen=True)
class Rounded:
    """Rows in 8 bits.

    Args:
        codes: [n, W] int8.
        bounds: [n, 3] fp32: scale, slack and norm of each row, as the module says.
    """

    codes: np.ndarray
    bounds: np.ndarray


def round_rows(rows: Tensor) -> Rounded:
    """Round fp16 rows [n, W] on a CPU to 8 bits."""
    count, width = rows.shape
    codes, bounds = np.empty((count, width), np.int8), np.empty((count, 3), np.float32)
    exact = np.empty((count, 2))
    rounding = kernels().round
    for start in range(0, count, CONVERTED):
        part = slice(start, start + CONVERTED)
        rounding(rows[part].float().numpy(), codes[part], bounds[part, 0], exact[part])
    residual, norm = exact[:, 0], exact[:, 0] + exact[:, 1]
    bounds[:, 1] = _up((1 + 2.0**-20) * (residual + 2 * gamma(width + 4) * norm))
    bounds[:, 2] = _up(norm)
    return Rounded(codes, bounds)


def gamma(operations: int) -> float:
    """γ: bound of the relative error of a number of operations in fp32."""
    return operations * UNIT / (1 - operations * UNIT)


def query_bounds(queries: Tensor, rounded: Tensor, rounding: float) -> np.ndarray:
    """Factors of slack and norm in the margin of each query.

    Args:
        queries: [Q, W] fp32.
        rounded: the queries as they are multiplied.
        rounding: largest relative rounding error of a result, beyond fp32.

    Returns:
        [2, Q] fp32, rounded up.
    """
    exact = queries.double().numpy()
    length = np.linalg.norm(exact, axis=1)
    off = np.linalg.norm(exact - rounded.double().numpy(), axis=1)
    return _up(np.stack([length, 1.01 * (off + rounding * (length + off))]))


def _up(numbers: np.ndarray) -> np.ndarray:
    """Numbers as fp32, never smaller; 2^-40 covers the rounding of the fp64 sums that made them."""
    raised = numbers * (1 + 2.0**-40)
    return np.where(raised > 0, np.nextafter(raised.astype(np.float32), np.float32(np.inf)), np.float32(0))


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Compiled loops. They hold no lock of Python's, so threads run them side by side."""

    round: Callable[..., None]
    multiply: Callable[..., None]
    multiply_some: Callable[..., None]
    bound: Callable[..., None]


@functools.cache
def kernels() -> Kernels:
    """Compile the loops, once per machine: it takes a second or two."""
    import numba

    numba.config.CACHE_DIR = str(cache_folder("compiled"))  # else it lies beside this file, which may not be writable
    any_order = {"reassoc", "contract"}  # sums in any order, and fused with products: (2) allows it

    @numba.njit(nogil=True, cache=True)
    def round_(rows: np.ndarray, codes: np.ndarray, scale: np.ndarray, exact: np.ndarray) -> None:
        """Codes and scales of fp32 rows [n, W], and in fp64 the norms of what is lost and of the rows, [n, 2]."""
        for i in range(len(rows)):
            largest = np.float32(0)
            for j in range(rows.shape[1]):
                largest = max(largest, abs(rows[i, j]))
            step = np.float32(largest / np.float32(LARGEST))
            scale[i], lost, length = step, 0.0, 0.0
            for j in range(rows.shape[1]):
                number = np.float64(rows[i, j])
                code = min(max(np.rint(number / step), -127.0), 127.0) if step > 0 else 0.0
                codes[i, j] = np.int8(code)
                lost += (number - code * step) ** 2
                length += number**2
            exact[i, 0], exact[i, 1] = np.sqrt(lost), np.sqrt(length)

    @numba.njit(nogil=True, cache=True, fastmath=any_order)
    def multiply(codes: np.ndarray, query: np.ndarray, out: np.ndarray) -> None:
        """Inner products of codes [n, W] and a query [W]. Four places are read at once: that keeps the memory busy."""
        quarter = len(codes) // 4
        for i in range(quarter):
            first = second = third = fourth = np.float32(0)
            for j in range(codes.shape[1]):
                first += np.float32(codes[i, j]) * query[j]
                second += np.float32(codes[i + quarter, j]) * query[j]
                third += np.float32(codes[i + 2 * quarter, j]) * query[j]
                fourth += np.float32(codes[i + 3 * quarter, j]) * query[j]
            out[i], out[i + quarter], out[i + 2 * quarter], out[i + 3 * quarter] = first, second, third, fourth
        for i in range(4 * quarter, len(codes)):
            total = np.float32(0)
            for j in range(codes.shape[1]):
                total += np.float32(codes[i, j]) * query[j]
            out[i] = total

    @numba.njit(nogil=True, cache=True, fastmath=any_order)
    def multiply_some(codes: np.ndarray, rows: np.ndarray, query: np.ndarray, out: np.ndarray) -> None:
        """Inner products of some rows [R] of codes [n, W] and a query [W], also four at once."""
        quarter = len(rows) // 4
        for i in range(quarter):
            a, b, c, d = rows[i], rows[i + quarter], rows[i + 2 * quarter], rows[i + 3 * quarter]
            first = second = third = fourth = np.float32(0)
            for j in range(codes.shape[1]):
                first += np.float32(codes[a, j]) * query[j]
                second += np.float32(codes[b, j]) * query[j]
                third += np.float32(codes[c, j]) * query[j]
                fourth += np.float32(codes[d, j]) * query[j]
            out[i], out[i + quarter], out[i + 2 * quarter], out[i + 3 * quarter] = first, second, third, fourth
        for i in range(4 * quarter, len(rows)):
            total = np.float32(0)
            for j in range(codes.shape[1]):
                total += np.float32(codes[rows[i], j]) * query[j]
            out[i] = total

    @numba.njit(nogil=True, cache=True, fastmath={"nnan", "nsz"})
    def bound(
        products: np.ndarray,
        bounds: np.ndarray,
        allowed: np.ndarray,
        factors: np.ndarray,
        highest: np.ndarray,
        lower: np.ndarray,
        first: int,
        last: int,
    ) -> None:
        """Turn products of codes into upper bounds of similarities, -inf where a row is not allowed.

        products [Q, G, R] of G groups of R rows; bounds [3, G, R]; allowed [G, R]; factors [2, Q]; highest and lower
        [Q, G]: the largest upper and the largest lower bound of each group; groups from `first` to before `last`.
        """
        for q in range(len(products)):
            for g in range(first, last):
                most = least = np.float32(-np.inf)
                for r in range(products.shape[2]):
                    estimate = products[q, g, r] * bounds[0, g, r]
                    margin = bounds[1, g, r] * factors[0, q] + bounds[2, g, r] * factors[1, q]
                    above = estimate + margin if allowed[g, r] else np.float32(-np.inf)
                    below = estimate - margin if allowed[g, r] else np.float32(-np.inf)
                    products[q, g, r] = above
                    most, least = max(most, above), max(least, below)
                highest[q, g], lower[q, g] = most, least

    return Kernels(round_, multiply, multiply_some, bound)
