"""Re-ranking by the first images: images that look like them move ahead of images that only fit the query.

A sentence leaves out much of a person that the first images show. This is pseudo-relevance feedback, called query
expansion in image-to-image retrieval. The constants were chosen on validation splits of drawn pedestrians.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST, SHARE, TEMPERATURE = 5, 0.3, 0.05


def rerank(similarity: Tensor, rows: tuple[Tensor, Tensor], omega: Tensor | float) -> Tensor:
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
    weights = (similarity[:, :first] / TEMPERATURE).softmax(dim=1)[:, None]
    alike = [(part @ (weights @ part[:, :first]).transpose(1, 2))[..., 0] for part in rows]
    return torch.lerp(similarity, torch.lerp(alike[0], alike[1], torch.as_tensor(omega, dtype=alike[0].dtype)), SHARE)
