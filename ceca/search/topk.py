"""Exact top-k of inner products over fp16 rows, at the speed of reading them.

Notable:
- Rows are first compared in half precision, which reads every byte once and converts none. Rows that could be among the
  best k, given the largest rounding error, are then compared in fp32. The result equals fp32 over all rows, for any
  query.
- A few queries are matrix-vector products over fp16 rows. Many queries are matrix products over blocks of rows that
  stay in one core's cache, in bf16 if this CPU multiplies that faster, else in fp32.
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

# On GPUs, sums of fp16 products are kept in fp32: their rounding would be beyond the bound that `top_k` relies on.
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

FEW = 3  # up to this number, queries are compared one by one
BLOCK = 512  # rows in a block that many queries share: 1.5 MB if a row has 1,536 numbers
GROUP = 64  # rows in a group; the largest similarity of each group is examined first
RESCORED = 16_384  # rows compared in fp32 at a time
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 0.0}  # largest relative rounding error


@dataclasses.dataclass(frozen=True)
class Best:
    """The best rows of each query, best first: `similarity` and `row` (its number), [Q, k] each.

    Equal similarities are in the order of rows. If fewer than k rows are allowed, -inf and -1 fill up the end.
    """

    similarity: Tensor
    row: Tensor


def top_k(shards: Sequence[Tensor], queries: Tensor, k: int, *, row_norm: float, allowed: Tensor | None = None) -> Best:
    """Find the k rows with the largest inner products, exact in fp32.

    Args:
        shards: fp16 rows, [n, W] each; a row's number counts through all shards, N rows in total.
        queries: [Q, W] fp32.
        k: number of rows per query; at most N are found.
        row_norm: upper bound of the rows' norms, which bounds the rounding error.
        allowed: [N] booleans, rows that may be found; None means all.
    """
    count = sum(len(shard) for shard in shards)
    k = min(k, count)
    coarse, error = _compare(shards, queries, row_norm)
    if allowed is not None:
        coarse[:, :count].masked_fill_(~allowed.to(coarse.device), -torch.inf)
    # The k-th largest of the groups' maxima is at most the k-th largest of all rows: a cheap lower bound.
    groups = coarse.view(len(queries), -1, GROUP)
    largest = groups.amax(dim=2).float()
    bound = torch.full_like(error, -torch.inf)
    if largest.shape[1] >= k:
        bound = largest.topk(k, dim=1).values[:, -1] - 2 * error

    def best(query: Tensor, coarse: Tensor, maxima: Tensor, least: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """One query's best rows: coarse similarities [groups, GROUP], their maxima [groups], bound and error."""
        near = torch.nonzero(maxima >= least).squeeze(1)
        inside = coarse[near].float()
        wanted = torch.nonzero((inside >= least) & (inside > -torch.inf))
        rows, values = near[wanted[:, 0]] * GROUP + wanted[:, 1], inside[wanted[:, 0], wanted[:, 1]]
        if len(rows) > 2 * k:  # the exact k-th similarity of the best-looking rows is a bound tighter by one error
            looks_best = rows[values.topk(k).indices].sort().values
            rows = rows[values >= _rescore(shards, query, looks_best, k)[0][-1] - error]
        return _rescore(shards, query, rows, k)

    spread = _single_threads(torch.get_num_threads()).map if _blocked(shards, queries) else map
    per_query = spread(best, queries, groups, largest, bound, error)
    return Best(*(torch.stack(parts) for parts in zip(*per_query, strict=True)))


def _blocked(shards: Sequence[Tensor], queries: Tensor) -> bool:
    """Whether a pool of threads compares the rows block by block."""
    return shards[0].device.type == "cpu" and len(queries) > FEW


