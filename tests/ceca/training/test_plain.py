"""The engine of plain PyTorch: its steps, number types, clipping, shares and checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ceca.config import LossConfig, ModelConfig, OptimiserConfig, TrainConfig
from ceca.errors import UserError
from ceca.model.ceca import CECA
from ceca.training import plain
from ceca.training.engine import (
    Progress,
    load_checkpoint,
    make_deepspeed,
    make_engine,
    save_checkpoint,
    skipped_steps,
    take_step,
    takes_deepspeed,
)
from ceca.training.optimiser import parameter_groups, rate_schedule
from ceca.training.plain import PlainEngine

MODEL = ModelConfig(
    backbone="ceca-tiny", image_height=32, image_width=32, mixer_heads=4, local_branch=False, summary_weight=0.0
)
IDS = torch.tensor([[49406, 320, 49407], [49406, 321, 49407]])
STEPS = 10  # of an epoch
EPSILON = 1e-3  # a gradient that is zero but for rounding moves nothing


def settings(precision: Any = "fp32", clip: float = 0.0, rate: float = 1e-3, **further: Any) -> TrainConfig:
    optimiser = OptimiserConfig(
        warmup_epochs=0, learning_rate=rate, new_learning_rate=rate, gradient_clip=clip, epsilon=EPSILON
    )
    return TrainConfig(
        model=MODEL, losses=LossConfig(terms=("infonce",)), precision=precision, optimiser=optimiser,
        gpus_per_worker=int(precision == "fp16"), **further,
    )  # fmt: skip


@pytest.fixture(scope="module")
def start() -> CECA:
    torch.manual_seed(0)
    return CECA(MODEL).train()


def engine_of(start: CECA, config: TrainConfig) -> PlainEngine:
    return PlainEngine(copy.deepcopy(start), config, STEPS)


def loss_of(model: Any, factor: float = 1.0) -> Tensor:
    dtype = next(model.parameters()).dtype
    images = torch.linspace(-1, 1, 2 * 3 * 32 * 32, dtype=dtype).view(2, 3, 32, 32)
    features = model(images, IDS, None)
    return factor * (features.visual.float() - features.text.float()).pow(2).sum()


def step(engine: PlainEngine, factor: float = 1.0) -> Tensor:
    loss = loss_of(engine.module, factor)
    engine.backward(loss)
    take_step(engine)
    return loss.detach()


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(value, expected[name]) for name, value in found.items())


# --- steps ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_its_steps_are_those_of_torchs_adam_and_clipping(start, clip):
    config = settings(clip=clip)
    engine, model = engine_of(start, config), copy.deepcopy(start)
    adam = torch.optim.Adam(parameter_groups(model, config.optimiser), betas=(0.9, 0.999), eps=EPSILON)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, rate_schedule(config.optimiser, config.epochs, STEPS))
    for _ in range(3):
        step(engine)
        adam.zero_grad()
        loss_of(model).backward()
        if clip:
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            assert norm > 2 * clip
        adam.step()
        schedule.step()
    found = engine.weights()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            # Gradients of keys' biases are rounding alone, and Adam makes millionths of it.
            torch.testing.assert_close(found[name], parameter.detach(), rtol=1e-5, atol=5e-6)
    assert same(found, {name: value.detach() for name, value in engine.module.named_parameters()})


def test_in_bf16_small_steps_are_not_rounded_away(start):
    engine = engine_of(start, settings("bf16", rate=1e-5, zero_stage=0))
    before, rounded = engine.weights(), engine.module.backbone.clip.visual.proj.detach().clone()
    before = {name: value.clone() for name, value in before.items()}
    for _ in range(3):
        step(engine)
    found = engine.weights()
    name = "backbone.clip.visual.proj"
    parameter = engine.module.backbone.clip.visual.proj.detach()
    assert parameter.dtype == torch.bfloat16
    assert (parameter == rounded).float().mean() > 0.5  # of bf16's eight bits, most do not see such a step
    assert 1e-8 < (found[name] - before[name]).abs().mean() < 1e-4
    assert torch.equal(found[name].bfloat16(), parameter)


def test_in_fp16_an_overflow_skips_the_step_and_halves_the_scale(start):
    engine = engine_of(start, settings("fp16"))
    assert engine.scale is not None
    first = float(engine.scale.fill_(256))
    before = {name: value.clone() for name, value in engine.weights().items()}
    step(engine, factor=1e30)
    assert same(engine.weights(), before)
    assert (float(engine.scale), skipped_steps(engine)) == (first / 2, 1)
    step(engine)
    assert not same(engine.weights(), before)
    assert (float(engine.scale), skipped_steps(engine)) == (first / 2, 1)
    engine.scale.fill_(1)
    step(engine, factor=1e30)
    with pytest.raises(UserError, match=r"gradients are not finite.*lower the learning rates"):
        skipped_steps(engine)


# --- checkpoints ------------------------------------------------------------------------------------------


def of_worker(patch: pytest.MonkeyPatch, rank: int, size: int) -> None:
    for module in ("plain", "engine"):
        patch.setattr(f"ceca.training.{module}.world", lambda: (rank, size))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_any_number_of_workers_continues_a_checkpoint(start, tmp_path: Path, monkeypatch, precision):
    """One worker writes it, three read it and write theirs, and one reads those."""
    config = settings(precision, zero_stage=1)
    whole = engine_of(start, config)
    step(whole), step(whole, float("nan"))
    folders = [tmp_path / "one", tmp_path / "three"]
    for folder in folders:
        folder.mkdir()
    save_checkpoint(whole, Progress(steps=2), folders[0])
    for rank in (0, 1, 2):
        with monkeypatch.context() as patch:
            of_worker(patch, rank, 3)
            third = engine_of(start, config)
            load_checkpoint(third, folders[0])
            assert [len(group.weights) for group in third.groups] == [-(-g.numbers // 3) for g in whole.groups]
            assert torch.equal(third.module.backbone.clip.visual.proj, whole.module.backbone.clip.visual.proj)
            save_checkpoint(third, Progress(steps=2), folders[1])
    sizes = [sum(file.stat().st_size for file in folder.glob("share-*.pt")) for folder in folders]
    assert sizes[1] < 1.01 * sizes[0]
    again = engine_of(start, config)
    assert load_checkpoint(again, folders[1]).workers == 3
    assert skipped_steps(again) == 1
    assert again.get_lr() == whole.get_lr()
    assert torch.equal(step(again), step(whole))
    assert same(again.weights(), whole.weights())


def test_a_run_that_deepspeed_began_it_continues(start, tmp_path: Path, one_worker):
    config = settings("bf16", zero_stage=1)
    assert not takes_deepspeed(config)
    first = make_deepspeed(copy.deepcopy(start), config, STEPS)
    first.backward(loss_of(first.module))
    take_step(first)
    save_checkpoint(first, Progress(steps=1), tmp_path)
    again = make_engine(copy.deepcopy(start), config, STEPS, tmp_path)
    assert not isinstance(again, PlainEngine)
    assert load_checkpoint(again, tmp_path).steps == 1
    assert torch.equal(again.module.backbone.clip.visual.proj, first.module.backbone.clip.visual.proj)


def test_a_checkpoint_of_the_plain_engine_does_not_fit_offload_and_holds_only_tensors(start, tmp_path: Path):
    config = settings("fp32", zero_stage=1)
    engine = engine_of(start, config)
    step(engine)
    save_checkpoint(engine, Progress(steps=1), tmp_path)

    class Offloading:
        def zero_optimization_stage(self) -> int:
            return 1

    with pytest.raises(UserError, match="resume without --offload"):
        load_checkpoint(Offloading(), tmp_path)
    torch.save({"module": Progress()}, tmp_path / plain.REST)
    with pytest.raises(UserError, match="holds more than tensors"):
        load_checkpoint(engine, tmp_path)
