"""What is around a vLLM engine: its guard, memory, settings and errors. `tests/drills/test_vllm.py` starts one."""

import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from PIL import Image

from ceca.config import VLLMConfig
from ceca.dialogue.conversation import (
    EngineError,
)
from ceca.dialogue.preparation import fit_pixels
from ceca.dialogue.tiny import make_tiny_vlm
from ceca.dialogue.vllm import VLLMEngine, end_with_this_process, wait_for_memory

MAX_PIXELS = 64 * 28 * 28


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_vlm(tmp_path_factory.mktemp("tiny"))


def test_a_killed_workers_engine_is_ended():
    """After SIGKILL, the guard ends the processes that the worker started."""
    script = """
import os, signal, subprocess
from ceca.dialogue.vllm import end_with_this_process
child = subprocess.Popen(["sleep", "60"])
end_with_this_process([child.pid])
print(child.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == -9, finished.stderr
    assert wait_for_end(int(finished.stdout))


def test_a_killed_workers_processes_that_prepare_images_end():
    """Also where it is killed before its engine has started, and with it the guard."""
    script = """
import concurrent.futures, multiprocessing, os, signal
from ceca.dialogue.preparation import end_with_parent
pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), end_with_parent)
print(pool.submit(os.getpid).result(), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    finished = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == -9, finished.stderr
    assert wait_for_end(int(finished.stdout))


def test_a_dismissed_guard_ends_nothing():
    child = subprocess.Popen(["sleep", "60"])
    try:
        guard = end_with_this_process([child.pid])
        guard.communicate(b"closed\n")
        assert guard.returncode == 0
        assert child.poll() is None
    finally:
        child.kill()
        child.wait()


def wait_for_end(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize(
    ("shares", "reads"),
    [([[0.2, 0.95], [0.91, 0.95], [1.0, 1.0]], 2), ([[0.95, 0.95]], 1), ([[]], 1)],
    ids=["after a while", "free", "no driver"],
)
def test_a_start_waits_until_every_gpu_has_free_memory(shares, reads):
    left = list(shares)
    asyncio.run(wait_for_memory(0.9, lambda: left.pop(0), limit_s=30))
    assert len(shares) - len(left) == reads


def test_a_start_does_not_wait_for_ever_for_memory():
    begun = time.monotonic()
    asyncio.run(wait_for_memory(0.9, lambda: [0.5], limit_s=0.1))
    assert time.monotonic() - begun < 5


def test_a_missing_model_is_an_error_with_advice(tmp_path):
    engine = VLLMEngine(VLLMConfig(model=str(tmp_path / "missing"), gpus=0), temperature=0.0, seed=0)
    with pytest.raises(EngineError, match=r"missing.*a model of the hub.*or a local folder"):
        asyncio.run(engine.start())
    asyncio.run(engine.close())


def test_a_model_without_a_chat_template_is_an_error_at_the_start(tmp_path):
    folder = make_tiny_vlm(tmp_path)
    (folder / "chat_template.jinja").unlink()
    engine = VLLMEngine(VLLMConfig(model=str(folder), gpus=0), temperature=0.0, seed=0)
    with pytest.raises(EngineError, match="chat template"):
        asyncio.run(engine.start())


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        ValueError("No available memory for the cache blocks."),
        RuntimeError("Engine core initialization failed. See root cause above."),  # the child process has the cause
    ],
)
def test_a_failed_start_says_how_to_use_less_memory(error):
    text = VLLMEngine(VLLMConfig(model="some/model"), temperature=0.0, seed=0)._explain(error)
    assert str(error) in text
    assert "some/model" in text
    assert "--vllm.max-model-len" in text


def test_without_vllm_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    engine = VLLMEngine(VLLMConfig(gpus=0), temperature=0.0, seed=0)
    with pytest.raises(EngineError, match=r"requirements/gpu\.txt.*requirements/cpu\.txt"):
        asyncio.run(engine.start())


@pytest.mark.parametrize("size", [(64, 160), (28, 28), (1, 1)])
def test_an_image_within_the_budget_is_unchanged(size):
    image = Image.new("RGB", size)
    assert fit_pixels(image, MAX_PIXELS) is image


@pytest.mark.parametrize("size", [(500, 1200), (4000, 3000), (100_000, 1)])
def test_an_image_over_the_budget_is_scaled_and_keeps_its_aspect_ratio(size):
    image = fit_pixels(Image.new("RGB", size), MAX_PIXELS)
    assert image.width * image.height <= MAX_PIXELS
    assert min(image.size) == 1 or image.width / image.height == pytest.approx(size[0] / size[1], rel=0.02)


def test_the_tiny_model_is_the_same_for_the_same_seed(tiny, tmp_path):
    weights = "model.safetensors"
    assert (make_tiny_vlm(tmp_path / "same") / weights).read_bytes() == (tiny / weights).read_bytes()
    assert (make_tiny_vlm(tmp_path / "other", seed=1) / weights).read_bytes() != (tiny / weights).read_bytes()
    assert sum(path.stat().st_size for path in tiny.iterdir()) < 4e6


def test_settings_reach_the_arguments_of_vllms_engine(monkeypatch):
    monkeypatch.delenv("CECA_DECLARED_GPUS", raising=False)

    def arguments(**values: object) -> dict:
        return VLLMEngine(VLLMConfig(**values), temperature=0.0, seed=0)._engine_arguments("weights")

    assert not {"max_num_seqs", "max_num_batched_tokens", "quantization"} & arguments().keys()
    assert "distributed_executor_backend" not in arguments(tensor_parallel=2)
    assert arguments(tensor_parallel=2, several_machines=True)["distributed_executor_backend"] == "ray"
    given = arguments(
        sequences=8,
        batched_tokens=512,
        quantization="fp8",
        kv_cache_dtype="fp8",
        arguments='{"mm_processor_cache_gb": 1}',
    )
    assert given.items() >= {
        "max_num_seqs": 8, "max_num_batched_tokens": 512, "quantization": "fp8", "kv_cache_dtype": "fp8",
        "mm_processor_cache_gb": 1,
    }.items()  # fmt: skip


@pytest.mark.parametrize(("given", "kept"), [(None, "0"), ("1", "1")])
def test_flashinfers_sampler_is_off_unless_the_user_wants_it(
    monkeypatch: pytest.MonkeyPatch, given: str | None, kept: str
):
    """FlashInfer would compile it, and the lock's compiler is newer than the headers."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", "x")  # put back afterwards
    monkeypatch.delenv("VLLM_USE_FLASHINFER_SAMPLER")
    if given is not None:
        monkeypatch.setenv("VLLM_USE_FLASHINFER_SAMPLER", given)
    with pytest.raises(EngineError):
        asyncio.run(VLLMEngine(VLLMConfig(gpus=0), temperature=0.0, seed=0).start())
    assert os.environ["VLLM_USE_FLASHINFER_SAMPLER"] == kept
