"""The local branch: token selection, the Bidirectional Cross-attention Mixer, token embedding (method: Local branch).

Notable: padding never enters attention, normalisation statistics or pooling; in training, batch statistics are those
of the global batch, so N workers compute what one worker would. Modules stand in the order in which data meets them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ceca.model.backbone import Tokens


def select_tokens(
    side: Tokens, ratio: float, importance: Tensor | None = None, most: int | None = None
) -> tuple[Tensor, Tensor]:
    """Select the most important tokens of each sample (method: Local branch).

    A sample keeps floor(ratio·places) tokens, at least one and at most its present ones: with a ratio of 0.3, 57 of 192
    patches, and of a text 22 or all its words.

    Args:
        side: output of a tower.
        ratio: share of the tower's places to keep; 1 keeps all tokens in their order.
        importance: [B, N], not negative, by which tokens are chosen; None takes the tower's.
        most: limit of the tokens kept; None sets no limit.

    Returns:
        tokens [B, K, D], not normalised, and present [B, K].
    """
    if ratio >= 1 and most is None:
        return side.tokens, side.present
    importance = side.importance if importance is None else importance
    kept = min(max(1, math.floor(ratio * side.places)), side.tokens.shape[1])
    kept = kept if most is None else min(kept, most)
    # Absent tokens go last, because importance is an attention weight and never negative.
    order = importance.masked_fill(~side.present, -1.0).argsort(dim=1, descending=True, stable=True)[:, :kept]
    tokens = side.tokens.gather(1, order[..., None].expand(-1, -1, side.tokens.shape[-1]))
    return tokens, side.present.gather(1, order)


class MixerBlock(nn.Module):
    """One side of the mixer: q → q + sigmoid(γ)·Δ.

    Δ is the sum of three residual updates, each computed from the layer-normalised state: self-attention over this
    side's tokens, cross-attention to the other side's tokens, and an MLP. Without a condition, cross-attention is left
    out.

    Args:
        width: D of the tokens.
        heads: attention heads.
        gate_start: start of γ.
        crosses: whether this side has cross-attention.
    """

    def __init__(self, width: int, heads: int, gate_start: float, crosses: bool = True):
        super().__init__()
        self.crosses = crosses
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads)
        if crosses:
            self.cross_norm = nn.LayerNorm(width)
            self.cross_attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.gate = nn.Parameter(torch.tensor([gate_start]))  # shape [1], because DeepSpeed refuses scalars

    def forward(
        self, own: Tensor, present: Tensor, condition: Tensor | None = None, condition_present: Tensor | None = None
    ) -> Tensor:
        """Mix tokens: [B, N, D] → [B, N, D].

        Args:
            own: [B, N, D] tokens of this side.
            present: [B, N], False for padding.
            condition: [B, M, D] tokens of the other side.
            condition_present: [B, M], False for padding.
        """
        normed = self.self_norm(own)
        x = own + self.self_attention(normed, normed, present)
        if condition is not None and condition_present is not None:
            x = x + self.cross_attention(self.cross_norm(x), condition, condition_present)
        x = x + self.mlp(self.mlp_norm(x))
        return own + torch.sigmoid(self.gate) * (x - own)


class ReleasedMixerBlock(nn.Module):
    """One side of the mixer as the authors' program computes it: q → q + sigmoid(γ)·MLP(SA(LN₁ q) + CA(LN₂ q, c)).

    Both attentions look at the same q, nothing is added between them, and the MLP has no normalisation before it.

    Args:
        width: D of the tokens.
        heads: attention heads.
        gate_start: start of γ.
        crosses: whether there is cross-attention.
    """

    def __init__(self, width: int, heads: int, gate_start: float, crosses: bool = True):
        super().__init__()
        self.crosses = crosses
        self.self_norm = nn.LayerNorm(width)
        self.self_attention = Attention(width, heads)
        if crosses:
            self.cross_norm = nn.LayerNorm(width)
            self.cross_attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.gate = nn.Parameter(torch.tensor([gate_start]))  # [1]: DeepSpeed refuses scalars
        for attention in self.children():
            if isinstance(attention, Attention):
                attention.start_as_released()

    def forward(
        self, own: Tensor, present: Tensor, condition: Tensor | None = None, condition_present: Tensor | None = None
    ) -> Tensor:
        """Mix: own [B, N, D], present [B, N], condition [B, M, D], condition_present [B, M] → [B, N, D]."""
        normed = self.self_norm(own)
        mixed = self.self_attention(normed, normed, present)
        if condition is not None and condition_present is not None:
            mixed = mixed + self.cross_attention(self.cross_norm(own), condition, condition_present)
        return own + torch.sigmoid(self.gate) * self.mlp(mixed)


class Attention(nn.Module):
    """Multi-head attention of queries [B, N, D] to a source [B, M, D]; absent tokens of the source get no weight.

    Raises:
        ValueError: the width is not a multiple of the heads.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"mixer width {width} must be a multiple of its heads {heads}")
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def start_as_released(self) -> None:
        """Start as torch's own attention does: Xavier-uniform over q, k and v together, biases at zero."""
        width = self.query.in_features
        joint = torch.empty(3 * width, width)
        nn.init.xavier_uniform_(joint)
        with torch.no_grad():
            self.query.weight.copy_(joint[:width])
            self.key_value.weight.copy_(joint[width:])
        for layer in (self.query, self.key_value, self.out):
            nn.init.zeros_(layer.bias)

    def forward(self, query: Tensor, source: Tensor, present: Tensor) -> Tensor:
        """Attend: query [B, N, D], source [B, M, D], present [B, M] → [B, N, D]."""

        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        key, value = self.key_value(source).chunk(2, dim=-1)
        mask = present[:, None, None, :]
        mixed = F.scaled_dot_product_attention(split(self.query(query)), split(key), split(value), attn_mask=mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


class GlobalBatchNorm(nn.Module):
    """Batch normalisation over the present tokens of the global batch.

    In training, mean and variance are those of all workers' samples, and gradients flow through the sum over workers.
    It computes in fp32.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """Normalise: x [B, N, D], present [B, N] → [B, N, D]. Absent tokens get arbitrary finite values."""
        values = x.float()
        if self.training:
            mean, variance = self._batch_statistics(values, present)
        else:
            mean, variance = self.running_mean.float(), self.running_var.float()
        normal = (values - mean) * torch.rsqrt(variance + self.eps)
        return (normal * self.weight.float() + self.bias.float()).to(x.dtype)

    def _batch_statistics(self, values: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance [D] of the global batch; they also update the running statistics."""
        kept = present[..., None].to(values.dtype)
        count = kept.sum()
        total = (values * kept).sum(dim=(0, 1))
        count, total = _sum_over_workers(torch.cat([count[None], total])).split([1, len(total)])
        mean = total / count
        # Two passes, because the difference of two large sums would lose the variance of small activations.
        squares = _sum_over_workers((((values - mean) * kept) ** 2).sum(dim=(0, 1)))
        variance = squares / count
        with torch.no_grad():
            unbiased = squares / (count - 1).clamp(min=1)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        return mean, variance


def _sum_over_workers(value: Tensor) -> Tensor:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return _AllReduceSum.apply(value)
    return value


class _AllReduceSum(torch.autograd.Function):
    """Sum over workers. Every worker's loss depends on the sum, so gradients are summed over workers too."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        gradient = gradient.clone()
        dist.all_reduce(gradient)
        return gradient


class TokenEmbedding(nn.Module):
    """Embed tokens: e = Linear(q) + MLP(q) per token, then the maximum over the present tokens.

    Args:
        width: D of the tokens.
        out: E of the embedding.
    """

    def __init__(self, width: int, out: int):
        super().__init__()
        self.linear = nn.Linear(width, out)
        self.hidden = nn.Linear(width, width)
        self.norm = GlobalBatchNorm(width)
        self.out = nn.Linear(width, out)

    def forward(self, tokens: Tensor, present: Tensor, counted: Tensor | None = None) -> Tensor:
        """Embed and pool: [B, E].

        Args:
            tokens: [B, N, D].
            present: [B, N], the tokens that are pooled.
            counted: [B, N], the tokens that enter the batch statistics; None takes the pooled ones.
        """
        counted = present if counted is None else counted
        embedded = self.linear(tokens) + self.out(F.relu(self.norm(self.hidden(tokens), counted)))
        return embedded.masked_fill(~present[..., None], -torch.inf).amax(dim=1)
