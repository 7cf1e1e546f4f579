"""N workers compute the loss, the gradients and the statistics of one, and take its steps, with every ZeRO stage.

The one is plain PyTorch in this process; the workers are processes that meet over gloo and run the engines of training:
the plain one for ZeRO 0 and 1, DeepSpeed for 2 and 3, and for 1 in a run that it began. Three workers share eight
samples unequally, and of two samples one worker gets none.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from ceca.config import LossConfig, ModelConfig, TrainConfig
from ceca.model.backbone import tokenize, trim
from ceca.model.ceca import CECA
from ceca.model.irra import WordTask
from ceca.training.augment import draw, generator, hide_words
from ceca.training.engine import deepspeed_config, import_deepspeed, published_weights, whole_model
from ceca.training.plain import PlainEngine
from ceca.training.step import loss_terms, scaled_loss
from ceca.training.workers import batch_slice, gather_features, gather_identities, on_any_worker

BATCH, STEPS, RATE = 8, 2, 0.05
ENGINES = ("plain-0", "plain-1", "deepspeed-1", "deepspeed-2", "deepspeed-3")  # kind and ZeRO stage
CONFIG = ModelConfig(backbone="ceca-tiny", image_height=32, image_width=32, mixer_heads=4, local_dim=32)
GLOBAL = ModelConfig(
    backbone="ceca-tiny", image_height=32, image_width=32, mixer_heads=4, local_branch=False, summary_weight=0.0
)
METHODS = {
    "ceca": (CONFIG, LossConfig()),
    "irra": (GLOBAL, LossConfig(terms=("sdm", "identity", "words"))),
}
METHODS |= {f"few_{method}": settings for method, settings in METHODS.items()}  # the last batch of an epoch
COLOURS = ("red", "blue", "green", "black", "white", "pink", "grey", "brown")
CAPTIONS = [
    f"a {'man' if n % 2 else 'woman'} in a {colour} coat" + ", with a bag" * (n % 3) for n, colour in enumerate(COLOURS)
]
SUMMARIES = [f"{caption} and long {'black' if n % 3 else 'blond'} hair" for n, caption in enumerate(CAPTIONS)]
IDENTITIES = torch.tensor([0, 1, 2, 0, 3, 1, 4, 5])  # some people lie on two workers

# By number of workers: method, precision, engine, micro-batch.
EXACT = {
    1: [("ceca", "fp32", engine, None) for engine in ("plain-0", "deepspeed-3")],
    2: [("ceca", "fp32", engine, None) for engine in ENGINES]
    + [("ceca", "fp32", engine, 1) for engine in ("plain-0", "deepspeed-3")],
    3: [(method, "fp32", engine, None) for method in ("ceca", "irra") for engine in ("plain-1", "deepspeed-3")]
    + [(f"few_{method}", "fp32", "deepspeed-3", None) for method in ("ceca", "irra")],
    4: [("ceca", "fp32", engine, None) for engine in ENGINES],
}
BF16 = [("ceca", "bf16", engine, None) for engine in ("plain-1", "deepspeed-2", "deepspeed-3")]  # on two workers
CASES = {size: [(size, mode) for mode in EXACT[size]] for size in EXACT}


def name_of(mode: tuple[Any, ...]) -> str:
    return "-".join(map(str, mode))


def case_name(case: tuple[int, tuple[Any, ...]]) -> str:
    return f"{case[0]}-workers-{name_of(case[1])}"


def batch_of(method: str) -> int:
    """Samples in the global batch."""
    return 2 if method.startswith("few") else BATCH


def make_model(method: str, micro_batch: int | None = None) -> CECA:
    torch.manual_seed(0)
    model = CECA(METHODS[method][0]).train()
    if method.endswith("irra"):
        model.add_heads(identities=6)
    model.micro_batch = micro_batch
    model.backbone.recompute = micro_batch is not None
    return model


def inputs(method: str, step: int, rows: slice) -> tuple[Any, ...]:
    """What the model is called with: images, captions, summaries, labels, the task of hidden words."""
    batch = batch_of(method)
    # Of these images no two tokens are chosen so narrowly that the rounding of another processor chooses otherwise.
    images = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(100 + step))[rows]
    ids = trim(tokenize(CAPTIONS + SUMMARIES))
    captions, summaries = ids[:batch][rows], ids[BATCH:][:batch][rows]
    if method.endswith("ceca"):
        return images, captions, summaries
    task: WordTask = hide_words(captions, draw(batch, ids.shape[1], generator(step)).rows(rows), share=0.5)
    return images, captions, None, IDENTITIES[:batch][rows], task


def compute(call: Any, method: str, step: int, rank: int, size: int) -> dict[str, torch.Tensor]:
    """The loss terms of a step; `call` is the model, or the engine around it."""
    batch = batch_of(method)
    rows = batch_slice(rank, size, batch)
    dtype = next(getattr(call, "module", call).parameters()).dtype
    images, *others = inputs(method, step, rows)
    features = gather_features(call(images.to(dtype), *others), batch)
    return loss_terms(features, gather_identities(IDENTITIES[rows], batch), METHODS[method][1])


def plain_engine(model: CECA, config: TrainConfig) -> PlainEngine:
    """The plain engine with gradient descent in the place of Adam."""
    engine = PlainEngine(model, config, STEPS)

    def descend() -> None:
        for group in engine.groups:
            group.weights.data.sub_(RATE * group.weights.grad)

    engine.optimizer.step = descend
    return engine


def deepspeed_engine(model: CECA, config: TrainConfig) -> Any:
    settings = deepspeed_config(config)
    if config.zero_stage == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # every parameter is partitioned
    engine, *_ = import_deepspeed().initialize(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=RATE),
        config=settings,
        dist_init_required=False,
    )
    return engine


def gradients_of(engine: Any) -> dict[str, torch.Tensor]:
    """The gradients of the global batch by parameter, after the backward pass."""
    if isinstance(engine, PlainEngine):
        return engine.gathered([group.weights.grad for group in engine.groups])
    full = import_deepspeed("deepspeed.utils").safe_get_full_grad
    gradients = {name: full(parameter) for name, parameter in engine.module.named_parameters()}
    return {name: value for name, value in gradients.items() if value is not None}


def take_steps(method: str, precision: str, kind: str, micro_batch: int | None) -> dict[str, torch.Tensor]:
    """Losses and gradients of the first step, parameters and statistics after the last, of plain gradient descent."""
    rank, size = dist.get_rank(), dist.get_world_size()
    model_config, losses = METHODS[method]
    config = TrainConfig(
        model=model_config, losses=losses, global_batch=BATCH, precision=precision, zero_stage=int(kind[-1]),
        workers=size,
    )  # fmt: skip
    make = plain_engine if kind.startswith("plain") else deepspeed_engine
    engine = make(make_model(method, micro_batch), config)
    found: dict[str, torch.Tensor] = {}
    for step in range(STEPS):
        terms = compute(engine, method, step, rank, size)
        engine.backward(scaled_loss(terms))
        if step == 0:
            found |= {f"loss {name}": value.detach() for name, value in terms.items()}
            if precision == "fp32":
                found |= {f"gradient {name}": value.clone() for name, value in gradients_of(engine).items()}
        engine.step()
    last = whole_model(engine)
    found |= {f"after {name}": value.detach().float().clone() for name, value in last.named_parameters()}
    found |= {f"statistic {name}": value.clone() for name, value in last.named_buffers() if "running" in name}
    found |= {f"published {name}": value for name, value in published_weights(engine, last).items()}
    if not isinstance(engine, PlainEngine):
        engine.destroy()
    return found


def work(rank: int, size: int, folder: str) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    assert on_any_worker(rank == size - 1, torch.device("cpu"))
    assert not on_any_worker(False, torch.device("cpu"))
    for mode in EXACT[size] + (BF16 if size == 2 else []):
        found = take_steps(*mode)
        if rank == 0:
            torch.save(found, f"{folder}/{name_of(mode)}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, Any], dict[str, torch.Tensor]]:
    """Results of each mode on a given number of workers; all modes of one number run in one process group."""

    @functools.cache
    def run(size: int) -> Path:
        folder = tmp_path_factory.mktemp(f"{size}-workers")
        mp.spawn(work, args=(size, str(folder)), nprocs=size)
        return folder

    return lambda size, mode: torch.load(run(size) / f"{name_of(mode)}.pt", weights_only=True)


def one_process(method: str) -> dict[str, torch.Tensor]:
    """The same steps in one process of plain PyTorch."""
    model = make_model(method)
    found = {f"before {name}": value.detach().clone() for name, value in model.named_parameters()}
    optimiser = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(STEPS):
        optimiser.zero_grad()
        terms = compute(model, method, step, 0, 1)
        scaled_loss(terms).backward()
        if step == 0:
            found |= {f"loss {name}": value.detach() for name, value in terms.items()}
            found |= {f"gradient {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimiser.step()
    found |= {f"after {name}": value.detach().clone() for name, value in model.named_parameters()}
    return found | {f"statistic {name}": value.clone() for name, value in model.named_buffers() if "running" in name}


@pytest.fixture(scope="module")
def reference() -> dict[str, dict[str, torch.Tensor]]:
    return {method: one_process(method) for method in METHODS}


def of(found: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{kind} "): value for name, value in found.items() if name.startswith(f"{kind} ")}


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES[2], *CASES[3]], ids=case_name)
def test_many_workers_compute_what_one_computes(results, reference, case):
    found, mode = results(*case), case[1]
    expected = reference[mode[0]]
    for name, value in of(expected, "loss").items():
        torch.testing.assert_close(of(found, "loss")[name], value, rtol=1e-5, atol=1e-6, msg=name)
    gradients, wanted = of(found, "gradient"), of(expected, "gradient")
    assert gradients.keys() >= wanted.keys()
    assert len(wanted) > 50
    whole = torch.cat([value.flatten() for value in wanted.values()]).norm()
    for name, value in wanted.items():
        if value.norm() < 1e-6 * whole:  # zero but for rounding: a key's bias changes no attention
            assert gradients[name].norm() < 1e-6 * whole, name
            continue
        # Relative to the parameter's own gradient, or to a thousandth of the whole where it is smaller.
        scale = max(float(value.norm()), 1e-3 * float(whole))
        assert float((gradients[name] - value).norm()) <= 1e-5 * scale, name
    assert len(of(expected, "statistic")) == (4 if mode[0].endswith("ceca") else 0)
    for name, value in of(expected, "statistic").items():
        torch.testing.assert_close(of(found, "statistic")[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES[2], *CASES[3]], ids=case_name)
def test_every_zero_stage_takes_the_steps_of_one_process(results, reference, case):
    after, expected = of(results(*case), "after"), reference[case[1][0]]
    wanted, before = of(expected, "after"), of(expected, "before")
    assert {name for name in wanted if not name.startswith("heads.")} <= after.keys()
    for name, value in after.items():
        step = (wanted[name] - before[name]).abs().max()
        assert torch.allclose(value, wanted[name], rtol=0, atol=1e-3 * float(step) + 1e-6), name


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("case", [*CASES[1], *CASES[4]], ids=case_name)
def test_one_worker_and_four_do_too(results, reference, case):
    test_many_workers_compute_what_one_computes(results, reference, case)
    test_every_zero_stage_takes_the_steps_of_one_process(results, reference, case)


@pytest.mark.slow
@pytest.mark.parametrize("mode", BF16, ids=name_of)
def test_bf16_takes_nearly_the_same_steps(results, reference, mode):
    found, expected = results(2, mode), reference["ceca"]
    before = of(expected, "before")
    step, exact = (torch.cat([(of(p, "after")[n] - before[n]).flatten() for n in before]) for p in (found, expected))
    assert torch.cosine_similarity(step, exact, dim=0) > 0.95  # eight bits of a gradient through 12 layers
    assert step.norm() / exact.norm() == pytest.approx(1, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("mode", BF16, ids=name_of)
def test_the_published_weights_are_those_of_the_optimiser_and_not_rounded(results, mode):
    found = results(2, mode)
    published, rounded = of(found, "published"), of(found, "after")
    assert {name for name in rounded if not name.startswith("heads.")} <= published.keys()
    assert {value.dtype for value in published.values() if value.is_floating_point()} == {torch.float32}
    for name in rounded.keys() & published.keys():
        assert torch.equal(published[name].bfloat16().float(), rounded[name]), name
    finer = [name for name in rounded.keys() & published.keys() if not torch.equal(published[name], rounded[name])]
    assert len(finer) > 50


@pytest.mark.slow
def test_fp32_publishes_the_model_itself(results):
    found = results(2, ("ceca", "fp32", "plain-1", None))
    published = of(found, "published")
    assert all(torch.equal(published[name], value) for name, value in of(found, "after").items() if name in published)


def test_a_precision_that_would_not_train_is_refused_before_anything_starts():
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        TrainConfig(precision="fp16", gpus_per_worker=0)
