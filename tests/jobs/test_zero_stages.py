"""Every ZeRO stage takes the step that one process without DeepSpeed takes; bf16 takes nearly the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ceca.config import LossConfig, TrainConfig
from ceca.model.backbone import tokenize, trim
from ceca.model.ceca import CECA
from ceca.training import gather_features, gather_identities, loss_terms, scaled_loss
from jobs.train_engine import deepspeed_config, whole_model
from tests.ceca.test_exactness import BATCH, CAPTIONS, CONFIG, IDENTITIES, SUMMARIES

WORKERS, STEPS, RATE = 2, 2, 0.05
LOSSES = LossConfig(temperature=0.1, scale=5.0)
MODES = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3)]


def make_model() -> CECA:
    torch.manual_seed(0)
    return CECA(CONFIG).train()


def batch(step: int, rank: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    images = torch.randn(BATCH, 3, 32, 32, generator=torch.Generator().manual_seed(step))[rows]
    captions, summaries = trim(tokenize(CAPTIONS[rows] + SUMMARIES[rows])).split(BATCH // size)
    return images, captions, summaries, IDENTITIES[rows]


def take_steps(precision: str, stage: int) -> dict[str, torch.Tensor]:
    """Parameters after a few DeepSpeed steps of plain gradient descent, in which every gradient shows as it is."""
    import deepspeed

    rank, size = dist.get_rank(), dist.get_world_size()
    config = TrainConfig(
        model=CONFIG, losses=LOSSES, global_batch=BATCH, precision=precision, zero_stage=stage, workers=size
    )
    settings = deepspeed_config(config)
    if stage == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # every parameter is partitioned
    model = make_model()
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=RATE),
        config=settings,
        dist_init_required=False,
    )
    for step in range(STEPS):
        images, captions, summaries, identities = batch(step, rank, size)
        features = engine(images.to(next(engine.module.parameters()).dtype), captions, summaries)
        terms = loss_terms(gather_features(features, BATCH), gather_identities(identities, BATCH), LOSSES)
        engine.backward(scaled_loss(terms))
        engine.step()
    found = {name: value.detach().float().clone() for name, value in whole_model(engine).named_parameters()}
    engine.destroy()
    return found


def work(rank: int, folder: str) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORKERS)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORKERS)
    for precision, stage in MODES:
        found = take_steps(precision, stage)
        if rank == 0:
            torch.save(found, f"{folder}/{precision}-{stage}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parameters each mode ends with, on two workers."""
    folder = tmp_path_factory.mktemp("steps")
    mp.spawn(work, args=(str(folder),), nprocs=WORKERS)
    return folder


@pytest.fixture(scope="module")
def reference() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Parameters before and after the same steps in one process of plain PyTorch."""
    model = make_model()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        images, captions, summaries, identities = batch(step, 0, 1)
        optimiser.zero_grad()
        scaled_loss(loss_terms(model(images, captions, summaries), identities, LOSSES)).backward()
        optimiser.step()
    return before, {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_takes_the_steps_of_one_process(after: Path, reference, stage: int):
    before, expected = reference
    found = torch.load(after / f"fp32-{stage}.pt", weights_only=True)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        step = (value - before[name]).abs().max()
        assert torch.allclose(found[name], value, rtol=0, atol=1e-3 * float(step) + 1e-6), name
    assert sum(not torch.equal(before[name], value) for name, value in expected.items()) > 50


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_takes_nearly_the_same_steps_with_every_zero_stage(after: Path, reference, stage: int):
    before, expected = reference
    found = torch.load(after / f"bf16-{stage}.pt", weights_only=True)
    step, exact = (torch.cat([(p[n] - before[n]).flatten() for n in before]) for p in (found, expected))
    assert torch.cosine_similarity(step, exact, dim=0) > 0.95  # eight bits of a gradient through 12 layers
    assert step.norm() / exact.norm() == pytest.approx(1, abs=0.03)


def test_precisions_that_would_not_train_are_refused_before_anything_starts():
    with pytest.raises(ValueError, match="zero_stage 1 or more"):
        TrainConfig(precision="bf16", zero_stage=0)
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        TrainConfig(precision="fp16", gpus_per_worker=0)
