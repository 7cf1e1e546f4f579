"""DeepSpeed: compilation of its operations, what it is told about number types, and its errors."""

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

from ceca.config import LossConfig, TrainConfig
from ceca.errors import UserError
from ceca.training.curve import Curve
from ceca.training.engine import (
    Progress,
    _running_no_code,
    compile_operation,
    deepspeed_config,
    explained_overflow,
    import_deepspeed,
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
