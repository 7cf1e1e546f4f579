"""A training engine of plain PyTorch for one worker, where DeepSpeed is not installed, and batches of random samples.

It is what `ceca.training.step.train_step` calls. In bf16 and fp16, Adam works on fp32 copies of the parameters; the
factor of fp16's loss follows the skipped steps on the device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ceca.config import TrainConfig
from ceca.model.ceca import CECA, Features
from ceca.training.engine import SkippingAdam, keep_statistics_in_fp32
from ceca.training.optimiser import parameter_groups, rate_schedule

START, END = 49406, 49407  # CLIP's tokens
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class PlainEngine:
    """The part of DeepSpeed's engine that a step needs.

    Args:
        model: the model, in fp32 on its device.
        config: settings of the training.
        steps: steps of an epoch.
    """

    def __init__(self, model: CECA, config: TrainConfig, steps: int = 1000):
        self.module, self.skipped_steps = model.train(), 0
        groups = parameter_groups(model, config.optimiser, config.global_batch)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.low = config.precision != "fp32"
        device = self.parameters[0].device
        self.masters = [p.detach().clone().requires_grad_() if self.low else p for p in self.parameters]
        master_of = dict(zip(self.parameters, self.masters, strict=True))
        groups = [{**group, "params": [master_of[p] for p in group["params"]]} for group in groups]
        self.optimizer = SkippingAdam(groups, config.optimiser)
        model.to(PRECISIONS[config.precision])
        keep_statistics_in_fp32(model)
        self.scale = torch.tensor(2.0**16 if config.precision == "fp16" else 1.0, device=device)
        self.kept = torch.zeros((), dtype=torch.int32, device=device)  # steps since the scale changed
        factor = rate_schedule(config.optimiser, config.epochs, steps)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    def __call__(self, *inputs: Any) -> Features:
        features: Features = self.module(*inputs)
        return features

    def fp16_enabled(self) -> bool:
        """Whether the engine looks for gradients that are not finite; this one leaves it to `take_step`."""
        return False

    def zero_optimization_stage(self) -> int:
        return 0

    def backward(self, loss: Tensor) -> None:
        (loss * self.scale).backward()

    def step(self) -> None:
        used = [(p, master) for p, master in zip(self.parameters, self.masters, strict=True) if p.grad is not None]
        if self.low:
            for _, master in used:
                master.grad = torch.empty_like(master)
            gradients = [master.grad for _, master in used]
            torch._foreach_copy_(gradients, [p.grad for p, _ in used])
            torch._foreach_div_(gradients, self.scale)
        self.optimizer.step()
        if self.low:
            with torch.no_grad():
                torch._foreach_copy_([p for p, _ in used], [master for _, master in used])
            torch._amp_update_scale_(self.scale, self.kept, self.optimizer.found_inf, 2.0, 0.5, 2000)
        for parameter, master in used:
            parameter.grad = master.grad = None
        self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        return {
            "module": self.module.state_dict(), "masters": self.masters, "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(), "scale": self.scale, "kept": self.kept,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        with torch.no_grad():
            torch._foreach_copy_(self.masters, state["masters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scale, self.kept = state["scale"], state["kept"]


def random_batch(batch: int, height: int, width: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch as the input pipeline gives it: two samples of each person, texts of 12 to 52 tokens.

    Args:
        batch: number of samples.
        height: of the images, in pixels.
        width: of the images, in pixels.
        seed: of the random numbers.
    """
    source = np.random.default_rng(seed)

    def texts() -> np.ndarray:
        ids = np.zeros((batch, 77), np.int32)
        for row, words in zip(ids, source.integers(10, 51, batch), strict=True):
            row[: words + 2] = [START, *source.integers(1, START, words), END]
        return ids

    return {
        "image": source.integers(0, 256, (batch, height, width, 3), dtype=np.uint8),
        "caption": texts(),
        "summary": texts(),
        "identity": np.arange(batch) // 2,
    }


def text_tokens(batch: dict[str, np.ndarray]) -> int:
    """Tokens of all captions and summaries of a batch, without padding."""
    return int(sum((batch[name].argmax(axis=1) + 1).sum() for name in ("caption", "summary")))
