"""Re-ranking by what was found first: images that look like the first few come before those that only fit the words.

A sentence leaves much of a person out; the first images show it. (Pseudo-relevance feedback; in retrieval of images by
images the same is called query expansion.) Its settings were chosen on validation splits of drawn pedestrians.
"""

from __future__ import annotations

import torch
from torch import Tensor

FIRST, SHARE, TEMPERATURE = 5, 0.3, 0.05


def rerank(similarity: Tensor, rows: tuple[Tensor, Tensor], omega: Tensor | float) -> Tensor:
    """New similarities of each query's best images, in their old order, [Q, R].

    s'_i = (1-β)·s_i + β·Σ_j a_j·S(j, i) over the first five images j, with S the fused similarity of two images, a the
    softmax of s_j/temperature, and β = SHARE. An image is among its own five, as alike as can be.

    Args:
        similarity: [Q, R] of the best images, best first. rows: their normalised (global [Q, R, D], local [Q, R, E]).
        omega: ω of S, one or [Q, 1].
    """
    first = min(FIRST, similarity.shape[1])
    weights = (similarity[:, :first] / TEMPERATURE).softmax(dim=1)[:, None]
    alike = [(part @ (weights @ part[:, :first]).transpose(1, 2))[..., 0] for part in rows]
    return torch.lerp(similarity, torch.lerp(alike[0], alike[1], torch.as_tensor(omega, dtype=alike[0].dtype)), SHARE)
