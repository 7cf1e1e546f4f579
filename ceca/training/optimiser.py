"""The optimiser, its parameter groups and its learning-rate schedule (method: Optimisation).

Notable: CLIP and the new modules have rates of their own, and biases have groups of their own without weight decay.
The rates are stated for the published global batch; `batch_rule` says how another batch changes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ceca.config import OptimiserConfig, TrainConfig
from ceca.training.workers import world

REFERENCE_BATCH = 64  # the published global batch; the configured rates are for this one
SCALE_OF_A_MEAN = 16  # the first loss scale in fp16 as a power of two; it suits the mean over a batch
NO_SMALLER_SCALE = (
    "the gradients are not finite, although fp16's loss scale is as small as it can be; lower the learning rates or "
    "use precision bf16, under another --name"
)


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


class SkippingAdam(torch.optim.Adam):
    """Adam in one kernel per group, which takes no step if `found_inf` is 1; `skipped` counts these steps.

    Args:
        groups: what `parameter_groups` returned, or groups like these.
        config: β1, β2 and ε.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimiserConfig):
        super().__init__(groups, betas=config.betas, eps=config.epsilon, fused=True)
        self.skipped = torch.zeros((), device=groups[0]["params"][0].device)
        self.found_inf = torch.zeros_like(self.skipped)
        self.grad_scale: Tensor | None = None  # by which gradients are divided

    def look_at(self, gradients: list[Tensor]) -> Tensor:
        """Let the next step be skipped if a gradient or its square is not finite on any worker; all workers call this.

        Adam averages squares, so an infinite one would stay. The device decides, and the host does not wait.

        Returns:
            The norms of the gradients, [number of gradients].
        """
        norms = torch.stack(torch._foreach_norm(gradients))
        self.found_inf = 1.0 - torch.isfinite(norms.amax()).float()
        if world()[1] > 1:
            torch.distributed.all_reduce(self.found_inf, torch.distributed.ReduceOp.MAX)
        self.skipped = self.skipped + self.found_inf  # it begins on the CPU, before DeepSpeed moves the model
        return norms


def first_loss_scale(config: TrainConfig) -> int:
    """The first loss scale of fp16 as a power of two.

    The loss is multiplied by the number of workers, and TAL is a sum over the batch. A scale that suits a mean would
    overflow in the first steps, and each overflow skips a step.
    """
    summed = any(term.startswith("tal_") for term in config.losses.terms)
    factor = config.workers * (config.global_batch if summed else 1)
    return max(0, SCALE_OF_A_MEAN - math.ceil(math.log2(factor)))
