"""Retrieval metrics over a whole gallery, by identity (method: Retrieval and evaluation).

Ties: among gallery images of equal similarity, those of other identities rank first. So a model that gives every
image the same similarity scores worst and not best, and the order of a gallery never changes a figure.
A query whose identity is not in the gallery counts as a miss in every metric: leaving it out would flatter.
"""

import dataclasses

import numpy as np
import torch
from torch import Tensor

ArrayLike = np.ndarray | Tensor


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


def retrieval_metrics(
    similarity: ArrayLike, query_identities: ArrayLike, gallery_identities: ArrayLike, *, block: int = 256
) -> RetrievalMetrics:
    """Rank-1/5/10, mAP and mINP of queries over a gallery.

    Args:
        similarity: [Q, G], larger is more alike.
        query_identities: [Q]. gallery_identities: [G].
        block: queries sorted at a time; it bounds memory and changes nothing else.

    Raises:
        ValueError: shapes do not fit, no query or gallery, or a similarity is not a number.
    """
    similarity = _array(similarity)
    queries, gallery = _array(query_identities), _array(gallery_identities)
    if similarity.shape != (len(queries), len(gallery)) or not similarity.size:
        raise ValueError(
            f"similarity must be [Q, G] = [{len(queries)}, {len(gallery)}] and not empty, "
            f"found {list(similarity.shape)}"
        )
    if np.isnan(similarity).any():
        raise ValueError("similarity holds values that are not numbers (NaN): look at the embeddings")
    per_query = [
        _rank_queries(similarity[start : start + block], queries[start : start + block], gallery)
        for start in range(0, len(queries), block)
    ]
    means = 100 * np.concatenate(per_query).mean(axis=0)
    return RetrievalMetrics(*(float(value) for value in means))


def _rank_queries(similarity: np.ndarray, queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """[Q, 5]: found at rank 1, 5, 10, average precision, inverse negative penalty of every query."""
    match = queries[:, None] == gallery[None, :]
    # lexsort's last key decides first: by similarity, then matches behind the others.
    order = np.lexsort((match, -similarity), axis=1)
    hits = np.take_along_axis(match, order, axis=1)
    found = np.cumsum(hits, axis=1)
    positions = np.arange(1, len(gallery) + 1)
    matches = found[:, -1]
    average_precision = (found / positions * hits).sum(axis=1) / np.maximum(matches, 1)
    last = np.where(hits, positions, 0).max(axis=1)  # position of the hardest match
    inverse_penalty = matches / np.maximum(last, 1)
    first = np.where(matches > 0, np.argmax(hits, axis=1) + 1, len(gallery) + 11)
    ranks = [first <= k for k in (1, 5, 10)]
    return np.stack([*ranks, average_precision, inverse_penalty], axis=1).astype(np.float64)


def _array(values: ArrayLike) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
