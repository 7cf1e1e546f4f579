"""One training step, whatever runs it: the order of samples, losses over the global batch, the optimiser's groups.

Notable: every worker computes the loss of the *whole* global batch from gathered features, in which only its own
carry a gradient. The sum of the workers' gradients is then the gradient of that one loss, with a single
collective forward and none backward. Trainers average gradients over workers, hence the factor in `scaled_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ceca.config import LossConfig, OptimiserConfig
from ceca.losses import confidence_aware_weighting_loss, triplet_alignment_loss
from ceca.model.ceca import Features


def world() -> tuple[int, int]:
    """This worker's rank and how many there are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather_features(features: Features) -> Features:
    """[B/N, D] features of this worker → [B, D] of all, in the order of ranks; gradients only through own rows.

    Features without a summary gather without one. One collective in fp32 for all of them.
    """
    rank, size = world()
    if size == 1:
        return features
    names = [name for name, value in features._asdict().items() if value is not None]
    own = torch.cat([getattr(features, name).float() for name in names], dim=1)
    parts = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(parts, own.detach().contiguous())
    parts[rank] = own
    widths = [getattr(features, name).shape[1] for name in names]
    gathered = dict(zip(names, torch.cat(parts).split(widths, dim=1), strict=True))
    return Features(**{"summary": None, **gathered})


def gather_identities(identities: Tensor) -> Tensor:
    """[B/N] → [B], in the order of ranks."""
    _, size = world()
    if size == 1:
        return identities
    parts = [torch.empty_like(identities) for _ in range(size)]
    dist.all_gather(parts, identities.contiguous())
    return torch.cat(parts)


def loss_terms(features: Features, identities: Tensor, config: LossConfig) -> dict[str, Tensor]:
    """The configured losses over the whole batch it is given, by name: scalars, fp32."""
    tal = {"temperature": config.temperature, "margin": config.margin}
    terms: dict[str, Tensor] = {}
    for term in config.terms:
        if term == "cawl":
            if features.summary is None:
                raise ValueError("the loss cawl needs summaries: set summary_weight above 0 or leave cawl out")
            per_sample = confidence_aware_weighting_loss(
                features.summary,
                features.text,
                features.image,
                identities,
                scale=config.scale,
                gamma=config.gamma,
                weight_range=config.weight_range,
            )
            terms[term] = per_sample.mean()
        elif term == "tal_global":
            similarity = cosine(features.text, features.visual)
            terms[term] = triplet_alignment_loss(similarity, identities, **tal).sum()
        elif term == "tal_local":
            similarity = cosine(features.local_text, features.local_visual)
            terms[term] = triplet_alignment_loss(similarity, identities, **tal).sum()
    return terms


def cosine(rows: Tensor, columns: Tensor) -> Tensor:
    """[B, D], [C, D] → [B, C] in fp32."""
    return F.normalize(rows.float(), dim=1) @ F.normalize(columns.float(), dim=1).T


def scaled_loss(terms: dict[str, Tensor]) -> Tensor:
    """The sum of the terms, times the number of workers: what to call backward on."""
    _, size = world()
    return size * torch.stack(list(terms.values())).sum()


def parameter_groups(model: nn.Module, config: OptimiserConfig) -> list[dict[str, Any]]:
    """CLIP and new modules, weights and biases apart: rates and decay as published."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name.startswith("backbone."), name.endswith("bias")), []).append(parameter)
    made = []
    for (is_clip, is_bias), parameters in groups.items():
        rate = config.learning_rate * (2 if is_bias else 1) if is_clip else config.new_learning_rate
        made.append({"params": parameters, "lr": rate, "weight_decay": 0.0 if is_bias else config.weight_decay})
    return made


def rate_factor(step: int, *, warmup: float, total: int, start: float) -> float:
    """Factor of the learning rate at a step: linear from `start` over `warmup` steps, then cosine to 0."""
    if step < warmup:
        return start + (1 - start) * step / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, total - warmup))))


def better(candidate: dict[str, float], best: dict[str, float] | None, keys: Sequence[str]) -> bool:
    """Whether validation metrics improve, compared key by key; equal ones do not."""
    return best is None or [candidate[key] for key in keys] > [best[key] for key in keys]
