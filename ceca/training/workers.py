"""Workers of one training run: who they are, their slices of a batch, and features gathered from all."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ceca.model.ceca import Features


def share(rank: int, size: int, batch: int) -> slice:
    """The rows of a global batch that a worker takes: equal shares, or nearly, where the batch does not divide."""
    return slice(rank * batch // size, (rank + 1) * batch // size)


def world() -> tuple[int, int]:
    """This worker's rank and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_features(features: Features, batch: int) -> Features:
    """This worker's features [b, D] → those of all, [B, D], in the order of ranks; gradients only through own rows.

    Workers' shares of the batch are those of `share`. Features a model does not compute stay out. One collective in
    fp32 for all of them.
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
    """[b] → [B], in the order of ranks."""
    _, size = world()
    return identities if size == 1 else torch.cat(_all_gather(identities, batch))


def _all_gather(own: Tensor, batch: int) -> list[Tensor]:
    """Every worker's rows. Collectives want equal shapes, so shares are padded to the largest and cut again."""
    _, size = world()
    shares = [share(rank, size, batch) for rank in range(size)]
    lengths = [rows.stop - rows.start for rows in shares]
    padded = own.new_zeros(max(lengths), *own.shape[1:])
    padded[: len(own)] = own
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded)
    return [part[:length] for part, length in zip(parts, lengths, strict=True)]
