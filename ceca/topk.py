"""Exact top-k of inner products over fp16 rows, at the speed of reading them.

Notable: rows are compared in half precision, which reads every byte once and converts none; what could be among the
best k, given how far rounding can be off, is compared again in fp32. So the result is that of fp32 over all rows, for
any query. One query is a matrix-vector product over fp16 rows; many are matrix products over blocks that stay in the
cache, in bf16 where the CPU has instructions for it and in fp32 where not.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence

import torch
from torch import Tensor

FEW = 3  # queries that are compared one by one
BLOCK = 1024  # rows of a block that many queries share, 3 MB of 1,536 numbers
GROUP = 64  # rows of which the largest similarity is looked at first
RESCORED = 16_384  # rows compared again at a time
HALF_ULP = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8 / 2, torch.float32: 0.0}


@dataclasses.dataclass(frozen=True)
class Best:
    """The best rows of each query, best first: `similarity` and `row`, [Q, k] each.

    Equal similarities come in the order of rows. Where fewer than k rows are allowed, -inf and -1 are left behind them.
    """

    similarity: Tensor
    row: Tensor


def top_k(shards: Sequence[Tensor], queries: Tensor, k: int, *, row_norm: float, allowed: Tensor | None = None) -> Best:
    """The k rows with the largest inner products, exact in fp32.

    Args:
        shards: fp16 rows, [n, W] each; a row's number counts through all of them.
        queries: [Q, W] fp32.
        k: how many, at most as many as there are rows.
        row_norm: no row is longer, by which rounding is bounded.
        allowed: [N] booleans, rows that may be found; None: all.
    """
    count = sum(len(shard) for shard in shards)
    k = min(k, count)
    coarse, error = _compare(shards, queries, row_norm)
    if allowed is not None:
        coarse[:, :count].masked_fill_(~allowed.to(coarse.device), -torch.inf)
    # The k-th of the groups' largest is at most the k-th of all: a bound that needs no search through every row.
    groups = coarse.view(len(queries), -1, GROUP)
    largest = groups.amax(dim=2)
    bound = torch.full_like(error, -torch.inf)
    if largest.shape[1] >= k:
        bound = largest.topk(k, dim=1).values[:, -1] - 2 * error
    found = []
    for query, own, most, least in zip(queries, groups, largest, bound, strict=True):
        near = torch.nonzero(most >= least).squeeze(1)
        inside = own[near]
        wanted = torch.nonzero((inside >= least) & (inside > -torch.inf))
        found.append(_rescore(shards, query, near[wanted[:, 0]] * GROUP + wanted[:, 1], k))
    return Best(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def _compare(shards: Sequence[Tensor], queries: Tensor, row_norm: float) -> tuple[Tensor, Tensor]:
    """Inner products in low precision, [Q, N] and -inf up to a whole number of groups; how far each is off, [Q]."""
    count = sum(len(shard) for shard in shards)
    device = shards[0].device
    one_by_one = device.type == "cpu" and len(queries) <= FEW
    low = torch.float16 if one_by_one or device.type != "cpu" else _matrix_precision()
    asked = queries.to(device, low)
    coarse = torch.empty(len(queries), -(-count // GROUP) * GROUP, device=device)
    coarse[:, count:] = -torch.inf
    convert = _Converter(shards[0].shape[1], low) if device.type == "cpu" and not one_by_one else None
    start = 0
    for shard in shards:
        for rows in shard.split(len(shard) if convert is None else BLOCK) if len(shard) else ():
            part = coarse[:, start : start + len(rows)]
            if convert is not None:
                part.copy_((convert(rows) @ asked.T).T)
            elif one_by_one:
                for query, out in zip(asked, part, strict=True):
                    out.copy_(rows @ query)
            else:
                part.copy_(asked @ rows.T)
            start += len(rows)
    # Both factors are rounded and so is the result (rows are fp16 as they come); 1.1 for sums and subnormal numbers.
    unit = HALF_ULP[low]
    factors = unit if low is torch.float16 else 2 * unit + unit**2
    error = 1.1 * (factors + unit) * row_norm * queries.norm(dim=1) + 1e-6
    return coarse, error.to(device)


class _Converter:
    """fp16 rows in another precision, by way of fp32, for torch has no fast way to bf16. Overwritten each time."""

    def __init__(self, width: int, precision: torch.dtype):
        self.wide = torch.empty(BLOCK, width)
        self.narrow = self.wide if precision is torch.float32 else torch.empty(BLOCK, width, dtype=precision)

    def __call__(self, rows: Tensor) -> Tensor:
        """[n, W], n at most BLOCK."""
        wide, narrow = self.wide[: len(rows)].copy_(rows), self.narrow[: len(rows)]
        return wide if self.narrow is self.wide else narrow.copy_(wide)


def _rescore(shards: Sequence[Tensor], query: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best k of these rows in fp32: similarities and rows, [k] each."""
    query = query.to(rows.device)
    exact = torch.cat([gather(shards, part).float() @ query for part in rows.split(RESCORED)] or [query.new_empty(0)])
    order = torch.sort(exact, descending=True, stable=True).indices[:k]  # rows ascend, so ties do
    similarity, row = query.new_full((k,), -torch.inf), rows.new_full((k,), -1)
    similarity[: len(order)], row[: len(order)] = exact[order], rows[order]
    return similarity, row


def gather(shards: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Rows by their ascending numbers through all shards: [R, W]."""
    if len(shards) == 1:
        return shards[0][rows]
    parts, start = [], 0
    for shard in shards:
        inside = rows[(rows >= start) & (rows < start + len(shard))]
        parts.append(shard[inside - start])
        start += len(shard)
    return torch.cat(parts)


@functools.cache
def _matrix_precision() -> torch.dtype:
    """In which precision this CPU multiplies matrices fastest, conversion of fp16 rows included: measured once."""
    rows, queries = torch.randn(BLOCK, 1536).half(), torch.randn(64, 1536)

    def seconds(precision: torch.dtype) -> float:
        asked, convert, taken = queries.to(precision), _Converter(rows.shape[1], precision), []
        for _ in range(4):
            started = time.perf_counter()
            convert(rows) @ asked.T
            taken.append(time.perf_counter() - started)
        return min(taken)

    return min((torch.float32, torch.bfloat16), key=seconds)
