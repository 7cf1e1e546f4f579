"""Re-ranking by the first images: images that look like them move ahead of images that only fit the query.

A sentence leaves out much of a person that the first images show. This is pseudo-relevance feedback, called query
expansion in image-to-image retrieval. The constants were chosen on validation splits of drawn pedestrians.
"""

from __future__ import annotations

import math
from typing import Any, TypeVar

FIRST, SHARE, TEMPERATURE = 5, 0.3, 0.05

Array = TypeVar("Array", bound=Any)  # of torch to evaluate, on its device; of NumPy to serve, without torch


def rerank(similarity: Array, rows: tuple[Array, Array], omega: Array | float) -> Array:
    """Compute new similarities of each query's best images.

    s'_i = (1-β)·s_i + β·Σ_j a_j·S(j, i), where j ranges over the first `FIRST` images, S is the fused similarity of two
    images, a the softmax of s_j/TEMPERATURE, and β = SHARE. For the first images themselves, i is among the j.

    Args:
        similarity: [Q, R] similarities of the best images, best first.
        rows: their normalised embeddings (global [Q, R, D], local [Q, R, E]).
        omega: ω of S, one number or [Q, 1].

    Returns:
        [Q, R] similarities, in the order of the old ones.
    """
    first = min(FIRST, similarity.shape[1])
    weights = math.e ** ((similarity[:, :first] - similarity[:, :1]) / TEMPERATURE)
    weights = (weights / weights.sum(1)[:, None])[:, None]
    alike = [(part @ (weights @ part[:, :first]).swapaxes(1, 2))[..., 0] for part in rows]
    return (1 - SHARE) * similarity + SHARE * ((1 - omega) * alike[0] + omega * alike[1])  # type: ignore[no-any-return]
