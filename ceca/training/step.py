"""The losses of a training step over the global batch.

Notable: every worker computes the losses of the *whole* global batch from gathered features, and only its own rows
carry a gradient. The sum of all workers' gradients is then the gradient of that one loss. This takes one collective
in the forward pass and none in the backward pass. DeepSpeed averages gradients over workers, hence the factor in
`scaled_loss`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ceca.config import LossConfig, Term
from ceca.losses import (
    confidence_aware_weighting_loss,
    contrastive_loss,
    cosine_similarity,
    similarity_distribution_matching,
    triplet_alignment_loss,
)
from ceca.model.ceca import Features
from ceca.training.workers import world


def loss_terms(
    features: Features, identities: Tensor, config: LossConfig, clean: Tensor | None = None
) -> dict[str, Tensor]:
    """The configured losses over a batch: name of the term → fp32 scalar.

    Args:
        features: of the batch; over the global batch in training (`workers.gather_features`).
        identities: [B] of its samples.
        config: the terms and their constants.
        clean: [B] booleans. The losses of other samples do not count, but others are compared with them. None: all.

    Raises:
        ValueError: a term needs features that the model does not compute.
    """
    similarity = cosine_similarity(features.text, features.visual)  # shared by the terms on global features
    return {term: _term(term, features, similarity, identities, config, clean) for term in config.terms}


def _term(
    term: Term,
    features: Features,
    similarity: Tensor,
    identities: Tensor,
    config: LossConfig,
    clean: Tensor | None,
) -> Tensor:
    match term:
        case "tal_global":
            return _chosen(_tal(similarity, identities, config), clean).sum()
        case "tal_local":
            return _chosen(_tal(_local_similarity(features, term), identities, config), clean).sum()
        case "cawl":
            return _mean(cawl(features, identities, config)[0], clean)
        case "infonce":
            return _mean(contrastive_loss(similarity, scale=config.scale), clean)
        case "sdm":
            return _mean(similarity_distribution_matching(similarity, identities, scale=config.scale), clean)
        case "identity":
            (identity_loss,) = _needed(features, term, "identity_loss")
            return config.identity_weight * _mean(identity_loss[:, 0], clean)
        case "words":
            (word_loss,) = _needed(features, term, "word_loss")
            loss, words = _chosen(word_loss, clean).sum(dim=0)
            return loss / words.clamp(min=1)


def branch_losses(features: Features, identities: Tensor, config: LossConfig) -> Tensor:
    """The triplet alignment loss of every sample by the global and the local branch, [2, B]."""
    similarities = (cosine_similarity(features.text, features.visual), _local_similarity(features, "division"))
    return torch.stack([_tal(similarity, identities, config) for similarity in similarities])


def _tal(similarity: Tensor, identities: Tensor, config: LossConfig) -> Tensor:
    return triplet_alignment_loss(similarity, identities, temperature=config.temperature, margin=config.margin)


def _local_similarity(features: Features, term: str) -> Tensor:
    return cosine_similarity(*_needed(features, term, "local_text", "local_visual"))


def _chosen(losses: Tensor, clean: Tensor | None) -> Tensor:
    """The losses [B, …], 0 for samples that are not clean."""
    return losses if clean is None else losses.masked_fill(~clean.view(-1, *[1] * (losses.ndim - 1)), 0.0)


def _mean(losses: Tensor, clean: Tensor | None) -> Tensor:
    """The mean over clean samples; 0 without one."""
    return losses.mean() if clean is None else _chosen(losses, clean).sum() / clean.sum().clamp(min=1)


def cawl(features: Features, identities: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """The losses and the weights of CAWL over a batch, [B] each."""
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
    values = [getattr(features, name) for name in names]
    if any(value is None for value in values):
        raise ValueError(f"the loss {term} needs {', '.join(names)}, which this model does not compute")
    return values


def scaled_loss(terms: dict[str, Tensor]) -> Tensor:
    """The loss for the backward pass: the sum of the terms times the number of workers."""
    _, size = world()
    return size * torch.stack(list(terms.values())).sum()
