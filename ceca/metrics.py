"""Retrieval metrics over a whole gallery, by identity (method: Retrieval and evaluation).

Ties: among gallery images of equal similarity, those of other identities rank first. So a model that gives every
image the same similarity scores worst and not best, and the order of a gallery never changes a figure.
A query whose identity is not in the gallery counts as a miss in every metric: leaving it out would flatter.

Notable: nothing but the similarities is sorted, for the rank of the k-th best match is k plus the number of strangers
that are at least as similar; and never more than a strip of queries is compared with the gallery at a time, so that a
million images are evaluated in bounded memory.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ceca.search.feedback import rerank

ArrayLike = np.ndarray | Tensor

STRIP = 2**24  # similarities of a strip, 64 MB in fp32
CHUNK = 2**20  # of which one thread ranks so many at a time
AT = (1, 5, 10)
AHEAD = 4.0  # added to cosines, which brings an image before all that have nothing added
PER_QUERY = ("rank1", "rank5", "rank10", "average_precision", "inverse_negative_penalty", "first")


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
        """The means of what `rank_embeddings` gives, [Q, 6]."""
        return cls(*(float(value) for value in 100 * per_query[:, :5].mean(axis=0)))


class Matches:
    """Where the identity of each query is in the gallery."""

    def __init__(self, query_identities: ArrayLike, gallery_identities: ArrayLike):
        queries, gallery = _array(query_identities), _array(gallery_identities)
        self.order = np.argsort(gallery, kind="stable")
        self.start, end = (np.searchsorted(gallery[self.order], queries, side) for side in ("left", "right"))
        self.count = end - self.start
        self.queries, self.gallery = len(queries), len(gallery)

    def of(self, rows: slice) -> Matches:
        """The same for some of the queries."""
        part = copy.copy(self)
        part.start, part.count = self.start[rows], self.count[rows]
        part.queries = len(part.start)
        return part

    def columns(self, rows: slice) -> np.ndarray:
        """Gallery columns of these queries' matches, [q, K] with K the most that one has; -1 behind the last."""
        start, count = self.start[rows, None], self.count[rows, None]
        nth = np.arange(max(1, count.max(initial=0)))
        return np.where(nth < count, self.order[np.minimum(start + nth, self.gallery - 1)], -1)


def retrieval_metrics(
    similarity: ArrayLike, query_identities: ArrayLike, gallery_identities: ArrayLike, *, block: int = 256
) -> RetrievalMetrics:
    """Rank-1/5/10, mAP and mINP of queries over a gallery.

    Args:
        similarity: [Q, G], larger is more alike.
        query_identities: [Q]. gallery_identities: [G].
        block: queries ranked at a time; it bounds memory and changes nothing else.

    Raises:
        ValueError: shapes do not fit, no query or gallery, or a similarity is not a number.
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

    A strip of queries at a time: its global and its local cosines are computed once and combined for each ω.

    Args:
        queries: normalised (global [Q, D], local [Q, E]), fp32. gallery: the same of G images.
        omegas: shares of the local similarity. only_first: ranks alone; the last two figures of a query stay 0.
        rerank_first: so many best images of each query are ranked again (`search.feedback`) and stay before the others.
        strip: queries compared at a time; it bounds memory and changes nothing else.

    Returns:
        For each ω [Q, 6], columns `PER_QUERY`: found at rank 1, 5, 10, average precision, inverse negative penalty,
        and the position of the first match (0: the gallery has none).

    Raises:
        ValueError: shapes do not fit, no query or gallery, or a similarity is not a number.
    """
    count, size = len(queries[0]), len(gallery[0])
    if (count, size) != (matches.queries, matches.gallery) or not count or not size:
        raise ValueError(
            f"embeddings must be of {matches.queries} queries and {matches.gallery} images and not empty, "
            f"found {count} and {size}"
        )
    found = {omega: np.zeros((count, len(PER_QUERY))) for omega in omegas}
    strip = strip or max(16, STRIP // size)
    cosines = [torch.empty(min(strip, count), size) for _ in range(2)]
    fused = torch.empty_like(cosines[0])
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for rows in slices(count, strip):
            own = rows.stop - rows.start
            for part, side, others in zip(cosines, queries, gallery, strict=True):
                torch.mm(side[rows], others.T, out=part[:own])
            for omega, ranked in found.items():
                torch.lerp(cosines[0][:own], cosines[1][:own], omega, out=fused[:own])
                if rerank_first:
                    best = fused[:own].topk(min(rerank_first, size), dim=1)
                    again = rerank(best.values, (gallery[0][best.indices], gallery[1][best.indices]), omega)
                    fused[:own].scatter_(1, best.indices, again + AHEAD)
                similarity = fused[:own].numpy()

                def rank(chunk: slice, similarity: np.ndarray = similarity, first: int = rows.start) -> np.ndarray:
                    place = slice(first + chunk.start, first + chunk.stop)
                    return rank_strip(similarity[chunk], matches, place, only_first=only_first)

                ranked[rows] = np.concatenate(list(threads.map(rank, slices(own, max(1, CHUNK // size)))))
    return found


def rank_strip(similarity: np.ndarray, matches: Matches, rows: slice, *, only_first: bool = False) -> np.ndarray:
    """The figures `PER_QUERY` of some queries, [q, 6]; their similarities [q, G] are overwritten."""
    columns = matches.columns(rows)
    there = columns >= 0
    found = np.where(there, np.take_along_axis(similarity, np.maximum(columns, 0), axis=1), -np.inf)
    similarity[np.nonzero(there)[0], columns[there]] = -np.inf  # strangers alone are left
    if only_first:
        found, there = found.max(axis=1, keepdims=True), there[:, :1]
    found = -np.sort(-found, axis=1)  # the best match first, absent ones last
    if only_first:
        ahead = (similarity >= found).sum(axis=1, keepdims=True)
        unknown = np.isnan(similarity).any() or np.isnan(found).any()
    else:
        similarity.sort(axis=1)
        ahead = similarity.shape[1] - torch.searchsorted(torch.from_numpy(similarity), torch.from_numpy(found)).numpy()
        unknown = np.isnan(similarity[:, -1]).any() or np.isnan(found).any()
    if unknown:
        raise ValueError("similarity holds values that are not numbers (NaN): look at the embeddings")
    nth = np.arange(1, found.shape[1] + 1)
    position = np.where(there, nth + ahead, 0)  # of the n-th match, from 1
    count = matches.count[rows]
    first = position[:, 0]
    figures = np.zeros((len(position), len(PER_QUERY)))
    figures[:, :3] = (first[:, None] > 0) & (first[:, None] <= np.array(AT))
    if not only_first:
        precision = np.divide(nth, position, out=np.zeros(position.shape), where=there)
        figures[:, 3] = precision.sum(axis=1) / np.maximum(count, 1)
        figures[:, 4] = count / np.maximum(position.max(axis=1), 1)
    figures[:, 5] = first
    return figures


def slices(count: int, step: int) -> Iterable[slice]:
    """Consecutive slices of at most `step` that cover so many rows."""
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def _array(values: ArrayLike) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
