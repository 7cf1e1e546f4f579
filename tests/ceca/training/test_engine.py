"""DeepSpeed: compilation of its operations, what it is told, its errors, and steps that wait for nothing."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.utils.cpp_extension
from torch.utils.file_baton import FileBaton

from benchmarks.waits import Operations
from ceca.config import LossConfig, ModelConfig, OptimiserConfig, TrainConfig
from ceca.errors import UserError
from ceca.model.ceca import CECA
from ceca.training.curve import Curve
from ceca.training.engine import (
    MOST_IN_A_BUCKET,
    Progress,
    _running_no_code,
    compile_operation,
    deepspeed_config,
    explained_overflow,
    import_deepspeed,
    load_checkpoint,
    make_engine,
    save_checkpoint,
    skipped_steps,
    take_step,
)

REPOSITORY = Path(__file__).parents[3]


class Operation:
    """An operation that torch compiles from a line of C++, as it compiles DeepSpeed's."""

    name = "answer"

    def __init__(self, folder: Path):
        self.source = folder / "answer.cpp"
        self.source.write_text('extern "C" int answer() { return 42; }')

    def load(self) -> None:
        torch.utils.cpp_extension.load(self.name, [str(self.source)], is_python_module=False)


def _compile_until_killed(folder: Path) -> None:
    """Hold torch's lock and ours, as a process does in the middle of a compilation."""

    class Slow(Operation):
        def load(self) -> None:
            place = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / self.name
            place.mkdir(exist_ok=True)
            assert FileBaton(str(place / "lock")).try_acquire()
            (folder / "compiling").touch()
            time.sleep(600)

    compile_operation(Slow(folder))


@pytest.mark.timeout(120)
def test_a_compilation_that_was_killed_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CECA_CACHE", str(tmp_path / "cache"))
    process = multiprocessing.get_context("spawn").Process(target=_compile_until_killed, args=(tmp_path,))
    process.start()
    while not (tmp_path / "compiling").exists():
        assert process.is_alive()
        time.sleep(0.05)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()

    compile_operation(Operation(tmp_path))

    assert torch.ops.loaded_libraries & {str(tmp_path / "cache/extensions/answer/answer.so")}
    assert "TORCH_EXTENSIONS_DIR" not in os.environ


def test_progress_comes_back_with_the_division_of_its_epoch(tmp_path: Path) -> None:
    clean = np.array([True, False, True])
    Progress(steps=3, best={"epoch": 1.0}, clean=clean).save(tmp_path)
    found = Progress.load(tmp_path)
    assert (found.steps, found.best) == (3, {"epoch": 1.0})
    assert np.array_equal(found.clean, clean)
    (tmp_path / "without").mkdir()
    Progress(steps=3).save(tmp_path / "without")
    assert Progress.load(tmp_path / "without").clean is None


def test_training_on_cpus_compiles_nothing() -> None:
    import_deepspeed()
    from deepspeed.comm.torch import build_shm_op

    assert build_shm_op() is None


def test_deepspeed_is_imported_in_one_place() -> None:
    sources = [file for room in ("ceca", "jobs", "serve", "benchmarks") for file in (REPOSITORY / room).rglob("*.py")]
    assert len(sources) > 50
    assert [str(file) for file in sources if re.search(r"^\s*(import|from) deepspeed", file.read_text(), re.M)] == []


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])  # DeepSpeed writes torch's format before 2020
def test_a_checkpoint_runs_no_code_whatever_deepspeed_asks_for(tmp_path: Path, zipped: bool) -> None:
    scaler = import_deepspeed("deepspeed.runtime.fp16.loss_scaler").LossScaler(4.0)
    stage = import_deepspeed("deepspeed.runtime.zero.config").ZeroStageEnum(2)
    good, bad, file = {"scaler": scaler, "stage": stage, "step": torch.ones(2)}, tmp_path / "ran", tmp_path / "state.pt"
    torch.save(good, file, _use_new_zipfile_serialization=zipped)
    with _running_no_code(tmp_path):
        read = torch.load(file, weights_only=False)
    assert (read["scaler"].cur_scale, read["stage"], read["step"].tolist()) == (4.0, stage, [1, 1])
    torch.save({**good, "scaler": Code(bad)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="holds more than tensors"), _running_no_code(tmp_path):
        torch.load(file, weights_only=False)
    assert not bad.exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_nothing_here_unpickles() -> None:
    """Weights are read by ceca/model/archive.py, whose unpickler knows tensors and plain containers alone."""
    words = re.compile(
        r"weights_only=False|allow_pickle=True|pickle\.loads?\(|torch\.jit\.load|joblib|trust_remote_code=True"
        r"|(?<!safetensors\.)torch\.load\((?!.*weights_only=True)"
    )
    for room in ("ceca", "jobs", "serve", "cluster", "benchmarks"):
        for file in (REPOSITORY / room).rglob("*.py"):
            assert not words.search(file.read_text()), file


# --- number types -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("terms", "batch", "workers", "power"),
    [
        (("sdm",), 64, 1, 16),  # a mean, as DeepSpeed expects
        (("sdm",), 64, 8, 13),  # times the workers
        (("tal_global", "tal_local", "cawl"), 64, 1, 10),  # a sum over the batch
        (("tal_global",), 48, 3, 8),
        (("tal_global",), 4096, 64, 0),
    ],
)
def test_the_first_loss_scale_of_fp16_suits_a_sum_times_the_workers(terms, batch, workers, power) -> None:
    config = TrainConfig(precision="fp16", losses=LossConfig(terms=terms), global_batch=batch, workers=workers)
    scale = deepspeed_config(config)["fp16"]
    assert scale["initial_scale_power"] == power
    read = import_deepspeed("deepspeed.runtime.precision_config").DeepSpeedFP16Config(**scale)
    assert read.initial_dynamic_scale() == 2**power


