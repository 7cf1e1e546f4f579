"""The checks of benchmarks/gpu.py pass, and each finds a planted fault. With a GPU they run there (`-m gpu`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import ceca.model.backbone as towers
from benchmarks import bench as benches
from benchmarks import speed
from benchmarks.bench import CheckFailed, make_bench
from benchmarks.gpu import CHECKS, Settings, main
from ceca.model.backbone import Packing
from ceca.model.ceca import CECA
from ceca.search.topk import Best
from ceca.training.optimiser import SkippingAdam
from ceca.training.plain import PlainEngine

Plant = Callable[[pytest.MonkeyPatch], None]


def instead(place: Any, name: str, change: Callable[..., Any]) -> Plant:
    """A fault: `change` gets what the function returns, and its result is returned."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        right = getattr(place, name)
        patch.setattr(place, name, lambda *inputs, **named: change(right(*inputs, **named)))

    return plant


def louder(value: torch.Tensor) -> torch.Tensor:
    """One thousandth too large, in fp32 alone."""
    return value * 1.001 if value.dtype == torch.float32 else value


def read(value: torch.Tensor) -> torch.Tensor:
    """As it is, after the host looked at it."""
    assert float(value.sum()) is not None
    return value


def forgetful(patch: pytest.MonkeyPatch) -> None:
    """A checkpoint that leaves out Adam's states."""
    load = PlainEngine.load_checkpoint

    def without_states(engine: PlainEngine, folder: Path) -> None:
        load(engine, folder)
        engine.optimizer.state.clear()

    patch.setattr(PlainEngine, "load_checkpoint", without_states)


def careless(patch: pytest.MonkeyPatch) -> None:
    """Steps without a look at the gradients."""
    patch.setattr(SkippingAdam, "look_at", lambda adam, gradients: None)


def thorough(patch: pytest.MonkeyPatch) -> None:
    """A look at each single gradient, as DeepSpeed's."""

    def step(engine: PlainEngine) -> None:
        for parameter in engine.module.parameters():
            torch.isfinite(parameter).all().logical_not()
        right(engine)

    right = PlainEngine.step
    patch.setattr(PlainEngine, "step", step)


def wrongly_compiled(patch: pytest.MonkeyPatch) -> None:
    """Compiled blocks that add a hundredth."""
    patch.setattr(torch, "compile", lambda block, **options: lambda *inputs: 1.01 * block(*inputs))


FAULTS: dict[str, Plant] = {
    "peaks": instead(benches, "fastest", lambda seconds: float("inf")),
    "exactness": instead(F, "scaled_dot_product_attention", louder),
    "padding": instead(Packing, "unpack", lambda x: x.roll(1, dims=1)),
    "attention": instead(F, "scaled_dot_product_attention", lambda x: x.roll(1, dims=2)),
    "compiled": wrongly_compiled,
    "precision": careless,
    "resume": forgetful,
    "waits": instead(towers.Backbone, "encode_images", lambda tokens: (read(tokens.summit), tokens)[1]),
    "launches": thorough,
    "speed": instead(speed, "train_step", lambda found: (*found[:2], {"loss": found[0].image.sum() * torch.nan})),
    "decoding": instead(speed, "decode_image", lambda pixels: pixels[:, ::-1]),
    "augmentation": instead(
        speed, "augment_images", lambda images: images.roll(1, dims=0) if len(images) > 1 else images
    ),
    "embedding": instead(CECA, "embed_gallery", lambda found: (louder(found[0]) * 1.2, found[1])),
    "search": instead(speed, "top_k", lambda best: Best(best.similarity.roll(1, dims=0), best.row)),
}


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_each_check_finds_a_planted_fault(check, monkeypatch):
    bench = make_bench("cpu")
    FAULTS[check](monkeypatch)
    with pytest.raises(CheckFailed):
        CHECKS[check](bench)


@pytest.mark.slow
def test_all_checks_pass_on_a_cpu(tmp_path: Path, capsys):
    assert main(Settings(device="cpu", out=tmp_path / "figures.json")) == 0, capsys.readouterr().out
    report = json.loads((tmp_path / "figures.json").read_text())
    assert list(report) == list(CHECKS)
    assert all(result["figures"] for result in report.values())


def test_a_failed_check_is_said_written_and_the_exit_status(tmp_path: Path, monkeypatch, capsys):
    FAULTS["padding"](monkeypatch)
    status = main(Settings(device="cpu", only=("padding", "decoding"), out=tmp_path / "figures.json"))
    report = json.loads((tmp_path / "figures.json").read_text())
    assert status == 1
    assert {name: result["ok"] for name, result in report.items()} == {"padding": False, "decoding": True}
    assert "padded and packed texts differ" in report["padding"]["error"]
    assert "FAILED padding" in capsys.readouterr().out


def test_an_unknown_check_and_a_missing_gpu_are_said_in_one_line(capsys):
    assert main(Settings(device="cpu", only=("speeed",))) == 2
    assert "no check speeed" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main(Settings()) == 2
        assert "no GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_each_check_passes_on_the_gpu(check):
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    CHECKS[check](make_bench("cuda"))
