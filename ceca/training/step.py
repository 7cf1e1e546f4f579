"""One training step, whatever runs it: the order of samples, losses over the global batch, the optimiser's groups.

Notable: every worker computes the loss of the *whole* global batch from gathered features, in which only its own
carry a gradient. The sum of the workers' gradients is then the gradient of that one loss, with a single
collective forward and none backward. Trainers average gradients over workers, hence the factor in `scaled_loss`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ceca.config import LossConfig
from ceca.losses import (
    confidence_aware_weighting_loss,
    contrastive_loss,
    similarity_distribution_matching,
    triplet_alignment_loss,
)
from ceca.model.ceca import Features
from ceca.training.workers import world


def loss_terms(features: Features, identities: Tensor, config: LossConfig) -> dict[str, Tensor]:
    """The configured losses over the whole batch it is given, by name: scalars, fp32."""
    tal = {"temperature": config.temperature, "margin": config.margin}
    similarity = cosine(features.text, features.visual)

    def compute(term: str) -> Tensor:
        if term == "tal_global":
            return triplet_alignment_loss(similarity, identities, **tal).sum()
        if term == "tal_local":
            local_text, local_visual = _needed(features, term, "local_text", "local_visual")
            return triplet_alignment_loss(cosine(local_text, local_visual), identities, **tal).sum()
        if term == "cawl":
            return cawl(features, identities, config)[0].mean()
        if term == "infonce":
            return contrastive_loss(similarity, scale=config.scale).mean()
        if term == "sdm":
            return similarity_distribution_matching(similarity, identities, scale=config.scale).mean()
        if term == "identity":
            (identity_loss,) = _needed(features, term, "identity_loss")
            return config.identity_weight * identity_loss.mean()
        (word_loss,) = _needed(features, term, "word_loss")  # words
        loss, words = word_loss.sum(dim=0)
        return loss / words.clamp(min=1)

    return {term: compute(term) for term in config.terms}


def cawl(features: Features, identities: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """CAWL's losses and weights, [B] each."""
    (summary,) = _needed(features, "cawl", "summary")
    return confidence_aware_weighting_loss(
        summary,
        features.text,
        features.image,
        identities,
        scale=config.scale,
        gamma=config.gamma,
        weight_range=config.weight_range,
    )


def _needed(features: Features, term: str, *names: str) -> list[Tensor]:
    found = [getattr(features, name) for name in names]
    if any(value is None for value in found):
        raise ValueError(f"the loss {term} needs {', '.join(names)}, which this model does not compute")
    return found


def cosine(rows: Tensor, columns: Tensor) -> Tensor:
    """[B, D], [C, D] → [B, C] in fp32."""
    return F.normalize(rows.float(), dim=1) @ F.normalize(columns.float(), dim=1).T


def scaled_loss(terms: dict[str, Tensor]) -> Tensor:
    """The sum of the terms, times the number of workers: what to call backward on."""
    _, size = world()
    return size * torch.stack(list(terms.values())).sum()


def better(candidate: dict[str, float], best: dict[str, float] | None, keys: Sequence[str]) -> bool:
    """Whether validation metrics improve, compared key by key; equal ones do not."""
    return best is None or [candidate[key] for key in keys] > [best[key] for key in keys]
