"""Retrieval metrics over a whole gallery, by identity (method: Retrieval and evaluation).

Ties: among gallery images of equal similarity, other identities rank first. A model that gives every image the same
similarity therefore scores worst, and the order of a gallery never changes a figure.
A query whose identity is not in the gallery counts as a miss in every metric; leaving it out would flatter the model.

Notable: only similarities are sorted, because the rank of the k-th best match is k plus the number of strangers that
are at least as similar. A strip of queries is compared with the gallery at a time, so a million images are evaluated
in bounded memory.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ceca.search.feedback import rerank

ArrayLike = np.ndarray | Tensor

STRIP = 2**24  # similarities in a strip of queries, 64 MB in fp32
CHUNK = 2**20  # similarities that one thread ranks at a time
NOBODY = -1  # identity of an image whose person nobody named (ceca.data.schema.NOBODY)
AT = (1, 5, 10)
AHEAD = 4.0  # added to the similarities of re-ranked images, which puts them before all others
PER_QUERY = (
    *("rank1", "rank5", "rank10", "average_precision", "inverse_negative_penalty", "first"),
    *("best_own", "best_other"),  # similarity of the best image of the query's identity, and of another; -inf: no image
)


@dataclasses.dataclass(frozen=True)
class RetrievalMetrics:
    """Means over queries, in percent; `rsum` is the sum of the three ranks."""

    rank1: float
    rank5: float
    rank10: float
    mean_average_precision: float
    mean_inverse_negative_penalty: float

    @property
    def rsum(self) -> float:
        return self.rank1 + self.rank5 + self.rank10

    def as_dict(self) -> dict[str, float]:
        return {**dataclasses.asdict(self), "rsum": self.rsum}

    @classmethod
    def of(cls, per_query: np.ndarray) -> RetrievalMetrics:
        """The means of the figures [Q, 8] that `rank_embeddings` returns for one ω."""
        return cls(*(float(value) for value in 100 * per_query[:, :5].mean(axis=0)))


def better(candidate: Mapping[str, float], best: Mapping[str, float] | None, keys: Sequence[str]) -> bool:
    """Whether metrics improve on the best so far. Keys are compared in order; equal metrics do not improve.

    Args:
        candidate: the new metrics.
        best: the best metrics so far; None before the first.
        keys: names of the metrics, the most important first.
    """
    return best is None or [candidate[key] for key in keys] > [best[key] for key in keys]


class Matches:
    """The gallery images that show each query's identity."""

    def __init__(self, query_identities: ArrayLike, gallery_identities: ArrayLike):
        queries, gallery = _array(query_identities), _array(gallery_identities)
        self.order = np.argsort(gallery, kind="stable")
        self.start, end = (np.searchsorted(gallery[self.order], queries, side) for side in ("left", "right"))
        # Nobody said who is on these images, so none of them matches another.
        self.count = np.where(queries == NOBODY, 0, end - self.start)
        self.queries, self.gallery = len(queries), len(gallery)

    def of(self, rows: slice) -> Matches:
        """The matches of some of the queries."""
        part = copy.copy(self)
        part.start, part.count = self.start[rows], self.count[rows]
        part.queries = len(part.start)
        return part

    def columns(self, rows: slice) -> np.ndarray:
        """Gallery columns of some queries' matches, [q, K]: K is the largest count, -1 fills shorter rows."""
        start, count = self.start[rows, None], self.count[rows, None]
        nth = np.arange(max(1, count.max(initial=0)))
        return np.where(nth < count, self.order[np.minimum(start + nth, self.gallery - 1)], -1)


def retrieval_metrics(
    similarity: ArrayLike, query_identities: ArrayLike, gallery_identities: ArrayLike, *, block: int = 256
) -> RetrievalMetrics:
    """Rank-1/5/10, mAP and mINP of queries over a gallery.

    Args:
        similarity: [Q, G]; larger is more similar.
        query_identities: [Q].
        gallery_identities: [G].
        block: number of queries ranked at a time; it bounds memory and changes nothing else.

    Raises:
        ValueError: shapes do not fit, there is no query or no image, or a similarity is not a number.
    """
    similarity = _array(similarity)
    matches = Matches(query_identities, gallery_identities)
    if similarity.shape != (matches.queries, matches.gallery) or not similarity.size:
        raise ValueError(
            f"similarity must be [Q, G] = [{matches.queries}, {matches.gallery}] and not empty, "
            f"found {list(similarity.shape)}"
        )
    parts = [
        rank_strip(similarity[rows].astype(np.result_type(similarity, np.float32), order="C"), matches, rows)
        for rows in slices(matches.queries, block)
    ]
    return RetrievalMetrics.of(np.concatenate(parts))


