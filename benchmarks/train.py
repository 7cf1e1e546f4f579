"""Samples per second and peak memory of a training step, compared with a straightforward implementation in one run.

    python benchmarks/train.py                                        # ViT-B/16, 384x128, batch 64, fp32 on CPU
    python benchmarks/train.py --device cuda --precision bf16         # where there is a GPU

Each arm takes the same steps (forward, losses, backward, Adam) over the same batch of drawn pedestrians, and starts
from the same weights:

    straightforward  benchmarks/straightforward.py
    ceca             the step of the stage `train`
    ceca, bf16 back  the same with `--backward bf16`: forward in fp32, the gradient's matrix products in bf16
    ceca, bf16       the same with `--precision bf16`, as in the published recipes
    ceca, gpu12gb    the recipe of that name: bf16, towers 16 samples at a time, activations computed again

The first step warms up. MFU (model FLOP utilisation) is the work that the model needs, divided by the work that the
machine could do in that time. The first excludes padding and repeated computation. The second comes from large matrix
products in the same precisions, timed here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import ArmFailed, fastest, in_own_process, machine, peak_memory, run_benchmark
from benchmarks.straightforward import Straightforward, total_loss
from ceca.commandline import load_recipe
from ceca.config import LossConfig, ModelConfig, OptimiserConfig, OracleConfig, TrainConfig
from ceca.model.ceca import CECA
from ceca.training.flops import step_flops
from ceca.training.step import loss_terms, scaled_loss

# Arm -> share of its matrix products in bf16, if the benchmark's precision is fp32.
ARMS = {"straightforward": 0.0, "ceca": 0.0, "ceca, bf16 back": 2 / 3, "ceca, bf16": 1.0, "ceca, gpu12gb": 1.0}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Size of the work and of the model."""

    batch: int = 64
    steps: int = 2
    """Number of timed steps; one step before them is not timed."""
    backbone: str = "ViT-B-16-quickgelu"
    height: int = 384
    width: int = 128
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    peak_tflops: float | None = None
    """TFLOP/s of the device in bf16; None times a large matrix product."""
    out: Path | None = None
    """Also write the figures as JSON."""


def main(settings: Settings) -> None:
    only_bf16 = settings.precision == "bf16"
    arms = {arm: 1.0 if only_bf16 else share for arm, share in ARMS.items() if not (only_bf16 and "bf16" in arm)}
    with tempfile.TemporaryDirectory(prefix="ceca-benchmark-") as folder:
        place = Path(folder)
        tokens = prepare(settings, place)
        peaks = [
            matrix_tflops(settings, torch.float32),
            settings.peak_tflops or matrix_tflops(settings, torch.bfloat16),
        ]
        flops = step_flops(model_config(settings), settings.batch, tokens)
        print(
            f"batch {settings.batch}, {tokens / settings.batch / 2:.1f} tokens a text, {flops / 1e12:.2f} TFLOP a step"
        )
        print(f"{machine()}, torch {torch.__version__}")
        print(f"TFLOP/s of a large matrix product: {peaks[0]:.3f} in fp32, {peaks[1]:.3f} in bf16\n")
        figures: dict[str, Any] = {}
        for arm in arms:
            print(f"{arm} …", flush=True)
            try:
                figures[arm] = in_own_process(__file__, arm, settings, place, show=True)
            except ArmFailed:
                print(f"    {arm} failed: does it fit in this machine's memory? Try a smaller --batch.", flush=True)
                continue
            low = arms[arm]
            least = flops / 1e12 * ((1 - low) / peaks[0] + low / peaks[1])
            figures[arm]["mfu"] = least / statistics.mean(figures[arm]["seconds"])
        report(settings, figures)
        if settings.out is not None:
            settings.out.write_text(json.dumps({"flops": flops, "peak_tflops": peaks, "arms": figures}, indent=1))


def model_config(settings: Settings) -> ModelConfig:
    heads = 4 if settings.backbone == "ceca-tiny" else 8
    return ModelConfig(
        backbone=settings.backbone, image_height=settings.height, image_width=settings.width, mixer_heads=heads
    )