def _compare(shards: Sequence[Tensor], queries: Tensor, row_norm: float) -> tuple[Tensor, Tensor]:
    """Compute inner products in low precision.

    Returns:
        [Q, N] inner products, filled up with -inf to a whole number of groups, and [Q] bounds of their errors.
    """
    count = sum(len(shard) for shard in shards)
    device = shards[0].device
    blocked = _blocked(shards, queries)
    low = _matrix_precision() if blocked else torch.float16
    coarse = torch.empty(len(queries), -(-count // GROUP) * GROUP, dtype=low, device=device)
    coarse[:, count:] = -torch.inf
    rounded = queries.to(device, low)
    blocks, start = [], 0
    for shard in shards:
        for rows in shard.split(BLOCK if blocked else len(shard)) if len(shard) else ():
            blocks.append((rows, coarse[:, start : start + len(rows)]))
            start += len(rows)
    if blocked:
        cores = torch.get_num_threads()
        slices = [blocks[core * len(blocks) // cores : (core + 1) * len(blocks) // cores] for core in range(cores)]
        list(_single_threads(cores).map(lambda some: _multiply_blocks(some, rounded), slices))
    else:
        for rows, part in blocks:
            if device.type != "cpu":
                part.copy_(rounded @ rows.T)
                continue
            for query, out in zip(rounded, part, strict=True):
                torch.mv(rows, query, out=out)
    # Three errors add up: the query's rounding, whose difference is known; the result's rounding; and, in bf16, the
    # rounding of fp16 rows, where subnormal numbers become up to 2^-15 too large. 1.1 covers another order of sums.
    length, rounding = queries.norm(dim=1), ROUNDING[low]
    rows_off = rounding * row_norm + 2.0**-15 * shards[0].shape[1] ** 0.5 if low is torch.bfloat16 else 0.0
    query_off = (rounded.float().cpu() - queries.cpu()).norm(dim=1)
    error = 1.1 * ((rows_off + rounding * row_norm) * length.cpu() + row_norm * query_off) + 1e-6
    return coarse, error.to(device)


def _multiply_blocks(blocks: Sequence[tuple[Tensor, Tensor]], queries: Tensor) -> None:
    """Multiply each block's rows [n, W] with the queries [Q, W] into its part [Q, n], in one thread."""
    if not blocks:
        return
    converted = torch.empty(BLOCK, queries.shape[1], dtype=queries.dtype)
    for rows, part in blocks:
        part.copy_((_convert(rows, converted[: len(rows)]) @ queries.T).T)


def _convert(rows: Tensor, out: Tensor) -> Tensor:
    """Write fp16 rows into `out` in its precision, and return it."""
    if out.dtype is not torch.bfloat16:
        return out.copy_(rows)
    _bf16()(rows.contiguous().view(torch.int16).numpy().reshape(-1), out.view(torch.int16).numpy().reshape(-1))
    return out


@functools.cache
def _bf16() -> Callable[[np.ndarray, np.ndarray], None]:
    """Compile a function that converts fp16 to bf16 on the bits, in one pass.

    torch converts number by number, or through fp32, which takes twice the time.
    """
    import numba  # takes a second to import, and only searches of many queries need it

    three, half, kept, offset = np.int16(3), np.int16(4), np.int16(-0x7001), np.int16((127 - 15) << 7)

    @numba.njit(nogil=True)
    def convert(rows: np.ndarray, out: np.ndarray) -> None:
        for i in range(rows.size):  # round the mantissa to 7 bits, keep sign and exponent, shift the exponent's bias
            out[i] = ((np.int16(rows[i] + half) >> three) & kept) + offset

    convert(np.zeros(1, np.int16), np.zeros(1, np.int16))
    return convert


@functools.cache
def _single_threads(count: int) -> ThreadPoolExecutor:
    """A pool of `count` threads, each computing its matrix products on one core."""
    pool, all_started = ThreadPoolExecutor(count, "topk"), threading.Barrier(count)

    def start(_: int) -> None:
        torch.set_num_threads(1)
        all_started.wait()

    list(pool.map(start, range(count)))
    torch.set_num_threads(count)  # restores the number for this thread and for new ones: the last call counts for them
    return pool


def _rescore(shards: Sequence[Tensor], query: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Compare one query with rows (ascending numbers) in fp32: the best k similarities and rows, [k] each."""
    query = query.to(rows.device)
    exact = torch.cat([gather(shards, part).float() @ query for part in rows.split(RESCORED)] or [query.new_empty(0)])
    order = torch.sort(exact, descending=True, stable=True).indices[:k]  # stable: ties stay in the order of rows
    similarity, row = query.new_full((k,), -torch.inf), rows.new_full((k,), -1)
    similarity[: len(order)], row[: len(order)] = exact[order], rows[order]
    return similarity, row


def gather(shards: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Rows [R, W] by their numbers, which count through all shards and must ascend."""
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
    """Measure once in which precision this CPU multiplies matrices faster, including the conversion of fp16 rows."""
    rows, queries = torch.randn(BLOCK, 1536).half(), torch.randn(64, 1536)

    def seconds(precision: torch.dtype) -> float:
        rounded, converted, times = queries.to(precision), torch.empty(rows.shape, dtype=precision), []
        for _ in range(4):
            started = time.perf_counter()
            _convert(rows, converted) @ rounded.T
            times.append(time.perf_counter() - started)
        return min(times)

    return min((torch.float32, torch.bfloat16), key=seconds)
