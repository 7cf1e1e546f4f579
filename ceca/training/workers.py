"""The workers of one training run: their ranks, their slices of a batch, and the features gathered from all of them.

Notable: all features travel in one collective, and their gradients in one collective back, in which each worker gets
the sum of what all workers found for its rows; every function also works without a process group, as one worker.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ceca.model.ceca import Features
from ceca.training.order import batch_slice

MANY_WORKERS = 8  # from which gradients are added up in fp32: each addition in bf16 or fp16 rounds the sum


def world() -> tuple[int, int]:
    """This worker's rank and the number of workers; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_features(features: Features, batch: int) -> Features:
    """Gather the features of all workers, in the order of ranks, with gradients.

    Features that the model does not compute stay None. One fp32 collective carries all others.

    Args:
        features: this worker's, [b, D] each, of the rows that `batch_slice` gives it.
        batch: B, samples in the global batch.

    Returns:
        The features of the global batch, [B, D] each.
    """
    if world()[1] == 1:
        return features
    names = [name for name, value in features._asdict().items() if value is not None]
    own = torch.cat([getattr(features, name).float() for name in names], dim=1)
    widths = [getattr(features, name).shape[1] for name in names]
    gathered = dict(zip(names, _Gather.apply(own, batch).split(widths, dim=1), strict=True))
    return features._replace(**gathered)


class _Gather(torch.autograd.Function):
    """Rows of all workers. Their gradients are summed over workers, because each has losses of its own rows."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, batch: int) -> Tensor:
        ctx.batch = batch
        return gather_rows(own, batch)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[batch_slice(*world(), ctx.batch)], None


class _Sum(torch.autograd.Function):
    """The sum of all workers' values; a gradient goes to this worker's own."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        total = own.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient


def sum_over_workers(own: Tensor) -> Tensor:
    """The sum of all workers' values, of any shape; a gradient flows to this worker's own values."""
    return own if world()[1] == 1 else _Sum.apply(own)


def on_any_worker(flag: bool, device: torch.device) -> bool:
    """Whether a flag is set on any worker: all get the same answer. The hosts wait for each other."""
    if world()[1] == 1:
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value)


def gather_identities(identities: Tensor, batch: int) -> Tensor:
    """Gather the identities of all workers, in the order of ranks: [b] → [B]."""
    return gather_rows(identities, batch)


def gather_rows(own: Tensor, batch: int) -> Tensor:
    """Gather the rows of all workers, in the order of ranks, without gradients: [b, …] → [B, …].

    Collectives need equal shapes, so rows are padded to the longest slice and cut again.
    """
    _, size = world()
    if size == 1:
        return own
    slices = [batch_slice(rank, size, batch) for rank in range(size)]
    lengths = [rows.stop - rows.start for rows in slices]
    padded = own.new_zeros(max(lengths), *own.shape[1:])
    padded[: len(own)] = own.detach()
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
