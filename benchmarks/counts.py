"""What a training step costs before it is timed: operations that it dispatches, and bytes that its losses keep.

    python benchmarks/counts.py                            # ViT-B/16, bf16, ZeRO 1, one worker
    python benchmarks/counts.py --precision fp32 --zero-stage 0

Operations are counted on a CPU, at a batch of four, because their number does not depend on the batch. On a GPU each is
one kernel or a few, and costs the host about as much time as here. Bytes of the losses are those of the tensors that
the backward pass needs, features included, at a global batch of 4,096.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import Literal
from unittest import mock

import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.plain import PlainEngine, random_batch
from benchmarks.waits import Operations
from ceca.config import LossConfig, ModelConfig, TrainConfig
from ceca.model.ceca import CECA, Features
from ceca.training.engine import make_engine
from ceca.training.step import loss_terms, train_step


@dataclasses.dataclass(frozen=True)
class Settings:
    """Size of the model, and the engine."""

    backbone: str = "ViT-B-16-quickgelu"
    precision: Literal["fp32", "bf16"] = "bf16"
    zero_stage: int = 1
    batch: int = 4096
    """Global batch for which the losses' bytes are counted."""
    width: int = 512
    """Numbers of a global feature; a local one has twice as many."""


def operations(settings: Settings, engine: str) -> Operations:
    """Operations of the third step with an engine, `deepspeed` or `plain`."""
    heads = 4 if settings.backbone == "ceca-tiny" else 8
    model_config = ModelConfig(backbone=settings.backbone, image_height=64, image_width=32, mixer_heads=heads)
    config = TrainConfig(
        model=model_config, precision=settings.precision, zero_stage=settings.zero_stage, global_batch=4,
        gpus_per_worker=0,
    )  # fmt: skip
    make = make_engine if engine == "deepspeed" else PlainEngine
    made = make(CECA(model_config).train(), config, 1000)
    batch = random_batch(4, 64, 32)
    for step in range(2):
        train_step(made, batch, config, 0, step, torch.device("cpu"))
    with Operations() as found:
        train_step(made, batch, config, 0, 2, torch.device("cpu"))
    return found


def kept_bytes(settings: Settings, workers: int) -> int:
    """Bytes that the losses keep on the first of several workers for the backward pass, or within it."""
    own = slice(0, settings.batch // workers)
    sizes = [settings.width] * 4 + [2 * settings.width] * 2
    features = Features(*(torch.randn(settings.batch, size, requires_grad=True) for size in sizes))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    identities = torch.arange(settings.batch) // 2
    with (
        mock.patch("ceca.training.step.batch_slice", return_value=own),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        sum(loss_terms(features, identities, LossConfig()).values()).backward()
    return sum(kept.values())


def main(settings: Settings) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    for workers in (1, 4):
        print(f"losses of {settings.batch} on {workers} workers keep {kept_bytes(settings, workers) / 1e6:.0f} MB")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    for engine in ("deepspeed", "plain"):
        found = operations(settings, engine)
        most = ", ".join(f"{count} {name.removeprefix('aten.')}" for name, count in found.count.most_common(6))
        print(f"a step with {engine} dispatches {found.total} operations: {most}, …")


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
