"""From the candidates of a gallery, or of its shares, to one ranked list."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from ceca.search.feedback import rerank


@dataclasses.dataclass(frozen=True)
class Hit:
    """One answer: the image, its identity, and the similarities it was ranked by."""

    image_id: str
    identity: int
    similarity: float
    global_similarity: float
    local_similarity: float


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The best images of a gallery, or of a share of it, for one query, best first.

    `similarity` [K] of (image_id, identity, global and local similarity), and where they are to be ranked again their
    `rows` [K, D + E] in fp16.
    """

    ids: list[str]
    identities: list[int]
    similarity: np.ndarray
    global_similarity: np.ndarray
    local_similarity: np.ndarray
    rows: np.ndarray | None

    def first(self, count: int) -> Candidates:
        """The best so many of them."""
        return Candidates(
            self.ids[:count],
            self.identities[:count],
            self.similarity[:count],
            self.global_similarity[:count],
            self.local_similarity[:count],
            None if self.rows is None else self.rows[:count],
        )


def rank(
    shares: Sequence[Candidates], *, top_k: int, omega: float, rerank_first: int = 0, global_dim: int = 0
) -> list[Hit]:
    """The candidates of all shares of a gallery as one list, by similarity and then by image id.

    With `rerank_first`, so many best ones are ranked again and come before the others.
    """
    ids = [name for share in shares for name in share.ids]
    identities = [name for share in shares for name in share.identities]
    similarity, global_similarity, local_similarity = (
        np.concatenate([getattr(share, name) for share in shares])
        for name in ("similarity", "global_similarity", "local_similarity")
    )

    def order(places: Sequence[int], by: np.ndarray) -> list[int]:
        return sorted(places, key=lambda place: (-by[place], ids[place]))

    # An image that was added is in two objects, perhaps of two shares, while these are joined into one.
    once = {name: place for place, name in reversed(list(enumerate(ids)))}
    best = order(list(once.values()), similarity)[: max(top_k, rerank_first)]
    shown = similarity.astype(np.float64)
    if rerank_first and best:
        first = best[:rerank_first]
        rows = np.concatenate([share.rows for share in shares if share.rows is not None])[first]
        parts = torch.from_numpy(rows).float()[None].split([global_dim, rows.shape[1] - global_dim], dim=2)
        shown[first] = rerank(torch.from_numpy(similarity[first])[None], (parts[0], parts[1]), omega)[0].numpy()
        best = order(first, shown) + best[rerank_first:]
    columns = (shown, global_similarity, local_similarity)
    return [Hit(ids[place], identities[place], *(float(part[place]) for part in columns)) for place in best[:top_k]]
