"""What DeepSpeed compiles when it runs: as little as it can, and never waited for in vain."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch.utils.cpp_extension
from torch.utils.file_baton import FileBaton

from ceca.training.engine import compile_operation, import_deepspeed


class Operation:
    """Compiled by torch as DeepSpeed's are, from a line of C++."""

    name = "answer"

    def __init__(self, folder: Path):
        self.source = folder / "answer.cpp"
        self.source.write_text('extern "C" int answer() { return 42; }')

    def load(self) -> None:
        torch.utils.cpp_extension.load(self.name, [str(self.source)], is_python_module=False)


def _compile_until_killed(folder: Path) -> None:
    """Holds torch's lock, and ours, as a process does in the middle of a compilation."""

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


def test_training_on_cpus_compiles_nothing() -> None:
    import_deepspeed()
    from deepspeed.comm.torch import build_shm_op

    assert build_shm_op() is None
