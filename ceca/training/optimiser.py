"""The optimiser's parameter groups and its learning-rate schedule (method: Optimisation).

Notable: CLIP and the new modules have rates of their own, and biases have groups of their own without weight decay.
The rates are stated for the published global batch; `batch_rule` says how another batch changes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from ceca.config import OptimiserConfig

REFERENCE_BATCH = 64  # the published global batch; the configured rates are for this one


def parameter_groups(model: nn.Module, config: OptimiserConfig, batch: int = REFERENCE_BATCH) -> list[dict[str, Any]]:
    """Sort trainable parameters into groups: CLIP's and new ones, weights and biases.

    Args:
        model: its parameters below `backbone.` are CLIP's.
        config: rates, weight decay, and the rule by which rates follow the batch.
        batch: samples in the global batch.

    Returns:
        Groups as torch's optimisers take them, with `params`, `lr` and `weight_decay`.
    """
    factor = {"fixed": 1.0, "linear": batch / REFERENCE_BATCH, "sqrt": (batch / REFERENCE_BATCH) ** 0.5}
    members: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            members.setdefault((_at_base_rate(name), name.endswith("bias")), []).append(parameter)
    groups = []
    for (at_base_rate, is_bias), parameters in members.items():
        rate = config.learning_rate * (2 if is_bias else 1) if at_base_rate else config.new_learning_rate
        rate *= factor[config.batch_rule]
        groups.append({"params": parameters, "lr": rate, "weight_decay": 0.0 if is_bias else config.weight_decay})
    return groups


def _at_base_rate(name: str) -> bool:
    """Whether a parameter learns at CLIP's rate and its bias at twice that rate.

    CLIP's own parameters do. In IRRA's program the LayerNorms around the cross layers and the cross layers' biases do,
    too (method: The IRRA baseline).
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
    """The factor of the learning rate at a step: linear from `start` to 1 during warm-up, then a cosine down to 0.

    Args:
        step: finished steps.
        warmup: steps of warm-up.
        total: steps of the whole training.
        start: the factor at step 0.
    """
    if step < warmup:
        return start + (1 - start) * step / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, total - warmup))))