def rank_embeddings(
    queries: tuple[Tensor, Tensor],
    gallery: tuple[Tensor, Tensor],
    matches: Matches,
    omegas: Sequence[float],
    *,
    only_first: bool = False,
    rerank_first: int = 0,
    strip: int | None = None,
) -> dict[float, np.ndarray]:
    """Rank every query over the whole gallery, for several ω in one pass over the embeddings.

    The global and the local cosines of a strip of queries are computed once and combined for each ω.

    Args:
        queries: normalised embeddings, global [Q, D] and local [Q, E], fp32.
        gallery: normalised embeddings of the images, global [G, D] and local [G, E], fp32.
        matches: of these queries in this gallery.
        omegas: shares of the local similarity.
        only_first: compute ranks alone; the other figures stay 0.
        rerank_first: number of best images per query that are ranked again (`search.feedback`); they stay before the
            others. 0 is off.
        strip: number of queries compared at a time; it bounds memory and changes nothing else.

    Returns:
        For each ω [Q, 8] with the columns `PER_QUERY`: match at rank 1, 5, 10 (0 or 1), average precision, inverse
        negative penalty, the position of the first match (0 without a match in the gallery), and the similarities of
        the best match and of the best other image (-inf where there is none).

    Raises:
        ValueError: shapes do not fit, there is no query or no image, or a similarity is not a number.
    """
    count, size = len(queries[0]), len(gallery[0])
    if (count, size) != (matches.queries, matches.gallery) or not count or not size:
        raise ValueError(
            f"embeddings must be of {matches.queries} queries and {matches.gallery} images and not empty, "
            f"found {count} and {size}"
        )
    figures = {omega: np.zeros((count, len(PER_QUERY))) for omega in omegas}
    strip = strip or max(16, STRIP // size)
    cosines = [torch.empty(min(strip, count), size) for _ in range(2)]
    fused = torch.empty_like(cosines[0])
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for rows in slices(count, strip):
            here = rows.stop - rows.start
            for out, side, images in zip(cosines, queries, gallery, strict=True):
                torch.mm(side[rows], images.T, out=out[:here])
            for omega, ranked in figures.items():
                torch.lerp(cosines[0][:here], cosines[1][:here], omega, out=fused[:here])
                if rerank_first:
                    _rerank(fused[:here], gallery, omega, rerank_first)
                ranked[rows] = _rank_in_threads(threads, fused[:here].numpy(), matches, rows, only_first)
    return figures


def _rerank(similarity: Tensor, gallery: tuple[Tensor, Tensor], omega: float, most: int) -> None:
    """Rank the best images of each query again, in place: [q, G] similarities."""
    best = similarity.topk(min(most, similarity.shape[1]), dim=1)
    again = rerank(best.values, (gallery[0][best.indices], gallery[1][best.indices]), omega)
    similarity.scatter_(1, best.indices, again + AHEAD)


def _rank_in_threads(
    threads: ThreadPoolExecutor, similarity: np.ndarray, matches: Matches, rows: slice, only_first: bool
) -> np.ndarray:
    """`rank_strip` of a strip of queries, a chunk per thread: [q, G] similarities, overwritten → [q, 8]."""

    def rank(chunk: slice) -> np.ndarray:
        queries = slice(rows.start + chunk.start, rows.start + chunk.stop)
        return rank_strip(similarity[chunk], matches, queries, only_first=only_first)

    count, size = similarity.shape
    return np.concatenate(list(threads.map(rank, slices(count, max(1, CHUNK // size)))))


def rank_strip(similarity: np.ndarray, matches: Matches, rows: slice, *, only_first: bool = False) -> np.ndarray:
    """Compute the figures `PER_QUERY` of some queries.

    Args:
        similarity: [q, G] of these queries; it is overwritten.
        matches: of all queries.
        rows: which queries these are.
        only_first: compute ranks alone; the other figures stay 0.

    Returns:
        [q, 8].

    Raises:
        ValueError: a similarity is not a number.
    """
    columns = matches.columns(rows)
    present = columns >= 0
    matching = np.where(present, np.take_along_axis(similarity, np.maximum(columns, 0), axis=1), -np.inf)
    similarity[np.nonzero(present)[0], columns[present]] = -np.inf  # leaves the strangers' similarities alone
    if only_first:
        matching, present = matching.max(axis=1, keepdims=True), present[:, :1]
    matching = -np.sort(-matching, axis=1)  # the best match first, absent ones last
    if only_first:
        ahead = (similarity >= matching).sum(axis=1, keepdims=True)
        unknown = np.isnan(similarity).any() or np.isnan(matching).any()
    else:
        similarity.sort(axis=1)
        places = torch.searchsorted(torch.from_numpy(similarity), torch.from_numpy(matching))
        ahead = similarity.shape[1] - places.numpy()
        unknown = np.isnan(similarity[:, -1]).any() or np.isnan(matching).any()
    if unknown:
        raise ValueError("similarity holds values that are not numbers (NaN): look at the embeddings")
    nth = np.arange(1, matching.shape[1] + 1)
    position = np.where(present, nth + ahead, 0)  # of the n-th match, from 1
    count = matches.count[rows]
    first = position[:, 0]
    figures = np.zeros((len(position), len(PER_QUERY)))
    figures[:, :3] = (first[:, None] > 0) & (first[:, None] <= np.array(AT))
    if not only_first:
        precision = np.divide(nth, position, out=np.zeros(position.shape), where=present)
        figures[:, 3] = precision.sum(axis=1) / np.maximum(count, 1)
        figures[:, 4] = count / np.maximum(position.max(axis=1), 1)
        figures[:, 6], figures[:, 7] = matching[:, 0], similarity[:, -1]
    figures[:, 5] = first
    return figures


def slices(count: int, step: int) -> Iterable[slice]:
    """Consecutive slices of at most `step` rows that cover `count` rows."""
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _array(values: ArrayLike) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
