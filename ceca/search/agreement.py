"""Make the views of one person in a gallery agree by averaging nearby embeddings."""

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
    """Average each image's embeddings with those of its nearest images (database-side augmentation).

    e_i → normalise(e_i + weight · Σ_j a_ij·e_j), where j ranges over the images nearest to i by the fused similarity S
    and a_i is the softmax of S_i/temperature over them, so that another person's image counts for less. Identities are
    not used. A detail that one view's summary misses can come from another view.

    Args:
        gallery: normalised (global [N, D], local [N, E]) embeddings.
        neighbours: number of nearest images, at least 1.
        omega: ω of S.
        weight: factor of the neighbours' average.
        temperature: temperature of the softmax.
        chunk: number of images that are compared with all others at once.

    Returns:
        Normalised (global, local) embeddings of the same shapes.
    """
    count = min(neighbours, len(gallery[0]) - 1)
    if count < 1:
        return gallery
    averaged = [torch.empty_like(embeddings) for embeddings in gallery]
    for start in range(0, len(gallery[0]), chunk):
        rows = slice(start, start + chunk)
        similarity = fused_similarity((gallery[0][rows], gallery[1][rows]), gallery, omega)
        images = torch.arange(len(similarity), device=similarity.device)
        similarity[images, start + images] = -torch.inf  # an image is not its own neighbour
        values, nearest = similarity.topk(count, dim=1)
        weights = weight * (values / temperature).softmax(dim=1)[..., None]
        for embeddings, new in zip(gallery, averaged, strict=True):
            new[rows] = F.normalize(embeddings[rows] + (weights * embeddings[nearest]).sum(dim=1), dim=1)
    return averaged[0], averaged[1]
