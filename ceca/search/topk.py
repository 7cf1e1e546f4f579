"""Exact top-k of inner products over fp16 rows, in half the time that reading them takes.

Notable:
- On a CPU, rows are first compared in 8 bits, which are half the bytes (`ceca.search.rounding`). On a GPU, rows are
  first compared in half precision. Rows that could be among the best k, given the largest rounding error, are then
  compared in fp32. The result equals fp32 over all rows, for any query.
- On a GPU, a fixed number of the best-looking rows of all queries is compared in fp32 together. The host waits once, to
  see whether a row that was left out could be among the best.
- A few queries are matrix-vector products, at the speed of memory. Many queries are matrix products over blocks of rows
  that stay in one core's cache, in bf16 if this CPU multiplies that faster, else in fp32.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ceca.search.rounding import Rounded, gamma, kernels, query_bounds, round_rows

# On GPUs, sums of fp16 products are kept in fp32: their rounding would be beyond the bound that `top_k` relies on.
torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False

FEW = 3  # up to this number, queries are compared one by one
FEW_BLOCK = 16_384  # rows that a few queries are compared with by one call
BLOCK = 512  # rows in a block that many queries share: 3 MB in fp32 if a row has 1,536 numbers
GROUP = 64  # rows in a group; the largest similarity of each group is examined first
RESCORED = 16_384  # rows compared in fp32 at a time
LOOKED_AT = 256  # rows of each query that a GPU compares in fp32, besides four for each one that is asked for
SLICES = 8  # pieces of work for each thread, so that one that is held up leaves work to the others
ROUNDING = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 0.0}  # largest relative rounding error


@dataclasses.dataclass(frozen=True)
class Best:
    """The best rows of each query, best first: `similarity` and `row` (its number), [Q, k] each.

    Equal similarities are in the order of rows. If fewer than k rows are allowed, -inf and -1 fill up the end.
    """

    similarity: Tensor
    row: Tensor


class Rows:
    """N rows that can be searched; a row's number counts through all shards.

    Args:
        shards: fp16 rows, [n, W] each, on one device.
        rounded: on a CPU, the same rows in 8 bits; None makes them.
    """

    def __init__(self, shards: Sequence[Tensor], rounded: Sequence[Rounded] | None = None):
        self.shards = list(shards)
        self.on_cpu = not self.shards or self.shards[0].device.type == "cpu"
        self.starts = torch.tensor([0, *itertools.accumulate(map(len, self.shards))])
        self.groups = -(-len(self) // GROUP)
        if self.on_cpu:
            held = list(map(round_rows, self.shards)) if rounded is None else rounded
            self.codes = [part.codes for part in held]
            bounds = np.zeros((3, self.groups * GROUP), np.float32)
            for part, start in zip(held, self.starts.tolist(), strict=False):
                bounds[:, start : start + len(part.bounds)] = part.bounds.T
            self.bounds = bounds.reshape(3, self.groups, GROUP)
        else:
            self.norm = max(float(part.float().norm(dim=1).max()) for s in self.shards for part in s.split(RESCORED))

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def width(self) -> int:
        return self.shards[0].shape[1]

    def __getitem__(self, numbers: Tensor) -> Tensor:
        """Rows [R, W] by their numbers, which must ascend."""
        ends = torch.searchsorted(numbers, self.starts.to(numbers.device)).tolist()
        parts = [
            shard[numbers[low:high] - start]
            for shard, start, low, high in zip(self.shards, self.starts.tolist(), ends, ends[1:], strict=False)
            if low < high
        ]
        return torch.cat(parts) if parts else self.shards[0][:0]

    def gather(self, numbers: Tensor) -> Tensor:
        """Rows [..., W] by their numbers [...], in any order."""
        if len(self.shards) == 1:
            return self.shards[0][numbers]
        ascending, back = numbers.flatten().sort()
        return self[ascending][back.argsort()].view(*numbers.shape, self.width)


def top_k(rows: Rows, queries: Tensor, k: int, allowed: Tensor | None = None) -> Best:
    """Find the k rows with the largest inner products, exact in fp32.

    Args:
        rows: the rows to search.
        queries: [Q, W] fp32.
        k: number of rows per query; at most N are found.
        allowed: [N] booleans, rows that may be found; None means all.
    """
    k = min(k, len(rows))
    if not rows.on_cpu:
        return _best_at_once(rows, queries, _compare_half(rows, queries, allowed), k)
    return _best_one_by_one(rows, queries, _compare_rounded(rows, queries, allowed), k)


def _best_one_by_one(rows: Rows, queries: Tensor, compared: Compared, k: int) -> Best:
    """The k best rows of each query: all that could be among them, in the light of a first pass, are compared again."""
    # The k-th largest of the groups' lower bounds is at most the k-th largest of all rows.
    least = torch.full((len(queries),), -torch.inf, device=compared.lower.device)
    if rows.groups >= k:
        least = compared.lower.topk(k, dim=1).values[:, -1]

    def best(query: Tensor, upper: Tensor, highest: Tensor, least: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
        """One query's best rows: upper bounds [G, GROUP], their maxima [G], a bound of the k-th, the error."""
        near = torch.nonzero(highest >= least).squeeze(1)
        inside = upper[near].float()
        wanted = torch.nonzero((inside >= least) & (inside > -torch.inf))
        numbers, values = near[wanted[:, 0]] * GROUP + wanted[:, 1], inside[wanted[:, 0], wanted[:, 1]]
        return _best_of(rows, query, numbers, values, error, k)

    over = spread(rows.on_cpu)
    per_query = over(best, queries, compared.upper, compared.highest, least, compared.error)
    return Best(*(torch.stack(parts) for parts in zip(*per_query, strict=True)))


