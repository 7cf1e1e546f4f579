"""The losses of CECA and of the baselines, one number per sample (method: Losses, The IRRA baseline).

Notable: every loss sees the whole batch that it receives; all samples of one identity are positives of each other;
everything is computed in fp32 and in log space, so similarities of ±1 at a temperature of 0.015 and batches of one
identity stay finite. In training a worker compares its own rows with all columns (`compare`), and no matrix of
similarities outlives the line that needs it: the backward pass computes them again, a piece at a time. A new loss is a
class with a value and a slope here, and a term in `training.step`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

PIECE = 2**24  # similarities that `compare` holds at once: 67 MB


def same_identity(rows: Tensor, columns: Tensor) -> Tensor:
    """Compare identities: [B], [C] → [B, C] booleans."""
    return rows[:, None] == columns[None, :]


def cosine_similarity(rows: Tensor, columns: Tensor) -> Tensor:
    """Compare features by their cosine, in fp32: [B, D], [C, D] → [B, C]."""
    return F.normalize(rows.float(), dim=1) @ F.normalize(columns.float(), dim=1).T


class RowLoss(Protocol):
    """A loss of one row of similarities: a text with all images, or an image with all texts.

    `value` gives the losses [K, b], and `slope` their derivatives by the similarities [K, b, B]. Both take similarities
    [K, b, B] in fp32, and positives [b, B] that say which columns belong to a row's person. A similarity counts by its
    exponential, after it was divided by `temperature`.
    """

    @property
    def temperature(self) -> float: ...

    def value(self, similarity: Tensor, positive: Tensor) -> Tensor: ...

    def slope(self, similarity: Tensor, positive: Tensor) -> Tensor: ...


@dataclasses.dataclass(frozen=True)
class TripletAlignment:
    """One direction of TAL: max(0, m − Σ_{j∈P} α_j S_j + τ·log Σ_{j∈N} exp(S_j/τ)), α without gradient."""

    temperature: float
    margin: float

    def value(self, similarity: Tensor, positive: Tensor) -> Tensor:
        loss, _, _, has_negative = self._parts(similarity, positive)
        return torch.where(has_negative, loss.clamp(min=0), 0.0)

    def slope(self, similarity: Tensor, positive: Tensor) -> Tensor:
        loss, weights, negative, has_negative = self._parts(similarity, positive)
        return (negative.softmax(dim=-1) - weights) * ((loss >= 0) & has_negative)[..., None]

    def _parts(self, similarity: Tensor, positive: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss before it is cut at 0, α, the logits of the negatives, and which rows have negatives."""
        logits = similarity / self.temperature
        weights = logits.detach().masked_fill(~positive, -torch.inf).softmax(dim=-1)
        has_negative = ~positive.all(dim=-1)
        # A row without negatives keeps its logits here, because the log of an empty sum has no usable gradient.
        negative = logits.masked_fill(positive & has_negative[:, None], -torch.inf)
        attraction = (weights * similarity).sum(dim=-1)
        loss = self.margin - attraction + self.temperature * negative.logsumexp(dim=-1)
        return loss, weights, negative, has_negative


@dataclasses.dataclass(frozen=True)
class IdentityCrossEntropy:
    """CE_i = −log Σ_{j∈P(i)} softmax(scale·S_i)_j."""

    scale: float

    @property
    def temperature(self) -> float:
        return 1 / self.scale

    def value(self, similarity: Tensor, positive: Tensor) -> Tensor:
        logits = self.scale * similarity
        return logits.logsumexp(dim=-1) - logits.masked_fill(~positive, -torch.inf).logsumexp(dim=-1)

    def slope(self, similarity: Tensor, positive: Tensor) -> Tensor:
        logits = self.scale * similarity
        own = logits.masked_fill(~positive, -torch.inf).softmax(dim=-1)
        return self.scale * (logits.softmax(dim=-1) - own)


