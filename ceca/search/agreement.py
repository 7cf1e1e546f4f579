"""Let the views of one person in a gallery agree."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ceca.model.ceca import fused_similarity


def agree_with_neighbours(
    gallery: tuple[Tensor, Tensor],
    neighbours: int,
    omega: float,
    *,
    weight: float = 0.5,
    temperature: float = 0.1,
    chunk: int = 4096,
) -> tuple[Tensor, Tensor]:
    """Let views of one person agree: each image's embeddings take part of those of the images most like it.

    e_i → normalise(e_i + weight · Σ_j a_ij·e_j) over the nearest j ≠ i by the fused similarity S of all images, with a
    the softmax of S/temperature over them, so that a stranger among them counts for less. No identity is looked at.
    What one view's summary misses, another's brings in (database-side augmentation).

    Args:
        gallery: normalised (global, local) embeddings, [N, ·] each. neighbours: how many, at least 1.
        omega: ω of S. weight: share of the neighbours. chunk: images compared with all at once.

    Returns:
        Normalised (global, local) embeddings of the same shapes.
    """
    count = min(neighbours, len(gallery[0]) - 1)
    if count < 1:
        return gallery
    found = [torch.empty_like(part) for part in gallery]
    for start in range(0, len(gallery[0]), chunk):
        rows = slice(start, start + chunk)
        similarity = fused_similarity((gallery[0][rows], gallery[1][rows]), gallery, omega)
        own = torch.arange(len(similarity), device=similarity.device)
        similarity[own, start + own] = -torch.inf
        values, nearest = similarity.topk(count, dim=1)
        shares = weight * (values / temperature).softmax(dim=1)[..., None]
        for part, new in zip(gallery, found, strict=True):
            new[rows] = F.normalize(part[rows] + (shares * part[nearest]).sum(dim=1), dim=1)
    return found[0], found[1]
