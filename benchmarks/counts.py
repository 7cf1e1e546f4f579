"""What a training step costs the host: operations that it dispatches, its time, and bytes that its losses keep.

    python benchmarks/counts.py                            # ViT-B/16, bf16, ZeRO 1, one worker
    python benchmarks/counts.py --precision fp32 --zero-stage 0

Operations and milliseconds are those of a model with the layers of the real one and hardly any numbers in them (16
wide, images of two patches, texts of three tokens, a batch of four): neither the number of operations nor what it costs
the host to dispatch them depends on sizes. On a GPU each is one kernel or a few. The engines take their steps in turns.
Bytes of the losses are those of the tensors that the backward pass needs, features included, at a global batch of
4,096.

    DeepSpeed's defaults    DeepSpeed with its checks of every gradient, its timer and its buffers, and torch's Adam
    DeepSpeed               as `ceca.training.engine.make_deepspeed` sets it up
    plain                   without DeepSpeed
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.samples import END, random_batch
from benchmarks.waits import Operations
from ceca.config import LossConfig, ModelConfig, TrainConfig
from ceca.model.ceca import CECA, Features
from ceca.model.clip import describe, descriptions
from ceca.training.engine import import_deepspeed, make_deepspeed
from ceca.training.optimiser import parameter_groups, rate_schedule
from ceca.training.plain import PlainEngine
from ceca.training.step import loss_terms, train_step

WIDTH, HEADS = 16, 2  # of a model in which there is little to compute


@dataclasses.dataclass(frozen=True)
class Settings:
    """Size of the model, and the engine."""

    backbone: str = "ViT-B-16-quickgelu"
    """Model whose layers are counted."""
    precision: Literal["fp32", "bf16"] = "bf16"
    zero_stage: int = 1
    batch: int = 4096
    """Global batch for which the losses' bytes are counted."""
    width: int = 512
    """Numbers of a global feature; a local one has twice as many."""
    steps: int = 30
    """Timed steps of each engine."""


def with_defaults(model: CECA, config: TrainConfig, steps: int) -> Any:
    """DeepSpeed as it is without settings of ours."""
    groups = parameter_groups(model, config.optimiser, config.global_batch)
    factor = rate_schedule(config.optimiser, config.epochs, steps)
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if config.precision != "fp32":
        settings[config.precision] = {"enabled": True}
    engine, *_ = import_deepspeed().initialize(
        model=model,
        optimizer=torch.optim.Adam(groups, betas=config.optimiser.betas, eps=config.optimiser.epsilon),
        lr_scheduler=lambda optimiser: torch.optim.lr_scheduler.LambdaLR(optimiser, factor),
        config=settings,
        dist_init_required=False,
    )
    return engine


ENGINES: dict[str, Callable[[CECA, TrainConfig, int], Any]] = {
    "DeepSpeed's defaults": with_defaults,
    "DeepSpeed": make_deepspeed,
    "plain": PlainEngine,
}


def thin(backbone: str, folder: Path) -> str:
    """Describe a model with the layers of another and hardly any numbers in them; returns its name."""
    described = describe(backbone)
    described["embed_dim"] = WIDTH
    described["vision_cfg"] |= {"width": WIDTH, "head_width": WIDTH // HEADS}
    described["text_cfg"] |= {"width": WIDTH, "heads": HEADS}
    file = folder / "thin.json"
    file.write_text(json.dumps(described))
    descriptions()[file.stem] = file
    return file.stem


def stepper(settings: Settings, backbone: str, engine: str) -> Callable[[], object]:
    """A function that takes a step with an engine; two have been taken."""
    model = ModelConfig(backbone=backbone, image_height=32, image_width=16, mixer_heads=HEADS, local_dim=WIDTH)
    config = TrainConfig(
        model=model, precision=settings.precision, zero_stage=settings.zero_stage, global_batch=4, gpus_per_worker=0
    )
    made = ENGINES[engine](CECA(model).train(), config, 1000)
    batch = random_batch(4, model.image_height, model.image_width)
    for name in ("caption", "summary"):
        batch[name][:, 2:] = 0
        batch[name][:, 2] = END

    def step() -> object:
        return train_step(made, batch, config, 0, 0, torch.device("cpu"))

    step(), step()
    return step


def host_times(steps: dict[str, Callable[[], object]], times: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a step by engine: the median by the clock, and that of the CPU. The engines take turns."""
    clock: dict[str, list[float]] = {engine: [] for engine in steps}
    cpu: dict[str, list[float]] = {engine: [] for engine in steps}
    for _ in range(times):
        for engine, step in steps.items():
            begun, used = time.perf_counter(), time.process_time()
            step()
            clock[engine].append(1000 * (time.perf_counter() - begun))
            cpu[engine].append(1000 * (time.process_time() - used))
    return {
        engine: {"clock": statistics.median(clock[engine]), "cpu": statistics.median(cpu[engine])} for engine in steps
    }


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
    torch.set_num_threads(1)
    for workers in (1, 4):
        print(f"losses of {settings.batch} on {workers} workers keep {kept_bytes(settings, workers) / 1e6:.0f} MB")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory() as folder:
        backbone = thin(settings.backbone, Path(folder))
        steps = {engine: stepper(settings, backbone, engine) for engine in ENGINES}
    counted = {}
    for engine, step in steps.items():
        with Operations() as counted[engine]:
            step()
    times = host_times(steps, settings.steps)
    base = next(iter(ENGINES))
    print(f"\n{'a step':22}{'operations':>11}{'ms':>8}{'of defaults':>13}{'CPU ms':>9}{'of defaults':>13}")
    for engine, of_engine in times.items():
        print(
            f"{engine:22}{counted[engine].total:11}{of_engine['clock']:8.1f}"
            f"{of_engine['clock'] / times[base]['clock']:13.2f}{of_engine['cpu']:9.1f}"
            f"{of_engine['cpu'] / times[base]['cpu']:13.2f}"
        )


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
