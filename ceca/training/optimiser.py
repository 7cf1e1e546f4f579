"""The optimiser's parameter groups and its learning-rate schedule (method: Optimisation)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from ceca.config import OptimiserConfig

REFERENCE_BATCH = 64  # the published global batch, to which the published rates belong


def parameter_groups(model: nn.Module, config: OptimiserConfig, batch: int = REFERENCE_BATCH) -> list[dict[str, Any]]:
    """CLIP and new modules, weights and biases apart: rates and decay as published, the rates by `batch_rule`."""
    factor = {"fixed": 1.0, "linear": batch / REFERENCE_BATCH, "sqrt": (batch / REFERENCE_BATCH) ** 0.5}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((_at_base_rate(name), name.endswith("bias")), []).append(parameter)
    made = []
    for (at_base_rate, is_bias), parameters in groups.items():
        rate = config.learning_rate * (2 if is_bias else 1) if at_base_rate else config.new_learning_rate
        rate *= factor[config.batch_rule]
        made.append({"params": parameters, "lr": rate, "weight_decay": 0.0 if is_bias else config.weight_decay})
    return made


def _at_base_rate(name: str) -> bool:
    """Whether a parameter learns at CLIP's rate, its bias at twice: CLIP's own, and what IRRA's program treats so.

    Of IRRA's heads these are the LayerNorms around the cross layers and the cross layers' biases.
    """
    if name.startswith(("backbone.", "heads.text_norm.", "heads.image_norm.", "heads.layers.norm.")):
        return True
    return name.startswith(("heads.cross_attention.", "heads.layers.")) and name.endswith("bias")


def rate_schedule(config: OptimiserConfig, epochs: int, steps: int) -> Callable[[int], float]:
    """The factor of the learning rates by step, counted through all epochs.

    Args:
        config: warm-up, and whether the rates change with every step or every epoch.
        epochs: epochs of the training.
        steps: steps of one epoch.
    """
    if config.schedule == "epoch":
        return lambda step: rate_factor(
            step // steps, warmup=config.warmup_epochs, total=epochs, start=config.warmup_start
        )
    warmup, total = config.warmup_epochs * steps, epochs * steps
    return lambda step: rate_factor(step, warmup=warmup, total=total, start=config.warmup_start)


def rate_factor(step: int, *, warmup: float, total: int, start: float) -> float:
    """Factor of the learning rate at a step: linear from `start` over `warmup` steps, then cosine to 0."""
    if step < warmup:
        return start + (1 - start) * step / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, total - warmup))))