@pytest.mark.parametrize(
    ("precision", "workers", "expected"),
    [("bf16", 8, "fp32"), ("bf16", 7, None), ("fp16", 64, "fp32"), ("fp32", 64, None)],
)
def test_gradients_of_many_workers_are_added_up_in_fp32(precision, workers, expected) -> None:
    config = TrainConfig(precision=precision, workers=workers)
    assert deepspeed_config(config).get("communication_data_type") == expected


def test_a_loss_scale_that_cannot_get_smaller_is_an_error_with_advice() -> None:
    scaler = import_deepspeed("deepspeed.runtime.fp16.loss_scaler").DynamicLossScaler(1.0, 1000, 1.0, 1, False)
    with pytest.raises(UserError, match=r"gradients are not finite.*lower the learning rates"), explained_overflow():
        scaler.update_scale(True)
    with pytest.raises(ZeroDivisionError), explained_overflow():
        print(1 / 0)


def test_progress_counts_skipped_steps_and_reads_checkpoints_from_before(tmp_path: Path) -> None:
    Progress(steps=9, skipped=2, curve=Curve()).save(tmp_path)
    assert Progress.load(tmp_path).skipped == 2
    earlier = tmp_path / "progress.json"
    earlier.write_text(earlier.read_text().replace(', "skipped": 2', ""))
    assert "skipped" not in earlier.read_text()
    assert Progress.load(tmp_path).skipped == 0


# --- settings and steps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("offload", [False, True])
def test_deepspeed_knows_every_setting_and_checks_gradients_only_where_it_must(stage, precision, clip, offload):
    if stage == 0 and (offload or precision == "bf16"):
        return
    optimiser = OptimiserConfig(gradient_clip=clip)
    config = TrainConfig(zero_stage=stage, precision=precision, offload=offload, optimiser=optimiser)
    settings = deepspeed_config(config, parameters=1001)
    zero, switches = settings["zero_optimization"], stage in (1, 2) and not offload
    known = import_deepspeed("deepspeed.runtime.zero.config").DeepSpeedZeroConfig(**zero)
    assert zero.keys() <= known.__class__.model_fields.keys()
    assert known.compute_grad_norm == (not switches or clip > 0)
    assert known.reduce_bucket_size == known.allgather_bucket_size == 1002
    bf16 = import_deepspeed("deepspeed.runtime.precision_config").get_bfloat16_config(settings)
    assert bf16.check_grad_overflow == (not switches or precision == "fp32")
    assert not import_deepspeed("deepspeed.utils.config").get_timers_config(settings).enabled


def test_no_bucket_is_larger_than_the_largest():
    zero = deepspeed_config(TrainConfig(), parameters=10**12)["zero_optimization"]
    assert zero["reduce_bucket_size"] == zero["allgather_bucket_size"] == MOST_IN_A_BUCKET


SMALL = ModelConfig(
    backbone="ceca-tiny", image_height=32, image_width=32, mixer_heads=4, local_branch=False, summary_weight=0.0
)


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 1), ("bf16", 2)])
def test_a_step_reads_nothing_and_a_gradient_that_is_no_number_changes_nothing(one_worker, tmp_path, precision, stage):
    config = TrainConfig(
        model=SMALL,
        losses=LossConfig(terms=("infonce",)),
        precision=precision,
        zero_stage=stage,
        gpus_per_worker=0,
        optimiser=OptimiserConfig(warmup_epochs=0),
    )
    engine = make_engine(CECA(SMALL), config, steps=10)
    parameter = engine.module.backbone.clip.visual.proj

    def step(factor: float) -> torch.Tensor:
        before = parameter.detach().clone()
        images = torch.ones(2, 3, 32, 32, dtype=parameter.dtype)
        features = engine(images, torch.tensor([[49406, 320, 49407], [49406, 321, 49407]]), None)
        with Operations() as operations:
            engine.backward(factor * features.visual.float().pow(2).sum())
            take_step(engine)
        assert not operations.reads
        return (parameter.detach() - before).float().abs().amax()

    assert step(1.0) > 0
    for bad in (float("nan"), float("inf")):
        assert step(bad) == 0
    assert skipped_steps(engine) == 2
    assert step(1.0) > 0
    save_checkpoint(engine, Progress(), tmp_path)
    step(float("nan"))
    load_checkpoint(engine, tmp_path)
    assert skipped_steps(engine) == 2
    assert step(1.0) > 0
    assert torch.isfinite(parameter).all()