def prepare(settings: Settings, place: Path) -> int:
    """Write the batch and the weights to files; return the number of tokens of the batch's texts."""
    import asyncio

    from ceca.datasets.drawn import draw_dataset
    from ceca.datasets.images import decode_image
    from ceca.dialogue.conversation import Subject, converse
    from ceca.dialogue.oracle import OracleEngine
    from ceca.model.backbone import tokenize
    from ceca.model.embed import normalize

    people = max(2, settings.batch // 2)
    split = (people, 0, 0)
    draw_dataset(place / "drawn", identities=people, images_per_identity=2, split_identities=split, workers=1)
    truth = json.loads((place / "drawn" / "attributes.json").read_text())
    records = json.loads((place / "drawn" / "reid_raw.json").read_text())[: settings.batch]
    engine = OracleEngine(OracleConfig(), truth["vocabulary"])
    known = {image["path"]: image["attributes"] for image in truth["images"]}

    def summary(path: str) -> str:
        subject = Subject(path, b"", known[path])
        return asyncio.run(converse(engine, subject, questions=5, answer_tokens=48, summary_tokens=128)).summary

    pixels = [
        decode_image((place / "drawn" / "imgs" / record["file_path"]).read_bytes(), settings.height, settings.width)
        for record in records
    ]
    batch = {
        "images": normalize(torch.from_numpy(np.stack(pixels))),
        "captions": tokenize([record["captions"][0] for record in records]),
        "summaries": tokenize([summary(record["file_path"]) for record in records]),
        "identities": torch.tensor([record["id"] for record in records]),
    }
    torch.save(batch, place / "batch.pt")
    torch.manual_seed(0)
    torch.save(CECA(model_config(settings)).state_dict(), place / "weights.pt")
    return int(sum((batch[name].argmax(dim=1) + 1).sum() for name in ("captions", "summaries")))


def matrix_tflops(settings: Settings, dtype: torch.dtype) -> float:
    """Speed of a large matrix product, in TFLOP/s."""
    size = 8192 if settings.device == "cuda" else 3072
    a, b = (torch.randn(size, size, device=settings.device, dtype=dtype) for _ in range(2))

    def multiply() -> None:
        a @ b
        wait(settings)

    return 2 * size**3 / fastest(multiply, 5) / 1e12


def wait(settings: Settings) -> None:
    """Wait until the GPU, if there is one, has finished its work."""
    if settings.device == "cuda":
        torch.cuda.synchronize()


def measure(arm: str, settings: Settings, place: Path) -> dict[str, Any]:
    """Losses, seconds and memory of one arm's steps."""
    # If the machine's memory does not suffice, the kernel ends this process and no other.
    Path("/proc/self/oom_score_adj").write_text("1000")
    batch = {k: v.to(settings.device) for k, v in torch.load(place / "batch.pt", weights_only=True).items()}
    weights = torch.load(place / "weights.pt", weights_only=True)
    before = memory(settings)
    compute = straightforward_step if arm == "straightforward" else ceca_step
    step = compute(settings, weights, batch, arm)
    del weights
    losses, seconds = [], []
    for number in range(1 + settings.steps):
        wait(settings)
        started = time.perf_counter()
        loss = step()
        wait(settings)
        seconds.append(time.perf_counter() - started)
        losses.append(float(loss))
        print(f"    step {number}: {seconds[-1]:.2f} s, loss {losses[-1]:.5f}", flush=True)
    return {"losses": losses, "seconds": seconds[1:], "memory": memory(settings), "memory_before": before}


def memory(settings: Settings) -> int:
    """Peak memory of this process, or of its GPU, in bytes."""
    if settings.device == "cuda":
        return torch.cuda.max_memory_allocated()
    return peak_memory()


def ceca_step(settings: Settings, weights: dict[str, Any], batch: dict[str, Any], arm: str) -> Any:
    """The step of jobs/training/worker.py without reading data: DeepSpeed around the model."""
    os.environ |= {"DS_ACCELERATOR": settings.device, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    from ceca.model.backbone import trim
    from ceca.training.engine import make_engine
    from ceca.training.precision import BF16Backward, keep_freed_memory

    if settings.device == "cpu":
        keep_freed_memory()
    torch.distributed.init_process_group(
        "gloo" if settings.device == "cpu" else "nccl", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    precision = "bf16" if arm in ("ceca, bf16", "ceca, gpu12gb") else settings.precision
    recipe = load_recipe("gpu12gb")["train"] if arm == "ceca, gpu12gb" else {}
    rates = OptimiserConfig(new_learning_rate=1e-5, weight_decay=0, warmup_epochs=0)
    config = TrainConfig(
        model=model_config(settings), optimiser=rates, precision=precision, zero_stage=int(precision != "fp32"),
        epochs=1000, gpus_per_worker=int(settings.device == "cuda"),
        **{key: recipe[key] for key in ("micro_batch", "recompute") if recipe},
    )  # fmt: skip
    model = CECA(config.model).train()
    model.load_state_dict(weights)
    engine = make_engine(model, config, steps=1000)
    # One rate for all parameters, as in the straightforward arm.
    engine.lr_scheduler.base_lrs = [1e-5] * len(engine.lr_scheduler.base_lrs)
    for group in engine.optimizer.param_groups:
        group["lr"] = 1e-5
    back = BF16Backward() if arm == "ceca, bf16 back" else contextlib.nullcontext()

    def step() -> Any:
        captions, summaries = trim(torch.cat([batch["captions"], batch["summaries"]])).chunk(2)
        with back:
            features = engine(batch["images"].to(next(engine.module.parameters()).dtype), captions, summaries)
        loss = scaled_loss(loss_terms(features, batch["identities"], LossConfig()))
        engine.backward(loss)
        engine.step()
        return loss.detach()

    return step


def straightforward_step(settings: Settings, weights: dict[str, Any], batch: dict[str, Any], arm: str) -> Any:
    model = Straightforward(model_config(settings)).train()
    model.load(weights)
    model.to(settings.device)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-5)
    low = torch.autocast(settings.device, torch.bfloat16, enabled=settings.precision == "bf16")

    def step() -> Any:
        with low:
            features = model(batch["images"], batch["captions"], batch["summaries"])
        loss = total_loss(features, batch["identities"], LossConfig())
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.detach()

    return step


def report(settings: Settings, figures: dict[str, Any]) -> None:
    base = figures.get("straightforward")
    print(
        f"\n{'':18}{'samples/s':>10}{'faster by':>11}{'peak memory':>13}{'MFU':>7}{'largest difference of a loss':>31}"
    )
    for arm, of_arm in figures.items():
        seconds = statistics.mean(of_arm["seconds"])
        ratio = difference = "–"
        if base is not None:
            ratio = f"{statistics.mean(base['seconds']) / seconds:.2f}x"
            pairs = zip(of_arm["losses"], base["losses"], strict=True)
            difference = f"{max(abs(loss - wanted) / abs(wanted) for loss, wanted in pairs):.1e}"
        print(
            f"{arm:18}{settings.batch / seconds:10.3f}{ratio:>11}{of_arm['memory'] / 1e9:10.2f} GB"
            f"{of_arm['mfu']:7.0%}{difference:>31}"
        )


if __name__ == "__main__":
    run_benchmark(main, Settings, {arm: functools.partial(measure, arm) for arm in ARMS}, __doc__)
