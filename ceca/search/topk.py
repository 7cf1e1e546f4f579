"""Exact top-k of inner products over fp16 rows, at the speed of reading them.

Notable: rows are compared in half precision, which reads every byte once and converts none; what could be among the
best k, given how far rounding can be off, is compared again in fp32. So the result is that of fp32 over all rows, for
any query. One query is a matrix-vector product over fp16 rows; many are matrix products over blocks that stay in the
cache of the core that works on them, in bf16 where the CPU has instructions for it and in fp32 where not.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

FEW = 3  # queries that are compared one by one
BLOCK = 512  # rows of a block that many queries share, 1.5 MB of 1,536 numbers
GROUP = 64  # rows of which the largest similarity is looked at first
RESCORED = 16_384  # rows compared again at a time
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 0.0}  # at most, of a number


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
    largest = groups.amax(dim=2).float()
    bound = torch.full_like(error, -torch.inf)
    if largest.shape[1] >= k:
        bound = largest.topk(k, dim=1).values[:, -1] - 2 * error

    def best(query: Tensor, own: Tensor, most: Tensor, least: Tensor, off: Tensor) -> tuple[Tensor, Tensor]:
        near = torch.nonzero(most >= least).squeeze(1)
        inside = own[near].float()
        wanted = torch.nonzero((inside >= least) & (inside > -torch.inf))
        rows, values = near[wanted[:, 0]] * GROUP + wanted[:, 1], inside[wanted[:, 0], wanted[:, 1]]
        if len(rows) > 2 * k:  # the exact k-th of those that look best is a bound nearer by one error
            looks_best = rows[values.topk(k).indices].sort().values
            rows = rows[values >= _rescore(shards, query, looks_best, k)[0][-1] - off]
        return _rescore(shards, query, rows, k)

    spread = _single_threads(torch.get_num_threads()).map if _blocked(shards, queries) else map
    found = spread(best, queries, groups, largest, bound, error)
    return Best(*(torch.stack(parts) for parts in zip(*found, strict=True)))


def _blocked(shards: Sequence[Tensor], queries: Tensor) -> bool:
    """Whether threads of their own go through the rows a block at a time."""
    return shards[0].device.type == "cpu" and len(queries) > FEW


def _compare(shards: Sequence[Tensor], queries: Tensor, row_norm: float) -> tuple[Tensor, Tensor]:
    """Inner products in low precision, [Q, N] and -inf up to a whole number of groups; how far each is off, [Q]."""
    count = sum(len(shard) for shard in shards)
    device = shards[0].device
    blocked = _blocked(shards, queries)
    low = _matrix_precision() if blocked else torch.float16
    coarse = torch.empty(len(queries), -(-count // GROUP) * GROUP, dtype=low, device=device)
    coarse[:, count:] = -torch.inf
    asked = queries.to(device, low)
    blocks, start = [], 0
    for shard in shards:
        for rows in shard.split(BLOCK if blocked else len(shard)) if len(shard) else ():
            blocks.append((rows, coarse[:, start : start + len(rows)]))
            start += len(rows)
    if blocked:
        cores = torch.get_num_threads()
        shares = [blocks[core * len(blocks) // cores : (core + 1) * len(blocks) // cores] for core in range(cores)]
        list(_single_threads(cores).map(lambda share: _multiply_blocks(share, asked), shares))
    else:
        for rows, part in blocks:
            if device.type != "cpu":
                part.copy_(asked @ rows.T)
                continue
            for query, out in zip(asked, part, strict=True):
                torch.mv(rows, query, out=out)
    # The query is rounded, by a known difference; so is the result, and fp16 rows are where they become bf16, in which
    # subnormal numbers come out as much as 2^-15 too large. 1.1 is for sums in another order.
    length, rounding = queries.norm(dim=1), ROUNDING[low]
    rows_off = rounding * row_norm + 2.0**-15 * shards[0].shape[1] ** 0.5 if low is torch.bfloat16 else 0.0
    query_off = (asked.float().cpu() - queries.cpu()).norm(dim=1)
    error = 1.1 * ((rows_off + rounding * row_norm) * length.cpu() + row_norm * query_off) + 1e-6
    return coarse, error.to(device)


def _multiply_blocks(blocks: Sequence[tuple[Tensor, Tensor]], queries: Tensor) -> None:
    """Each block's rows [n, W] with the queries [Q, W] into its part [Q, n]; in one thread, one block after another."""
    if not blocks:
        return
    converted = torch.empty(BLOCK, queries.shape[1], dtype=queries.dtype)
    for rows, part in blocks:
        part.copy_((_convert(rows, converted[: len(rows)]) @ queries.T).T)


def _convert(rows: Tensor, out: Tensor) -> Tensor:
    """fp16 rows in the precision of `out`, which is overwritten and returned."""
    if out.dtype is not torch.bfloat16:
        return out.copy_(rows)
    _bf16()(rows.contiguous().view(torch.int16).numpy().reshape(-1), out.view(torch.int16).numpy().reshape(-1))
    return out


@functools.cache
def _bf16() -> Callable[[np.ndarray, np.ndarray], None]:
    """fp16 → bf16 on their bits, in one pass; torch goes number by number, or through fp32 at twice the time."""
    import numba  # takes a second, and only searches of many queries need it

    three, half, kept, offset = np.int16(3), np.int16(4), np.int16(-0x7001), np.int16((127 - 15) << 7)

    @numba.njit(nogil=True)
    def convert(rows: np.ndarray, out: np.ndarray) -> None:
        for i in range(rows.size):  # round the mantissa to 7 bits, keep sign and exponent, move the exponent's zero
            out[i] = ((np.int16(rows[i] + half) >> three) & kept) + offset

    convert(np.zeros(1, np.int16), np.zeros(1, np.int16))
    return convert


@functools.cache
def _single_threads(count: int) -> ThreadPoolExecutor:
    """So many threads, whose matrix products stay on their own core."""
    pool, all_started = ThreadPoolExecutor(count, "topk"), threading.Barrier(count)

    def start(_: int) -> None:
        torch.set_num_threads(1)
        all_started.wait()

    list(pool.map(start, range(count)))
    torch.set_num_threads(count)  # for this thread and those to come, to which the last number given applies
    return pool


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
        asked, converted, taken = queries.to(precision), torch.empty(rows.shape, dtype=precision), []
        for _ in range(4):
            started = time.perf_counter()
            _convert(rows, converted) @ asked.T
            taken.append(time.perf_counter() - started)
        return min(taken)

    return min((torch.float32, torch.bfloat16), key=seconds)
