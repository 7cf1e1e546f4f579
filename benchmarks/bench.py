"""The device that `benchmarks/gpu.py` looks at, the sizes of the work on it, and how results are compared."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import fastest
from benchmarks.samples import random_batch
from ceca.config import ModelConfig, OptimiserConfig, TrainConfig
from ceca.model.backbone import trim
from ceca.model.ceca import CECA
from ceca.model.embed import normalize


class CheckFailed(Exception):
    """A result is wrong; the message says what was found and what is right."""


@dataclasses.dataclass(frozen=True)
class Bench:
    """The device and the sizes of the work on it."""

    device: torch.device
    model: ModelConfig
    batches: tuple[int, ...]
    rows: tuple[int, ...]
    operations: int
    """Most operations that a step may dispatch."""
    straightforward: int
    """Largest batch that the straightforward program is given."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the steps that are timed."""
        return torch.bfloat16 if self.on_gpu else torch.float32

    def config(self, batch: int, precision: Any = "fp32", rate: float = 1e-5) -> TrainConfig:
        optimiser = OptimiserConfig(learning_rate=rate, new_learning_rate=rate, warmup_epochs=0)
        return TrainConfig(
            model=self.model, optimiser=optimiser, precision=precision, global_batch=batch,
            zero_stage=int(precision != "fp32"), gpus_per_worker=int(self.on_gpu), epochs=1000,
        )  # fmt: skip

    def make_model(self) -> CECA:
        torch.manual_seed(0)
        return CECA(self.model).to(self.device).train()

    def batch(self, size: int) -> dict[str, Any]:
        return random_batch(size, self.model.image_height, self.model.image_width)

    def inputs(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normalised pixels, captions, summaries and identities of a batch, on the CPU."""
        batch = self.batch(size)
        ids = trim(torch.tensor(batch["caption"]).long()), trim(torch.tensor(batch["summary"]).long())
        longest = max(part.shape[1] for part in ids)
        captions, summaries = (F.pad(part, (0, longest - part.shape[1])) for part in ids)
        return normalize(torch.tensor(batch["image"])), captions, summaries, torch.tensor(batch["identity"])

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def make_bench(device: str) -> Bench:
    """The tiny model on a CPU; ViT-B/16 at 384×128 on a GPU."""
    if device == "cpu":
        model = ModelConfig(backbone="ceca-tiny", image_height=32, image_width=32, mixer_heads=4, local_dim=64)
        return Bench(torch.device("cpu"), model, (4, 8), (2_000,), 1500, 8)
    return Bench(torch.device("cuda"), ModelConfig(), (8, 64, 512), (10**5, 10**6, 10**7), 2000, 512)


def require(right: bool, message: str) -> None:
    if not right:
        raise CheckFailed(message)


def distance(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference, relative to the norm of what is wanted."""
    found, wanted = found.detach().double().cpu(), wanted.detach().double().cpu()
    gap = float((found - wanted).norm() / wanted.norm().clamp(min=1e-12))
    return gap if math.isfinite(gap) else math.inf


def timed(bench: Bench, call: Callable[[], Any], times: int = 5) -> float:
    """Seconds of the fastest of several calls, their work on the device included."""

    def run() -> None:
        call()
        bench.wait()

    return fastest(run, times)
