"""The losses of CECA and of the baselines, one number per sample (method: Losses, The IRRA baseline).

Notable: every loss sees the whole batch that it receives and loops over nothing; all samples of one identity are
positives of each other; everything is computed in fp32 and in log space, so similarities of ±1 at a temperature of
0.015 and batches of one identity stay finite. A new loss is a function here and a term in `training.step`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def same_identity(rows: Tensor, columns: Tensor) -> Tensor:
    """Compare identities: [B], [C] → [B, C] booleans."""
    return rows[:, None] == columns[None, :]


def cosine_similarity(rows: Tensor, columns: Tensor) -> Tensor:
    """Compare features by their cosine, in fp32: [B, D], [C, D] → [B, C]."""
    return F.normalize(rows.float(), dim=1) @ F.normalize(columns.float(), dim=1).T


def triplet_alignment_loss(similarity: Tensor, identities: Tensor, *, temperature: float, margin: float) -> Tensor:
    """Triplet Alignment Loss (TAL, from RDE), both directions.

    Per row: max(0, m − Σ_{j∈P} α_j S_j + τ·log Σ_{j∈N} exp(S_j/τ)) with α the softmax of S/τ over the positives,
    without gradient. A row without negatives contributes 0.

    Args:
        similarity: [B, B] cosines; rows are texts, columns are images.
        identities: [B] of the samples; row i and column i belong to sample i.
        temperature: τ.
        margin: m.

    Returns:
        [B] fp32, per sample the sum of its row and its column. The loss of a batch is the sum over samples.

    Raises:
        ValueError: `similarity` is not [B, B].
    """
    if similarity.ndim != 2 or similarity.shape != (len(identities), len(identities)):
        raise ValueError(f"similarity must be [B, B] for {len(identities)} identities, found {list(similarity.shape)}")
    similarity = similarity.float()
    positive = same_identity(identities, identities)
    rows = _hardest_margin(similarity, positive, temperature, margin)
    columns = _hardest_margin(similarity.T, positive, temperature, margin)
    return rows + columns


def _hardest_margin(similarity: Tensor, positive: Tensor, temperature: float, margin: float) -> Tensor:
    """One direction of TAL: [B, B] cosines and [B, B] booleans → [B]."""
    logits = similarity / temperature
    weights = logits.detach().masked_fill(~positive, -torch.inf).softmax(dim=1)
    attraction = (weights * similarity).sum(dim=1)
    has_negative = (~positive).any(dim=1)
    # A row without negatives keeps its logits here, because the log of an empty sum has no usable gradient.
    excluded = positive & has_negative[:, None]
    repulsion = temperature * logits.masked_fill(excluded, -torch.inf).logsumexp(dim=1)
    loss = (margin - attraction + repulsion).clamp(min=0)
    return torch.where(has_negative, loss, torch.zeros_like(loss))


def confidence_aware_weighting_loss(
    summary: Tensor,
    text: Tensor,
    image: Tensor,
    identities: Tensor,
    *,
    scale: float,
    gamma: float,
    weight_range: tuple[float, float],
) -> tuple[Tensor, Tensor]:
    """Confidence-Aware Weighting Loss (CAWL), and its weights.

    With CE(L)_i = −log Σ_{j∈P(i)} softmax(L_i)_j and p = exp(−CE): w_i = (p(st)_i · p(si)_i)^γ, divided by its
    batch mean, clipped, without gradient; loss_i = w_i·(CE(st)_i + CE(si)_i) + (1 − w_i)·½(CE(it)_i + CE(ti)_i).

    Args:
        summary: [B, D] global features of the summaries; normalised here, as are the other two.
        text: [B, D] global features of the captions.
        image: [B, D] global features of the images.
        identities: [B] of the samples.
        scale: κ, the factor of the cosines.
        gamma: γ.
        weight_range: smallest and largest w.

    Returns:
        The losses and the weights w, [B] fp32 each. The loss of a batch is the mean over samples.
    """
    summary, text, image = (F.normalize(features.float(), dim=1) for features in (summary, text, image))
    positive = same_identity(identities, identities)
    image_text = scale * image @ text.T
    summary_text = _identity_cross_entropy(scale * summary @ text.T, positive)
    summary_image = _identity_cross_entropy(scale * summary @ image.T, positive)
    cross = 0.5 * (_identity_cross_entropy(image_text, positive) + _identity_cross_entropy(image_text.T, positive))
    weight = confidence_weights(summary_text, summary_image, gamma=gamma, weight_range=weight_range)
    return weight * (summary_text + summary_image) + (1 - weight) * cross, weight


def confidence_weights(
    summary_text: Tensor, summary_image: Tensor, *, gamma: float, weight_range: tuple[float, float]
) -> Tensor:
    """The weights w of CAWL, [B], without gradient.

    The mean is taken in log space, because the product of two small probabilities vanishes in fp32.

    Args:
        summary_text: [B] cross-entropies CE(st).
        summary_image: [B] cross-entropies CE(si).
        gamma: γ.
        weight_range: smallest and largest w.
    """
    log_weight = -gamma * (summary_text + summary_image).detach()
    log_mean = log_weight.logsumexp(dim=0) - torch.log(torch.tensor(float(len(log_weight)), device=log_weight.device))
    return (log_weight - log_mean).exp().clamp(*weight_range)


def _identity_cross_entropy(logits: Tensor, positive: Tensor) -> Tensor:
    """CE(L)_i = −log Σ_{j∈P(i)} softmax(L_i)_j: [B, B] logits and [B, B] booleans → [B]."""
    return logits.logsumexp(dim=1) - logits.masked_fill(~positive, -torch.inf).logsumexp(dim=1)


def contrastive_loss(similarity: Tensor, *, scale: float) -> Tensor:
    """InfoNCE, the loss of plain CLIP: the only positive of sample i is i, both directions.

    Args:
        similarity: [B, B] cosines; rows are texts, columns are images.
        scale: factor of the cosines.

    Returns:
        [B] fp32, the mean of a sample's two cross-entropies. The loss of a batch is the mean over samples.
    """
    logits = scale * similarity.float()
    positives = logits.diagonal()
    return 0.5 * (logits.logsumexp(dim=1) + logits.logsumexp(dim=0)) - positives


def similarity_distribution_matching(similarity: Tensor, identities: Tensor, *, scale: float) -> Tensor:
    """SDM of IRRA: KL(p‖q), p = softmax(scale·S) and q the normalised identity matches, both directions.

    Args:
        similarity: [B, B] cosines; rows are texts, columns are images.
        identities: [B] of the samples.
        scale: 1/temperature.

    Returns:
        [B] fp32, the sum of a sample's two divergences. The loss of a batch is the mean over samples.
    """
    logits = scale * similarity.float()
    matches = same_identity(identities, identities).float()
    target = torch.log(matches / matches.sum(dim=1, keepdim=True) + 1e-8)

    def divergence(rows: Tensor) -> Tensor:
        log_p = rows.log_softmax(dim=1)
        return (log_p.exp() * (log_p - target)).sum(dim=1)

    return divergence(logits) + divergence(logits.T)