def best_among(rows: Rows, query: Tensor, numbers: np.ndarray, k: int) -> tuple[Tensor, Tensor]:
    """Find the k best of some rows, exact in fp32, on a CPU, without reading the others.

    Args:
        rows: the rows.
        query: [W] fp32.
        numbers: [R] numbers of the rows to compare, ascending.
        k: number of rows to find.

    Returns:
        Similarities and numbers of rows, [k] each, as one query of `Best` has them.
    """
    products, vector, compare = np.empty(len(numbers), np.float32), query.numpy(), kernels().multiply_some
    ends = np.searchsorted(numbers, rows.starts.numpy()).tolist()
    for codes, start, low, high in zip(rows.codes, rows.starts.tolist(), ends, ends[1:], strict=False):
        if low < high:
            compare(codes, numbers[low:high] - start, vector, products[low:high])
    scale, slack, norm = rows.bounds.reshape(3, -1).take(numbers, axis=1)
    length = query_bounds(query[None], query[None], 0.0)[0, 0]
    upper = torch.from_numpy(products * scale + slack * length)
    error = 2 * gamma(rows.width + 4) * float(norm.max(initial=0)) * float(length)
    return _best_of(rows, query, torch.from_numpy(numbers), upper, error, k)


def _best_of(
    rows: Rows, query: Tensor, numbers: Tensor, upper: Tensor, error: Tensor | float, k: int
) -> tuple[Tensor, Tensor]:
    """The k best of one query's rows (ascending numbers) with upper bounds of their similarities."""
    if len(numbers) > 2 * k:  # the exact k-th similarity of the best-looking rows is a tight bound
        looks_best = numbers[upper.topk(k).indices].sort().values
        numbers = numbers[upper >= _rescore(rows, query, looks_best, k)[0][-1] - error]
    return _rescore(rows, query, numbers, k)