@dataclasses.dataclass(frozen=True)
class DistributionMatching:
    """One direction of SDM: KL(p‖q), p = softmax(scale·S) and q the normalised identity matches."""

    scale: float

    @property
    def temperature(self) -> float:
        return 1 / self.scale

    def value(self, similarity: Tensor, positive: Tensor) -> Tensor:
        log_p, difference = self._parts(similarity, positive)
        return (log_p.exp() * difference).sum(dim=-1)

    def slope(self, similarity: Tensor, positive: Tensor) -> Tensor:
        log_p, difference = self._parts(similarity, positive)
        p = log_p.exp()
        return self.scale * p * (difference - (p * difference).sum(dim=-1, keepdim=True))

    def _parts(self, similarity: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
        """log p, and log p − log q."""
        log_p = (self.scale * similarity).log_softmax(dim=-1)
        matches = positive.float()
        return log_p, log_p - torch.log(matches / matches.sum(dim=-1, keepdim=True) + 1e-8)


def compare(
    loss: RowLoss,
    rows: Sequence[Tensor],
    columns: Sequence[Tensor],
    row_of: Tensor,
    column_of: Tensor,
    log_weights: Tensor | None = None,
) -> Tensor:
    """Losses of K comparisons of b rows with B columns: [K, b], with gradients.

    Memory is b·D and B·D: the similarities are computed a piece at a time, and again in the backward pass.

    Args:
        loss: what a row costs.
        rows: K normalised features, [b, D] each, of the samples whose losses are wanted.
        columns: K normalised features, [B, D] each, of the whole batch.
        row_of: [b] identities of the rows.
        column_of: [B] identities of the columns.
        log_weights: [b, B] log w, the weight of each column in a row's sums over exponentials; None: 1 for all.
    """
    losses: Tensor = _Compare.apply(loss, row_of, column_of, log_weights, *rows, *columns)
    return losses


class _Compare(torch.autograd.Function):
    """Values in the forward pass, slopes in the backward pass, both from features alone."""

    @staticmethod
    def forward(
        ctx: Any, loss: RowLoss, row_of: Tensor, column_of: Tensor, log_weights: Tensor | None, *features: Tensor
    ) -> Tensor:
        ctx.loss = loss
        ctx.save_for_backward(row_of, column_of, log_weights, *features)
        rows, columns = torch.stack(features[: len(features) // 2]), torch.stack(features[len(features) // 2 :])
        values = [
            loss.value(_weighted(loss, rows, columns, piece, log_weights), same_identity(row_of[piece], column_of))
            for piece in _pieces(rows, columns)
        ]
        return torch.cat(values, dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        row_of, column_of, log_weights, *features = ctx.saved_tensors
        rows, columns = torch.stack(features[: len(features) // 2]), torch.stack(features[len(features) // 2 :])
        to_rows, to_columns = torch.empty_like(rows), torch.zeros_like(columns)
        for piece in _pieces(rows, columns):
            similarity = _weighted(ctx.loss, rows, columns, piece, log_weights)
            slope = ctx.loss.slope(similarity, same_identity(row_of[piece], column_of))
            slope = slope * gradient[:, piece, None]
            torch.bmm(slope, columns, out=to_rows[:, piece])
            to_columns.baddbmm_(slope.mT, rows[:, piece])
        return None, None, None, None, *to_rows, *to_columns


def _weighted(loss: RowLoss, rows: Tensor, columns: Tensor, piece: slice, log_weights: Tensor | None) -> Tensor:
    """Similarities of a piece of the rows. exp(S/τ) of a column is multiplied by its weight: S becomes S + τ·log w."""
    similarity = rows[:, piece] @ columns.mT
    return similarity if log_weights is None else similarity + loss.temperature * log_weights[piece]


def _pieces(rows: Tensor, columns: Tensor) -> list[slice]:
    """The rows in pieces whose similarities fit in PIECE: rows [K, b, D], columns [K, B, D]."""
    most = max(1, PIECE // (len(columns) * columns.shape[1]))
    return [slice(start, start + most) for start in range(0, max(1, rows.shape[1]), most)]


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
    loss = TripletAlignment(temperature, margin)
    both = torch.stack([similarity.float(), similarity.float().T])
    return loss.value(both, same_identity(identities, identities)).sum(dim=0)


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
    cross_entropy = IdentityCrossEntropy(scale)
    entropies = compare(cross_entropy, *cawl_comparisons(summary, text, image), identities, identities)
    weight = confidence_weights(entropies[0], entropies[1], gamma=gamma, weight_range=weight_range)
    return weigh_entropies(entropies, weight), weight


def cawl_comparisons(
    summary: Tensor, text: Tensor, image: Tensor, rows: slice = slice(None)
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Rows and columns of CAWL's four comparisons (st, si, it, ti), for `compare`.

    Args:
        summary: [B, D] normalised features of the summaries.
        text: [B, D] of the captions.
        image: [B, D] of the images.
        rows: the samples whose losses are wanted.
    """
    return [side[rows] for side in (summary, summary, image, text)], [text, image, text, image]


def weigh_entropies(entropies: Tensor, weight: Tensor) -> Tensor:
    """CAWL from its cross-entropies [4, B] (st, si, it, ti) and its weights [B]: [B]."""
    to_text, to_image, image_text, text_image = entropies
    return weight * (to_text + to_image) + (1 - weight) * 0.5 * (image_text + text_image)


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
    log_mean = log_weight.logsumexp(dim=0) - math.log(len(log_weight))
    return (log_weight - log_mean).exp().clamp(*weight_range)


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
    both = torch.stack([similarity.float(), similarity.float().T])
    return DistributionMatching(scale).value(both, same_identity(identities, identities)).sum(dim=0)
