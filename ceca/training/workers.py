"""The workers of one training run: their ranks, their slices of a batch, and the features gathered from all of them.

Notable: a gathered batch carries gradients only through this worker's own rows, so gathering needs no collective in
the backward pass (`step` says why this is enough); all features travel in one collective; every function also works
without a process group, as one worker.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ceca.model.ceca import Features
from ceca.training.order import batch_slice


def world() -> tuple[int, int]:
    """This worker's rank and the number of workers; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_features(features: Features, batch: int) -> Features:
    """Gather the features of all workers, in the order of ranks; gradients flow through this worker's rows only.

    Features that the model does not compute stay None. One fp32 collective carries all others.

    Args:
        features: this worker's, [b, D] each, of the rows that `batch_slice` gives it.
        batch: B, samples in the global batch.

    Returns:
        The features of the global batch, [B, D] each.
    """
    rank, size = world()
    if size == 1:
        return features
    names = [name for name, value in features._asdict().items() if value is not None]
    own = torch.cat([getattr(features, name).float() for name in names], dim=1)
    parts = _all_gather(own.detach(), batch)
    parts[rank] = own
    widths = [getattr(features, name).shape[1] for name in names]
    gathered = dict(zip(names, torch.cat(parts).split(widths, dim=1), strict=True))
    return features._replace(**gathered)


def gather_identities(identities: Tensor, batch: int) -> Tensor:
    """Gather the identities of all workers, in the order of ranks: [b] → [B]."""
    _, size = world()
    return identities if size == 1 else torch.cat(_all_gather(identities, batch))


def _all_gather(own: Tensor, batch: int) -> list[Tensor]:
    """Every worker's rows. Collectives need equal shapes: rows are padded to the longest slice, then cut again."""
    _, size = world()
    slices = [batch_slice(rank, size, batch) for rank in range(size)]
    lengths = [rows.stop - rows.start for rows in slices]
    padded = own.new_zeros(max(lengths), *own.shape[1:])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded)
    return [part[:length] for part, length in zip(parts, lengths, strict=True)]
