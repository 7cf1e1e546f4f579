"""Merging the candidates of a gallery's shards into one ranked list."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from ceca.search.feedback import rerank


@dataclasses.dataclass(frozen=True)
class Hit:
    """One search result: the image, its identity, and the similarities that ranked it."""

    image_id: str
    identity: int
    similarity: float
    global_similarity: float
    local_similarity: float


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The K best images of a gallery, or of a shard of it, for one query, best first.

    The similarities are [K] arrays: `similarity` is the fused one. `rows` [K, D + E] are the embeddings in fp16, kept
    only for re-ranking.
    """

    ids: list[str]
    identities: list[int]
    similarity: np.ndarray
    global_similarity: np.ndarray
    local_similarity: np.ndarray
    rows: np.ndarray | None

    def first(self, count: int) -> Candidates:
        """The best `count` of them."""
        return Candidates(
            self.ids[:count],
            self.identities[:count],
            self.similarity[:count],
            self.global_similarity[:count],
            self.local_similarity[:count],
            None if self.rows is None else self.rows[:count],
        )


def rank(
    shards: Sequence[Candidates], *, top_k: int, omega: float, rerank_first: int = 0, global_dim: int = 0
) -> list[Hit]:
    """Merge the candidates of all shards of a gallery, sorted by similarity and then by image id.

    Args:
        shards: each shard's candidates for one query.
        top_k: number of hits.
        omega: ω of the query, for re-ranking.
        rerank_first: number of best images that are ranked again (`ceca.search.feedback`) and stay ahead of the others;
            0 is off. Their similarity in the hits is the new one.
        global_dim: width D of the global embeddings in the candidates' rows, for re-ranking.

    Returns:
        At most top_k hits, best first.
    """
    ids = [image_id for candidates in shards for image_id in candidates.ids]
    identities = [identity for candidates in shards for identity in candidates.identities]
    similarity, global_similarity, local_similarity = (
        np.concatenate([getattr(candidates, name) for candidates in shards])
        for name in ("similarity", "global_similarity", "local_similarity")
    )

    def order(places: Sequence[int], by: np.ndarray) -> list[int]:
        return sorted(places, key=lambda place: (-by[place], ids[place]))

    # While objects of `added` are joined into one, an image is in two objects, perhaps of two shards.
    once = {name: place for place, name in reversed(list(enumerate(ids)))}
    best = order(list(once.values()), similarity)[: max(top_k, rerank_first)]
    shown = similarity.astype(np.float64)
    if rerank_first and best:
        first = best[:rerank_first]
        rows = np.concatenate([candidates.rows for candidates in shards if candidates.rows is not None])[first]
        parts = rows[None, :, :global_dim].astype(np.float32), rows[None, :, global_dim:].astype(np.float32)
        shown[first] = rerank(similarity[None, first], parts, omega)[0]
        best = order(first, shown) + best[rerank_first:]
    columns = (shown, global_similarity, local_similarity)
    return [Hit(ids[place], identities[place], *(float(part[place]) for part in columns)) for place in best[:top_k]]