def _best_at_once(rows: Rows, queries: Tensor, compared: Compared, k: int) -> Best:
    """The same for all queries together, without waiting for the device before the end."""
    count = min(LOOKED_AT + 4 * k, len(rows))
    # The best-looking rows are in as many of the best-looking groups.
    groups = compared.highest.topk(min(count, rows.groups), dim=1).indices
    inside = compared.upper.gather(1, groups[:, :, None].expand(-1, -1, GROUP)).flatten(1)
    looked_at = inside.topk(count, dim=1)
    numbers = groups.gather(1, looked_at.indices // GROUP) * GROUP + looked_at.indices % GROUP
    numbers, order = numbers.sort(dim=1)  # so that ties stay in the order of rows
    absent = looked_at.values.gather(1, order) == -torch.inf
    vectors = queries.to(numbers.device)
    together = max(1, RESCORED // count)
    held = numbers.clamp(max=len(rows) - 1)  # the last group may be longer than what it holds
    exact = torch.cat(
        [
            (rows.gather(some).float() @ vector[:, :, None]).squeeze(2)
            for some, vector in zip(held.split(together), vectors.split(together), strict=True)
        ]
    ).masked_fill(absent, -torch.inf)
    best = exact.sort(dim=1, descending=True, stable=True)
    similarity, row = best.values[:, :k], numbers.gather(1, best.indices[:, :k])
    row = row.masked_fill(similarity == -torch.inf, -1)
    left_out = looked_at.values[:, -1].float()
    unsure = (similarity[:, -1] <= left_out + compared.error) & (left_out > -torch.inf)
    again = unsure.nonzero()[:, 0] if count < len(rows) else numbers[:0, 0]
    if len(again):
        alone = _best_one_by_one(rows, vectors[again], compared.of(again), k)
        similarity[again], row[again] = alone.similarity, alone.row
    return Best(similarity, row)


@dataclasses.dataclass(frozen=True)
class Compared:
    """What a first pass says of the similarities of N rows in G groups.

    All bounds of a query may be too low by one number, which is at most `error`.

    Args:
        upper: [Q, G, GROUP], upper bounds of the similarities; -inf for rows that are not allowed.
        highest: [Q, G], the largest of a group's upper bounds.
        lower: [Q, G], lower bounds of the largest similarity in a group.
        error: [Q], also an upper bound of the difference of two results in fp32 for one row.
    """

    upper: Tensor
    highest: Tensor
    lower: Tensor
    error: Tensor

    def of(self, queries: Tensor) -> Compared:
        """The same of some queries alone, given by their numbers."""
        return Compared(self.upper[queries], self.highest[queries], self.lower[queries], self.error[queries])


def _compare_rounded(rows: Rows, queries: Tensor, allowed: Tensor | None) -> Compared:
    """Compare rows in 8 bits, on a CPU."""
    few = len(queries) <= FEW
    precision = torch.float32 if few else _matrix_precision()
    as_multiplied = queries.to("cpu", precision)
    products = np.empty((len(queries), rows.groups * GROUP), np.float32)
    products[:, len(rows) :] = 0
    multiply(rows.codes, as_multiplied, products)
    may = np.zeros(rows.groups * GROUP, np.bool_)
    may[: len(rows)] = True if allowed is None else allowed.cpu().numpy()
    factors = query_bounds(queries.cpu(), as_multiplied, ROUNDING[precision])
    highest, lower = np.empty((2, len(queries), rows.groups), np.float32)
    upper = products.reshape(len(queries), rows.groups, GROUP)

    def bound(mine: slice) -> None:
        kernels().bound(upper, rows.bounds, may.reshape(-1, GROUP), factors, highest, lower, mine.start, mine.stop)

    _in_slices(bound, rows.groups)
    error = torch.from_numpy(2 * gamma(rows.width + 4) * rows.bounds[2].max() * factors[0])
    return Compared(torch.from_numpy(upper), torch.from_numpy(highest), torch.from_numpy(lower), error)


Blocks = Sequence[tuple[np.ndarray, int]]  # codes [n, W], and the number of the first row


def multiply(codes: Sequence[np.ndarray], queries: Tensor, products: np.ndarray) -> None:
    """Multiply rows of 8 bits with queries, on all cores.

    Args:
        codes: [n, W] int8 each, N rows in all.
        queries: [Q, W], in fp32 if they are few.
        products: [Q, N] fp32, or longer; they are written here.
    """
    few = len(queries) <= FEW
    size = FEW_BLOCK if few else BLOCK
    starts = itertools.accumulate(map(len, codes), initial=0)
    blocks = [
        (part[first : first + size], start + first)
        for part, start in zip(codes, starts, strict=False)
        for first in range(0, len(part), size)
    ]
    work = _multiply_few if few else _multiply_many
    _in_slices(lambda mine: work(blocks[mine], queries, products), len(blocks))


def _in_slices(work: Callable[[slice], None], count: int) -> None:
    """Do work on `count` things in slices, on all cores."""
    cores = torch.get_num_threads()
    ends = [number * count // (SLICES * cores) for number in range(SLICES * cores + 1)]
    list(_single_threads(cores).map(work, itertools.starmap(slice, itertools.pairwise(ends))))


def _multiply_few(blocks: Blocks, queries: Tensor, products: np.ndarray) -> None:
    """Multiply codes with queries [Q, W], one by one, into products [Q, N]."""
    for query, out in zip(queries.numpy(), products, strict=True):
        for codes, start in blocks:
            kernels().multiply(codes, query, out[start : start + len(codes)])


def _multiply_many(blocks: Blocks, queries: Tensor, products: np.ndarray) -> None:
    """The same with all queries at once, in their precision."""
    converted = torch.empty(BLOCK, queries.shape[1], dtype=queries.dtype)
    into = torch.from_numpy(products)
    for codes, start in blocks:
        block = converted[: len(codes)].copy_(torch.from_numpy(codes))  # exact: codes have seven bits
        into[:, start : start + len(codes)] = queries @ block.T  # faster than (block @ queries.T).T


def _compare_half(rows: Rows, queries: Tensor, allowed: Tensor | None) -> Compared:
    """Compare rows in fp16, on a GPU."""
    device = rows.shards[0].device
    coarse = torch.full((len(queries), rows.groups * GROUP), -torch.inf, dtype=torch.float16, device=device)
    rounded = queries.to(device, torch.float16)
    for shard, start in zip(rows.shards, rows.starts.tolist(), strict=False):
        coarse[:, start : start + len(shard)] = rounded @ shard.T
    if allowed is not None:
        coarse[:, : len(rows)].masked_fill_(~allowed.to(device), -torch.inf)
    # Two errors add up: the query's rounding, which is known, and the result's. 1.1 covers the order of sums.
    off = (rounded.float().cpu() - queries.cpu()).norm(dim=1)
    length = queries.cpu().norm(dim=1)
    error = (1.1 * rows.norm * (ROUNDING[torch.float16] * length + off) + 1e-6).to(device)
    groups = coarse.view(len(queries), -1, GROUP)
    highest = groups.amax(dim=2).float()
    return Compared(groups, highest, highest - 2 * error[:, None], error)


def spread(on_all_cores: bool) -> Callable[..., Iterator[Any]]:
    """`map`, or the same on all cores, each call on one.

    One call is worth it, too: where torch uses all cores for something small, they spin for a while afterwards, and the
    next first pass waits for them.
    """
    return _single_threads(torch.get_num_threads()).map if on_all_cores else map


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


def _rescore(rows: Rows, query: Tensor, numbers: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Compare one query with rows (ascending numbers) in fp32: the best k similarities and rows, [k] each."""
    query = query.to(numbers.device)
    exact = torch.cat([rows[part].float() @ query for part in numbers.split(RESCORED)] or [query.new_empty(0)])
    order = torch.sort(exact, descending=True, stable=True).indices[:k]  # stable: ties stay in the order of rows
    similarity, row = query.new_full((k,), -torch.inf), numbers.new_full((k,), -1)
    similarity[: len(order)], row[: len(order)] = exact[order], numbers[order]
    return similarity, row


@functools.cache
def _matrix_precision() -> torch.dtype:
    """Measure once in which precision a core multiplies matrices faster, including the conversion of codes.

    In the time of the core alone, so that a busy machine does not decide.
    """
    codes, queries = torch.randint(-127, 128, (BLOCK, 1536)).to(torch.int8), torch.randn(64, 1536)

    def seconds(precision: torch.dtype) -> float:
        rounded, converted, times = queries.to(precision), torch.empty(codes.shape, dtype=precision), []
        for _ in range(4):
            started = time.thread_time()
            converted.copy_(codes) @ rounded.T
            times.append(time.thread_time() - started)
        return min(times)

    on_one_core = _single_threads(torch.get_num_threads()).map(seconds, (torch.float32, torch.bfloat16))
    return torch.float32 if next(on_one_core) <= next(on_one_core) else torch.bfloat16
