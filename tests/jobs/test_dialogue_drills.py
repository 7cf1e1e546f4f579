"""Slow drills of the dialogue stage: actors, nodes and jobs lost on the way; ten thousand images; cache on and off."""

from __future__ import annotations

import asyncio
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from PIL import Image

from ceca.config import VLLMConfig
from ceca.data.store import Manifest, Store
from ceca.datasets.drawn import draw_dataset
from ceca.dialogue.conversation import Dialogue, Subject, converse
from ceca.dialogue.supervised import Supervised
from ceca.dialogue.tiny import make_tiny_vlm
from ceca.dialogue.vllm import VLLMEngine
from tests.conftest import REPOSITORY, finish, own_processes
from tests.endpoint import ChatServer, Describer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

IMAGES, PART = 300, 10


def draw(folder: Path, images: int) -> Path:
    """As many drawn images, four of each person, in CUHK-PEDES's layout."""
    people = images // 4
    draw_dataset(
        folder, seed=3, identities=people, images_per_identity=4, split_identities=(people - 8, 4, 4), workers=2
    )
    return folder


def command(stage: str, *arguments: object, environment: dict[str, str] | None = None) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, f"jobs/{stage}.py", *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, "COLUMNS": "200", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


# --- lost on the way --------------------------------------------------------------------------------------


@pytest.fixture
def three_nodes() -> Iterator[Any]:
    """A head without work and two nodes whose actors a test may kill."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.workers = [cluster.add_node(num_cpus=2), cluster.add_node(num_cpus=2)]
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def describer() -> Iterator[tuple[Describer, str]]:
    answers = Describer(seconds=0.15)
    server = ChatServer(answers)
    yield answers, server.url
    server.close()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[0][-5000:]
        assert time.monotonic() < deadline, "the job does not get so far"
        time.sleep(0.05)


def test_an_actor_a_node_and_the_job_are_lost_and_each_image_is_there_once(three_nodes, describer, tmp_path):
    answers, url = describer
    data, store = tmp_path / "data", Store(str(tmp_path / "data"))
    finish(command("ingest", "--source", draw(tmp_path / "drawn", IMAGES), "--data", data))
    arguments = ("--data", data, "--engine", "openai", "--openai.base-url", url, "--openai.model", "m", "--no-canary")
    sizes = ("--images-per-part", PART, "--conversations", 4, "--replicas", 3)
    on_cluster = {"RAY_ADDRESS": three_nodes.address}

    def receipts() -> list[Path]:
        return list(Path(store.path(".work", "dialogue")).glob("*/*.json"))

    job = command("dialogue", *arguments, *sizes, environment=on_cluster)
    wait_for(lambda: len(receipts()) >= 4, job)
    own_processes("MapWorker(Map(_UnitWorker))")[0].kill()
    wait_for(lambda: len(receipts()) >= 10, job)
    three_nodes.remove_node(three_nodes.workers[0], allow_graceful=False)
    wait_for(lambda: len(receipts()) >= 16, job)
    job.send_signal(signal.SIGKILL)
    job.communicate(timeout=60)
    time.sleep(3)  # what was on its way to the endpoint
    assert store.manifest("dialogues") is None
    finished = len(receipts())
    answers.asked.clear()

    output = finish(command("dialogue", *arguments, *sizes, environment=on_cluster))
    assert f"continuing, {finished} of {IMAGES // PART} parts are there" in " ".join(output.split())
    manifest = store.current("dialogues")
    counted = Counter(store.read(manifest, ["image_id"])["image_id"].to_pylist())
    assert set(counted) == set(store.read(store.current("images"), ["image_id"])["image_id"].to_pylist())
    assert set(counted.values()) == {1}
    # Asked again were the images of unfinished parts alone, each for six turns.
    assert Counter(answers.asked.values()) == {6: IMAGES - finished * PART}


def test_a_killed_vllm_is_replaced_and_every_conversation_is_whole(tmp_path):
    model = make_tiny_vlm(tmp_path / "model")
    config = VLLMConfig(model=str(model), gpus=0, dtype="float32", max_model_len=1024, enforce_eager=True)
    engines: list[VLLMEngine] = []

    def make() -> VLLMEngine:
        engines.append(VLLMEngine(config, temperature=0.0, seed=0))
        return engines[-1]

    async def run() -> list[Dialogue]:
        engine = Supervised(make, stall_s=300, restarts=1)
        await engine.start()
        lengths = {"answer_tokens": 16, "summary_tokens": 24}
        subjects = [Subject(f"image-{n}", picture(n)) for n in range(6)]
        talks = [asyncio.ensure_future(converse(engine, one, questions=5, **lengths)) for one in subjects]
        while not any(made.turns for made in engines[0].conversations.values()):
            await asyncio.sleep(0.01)
        for core in multiprocessing.active_children():
            core.kill()
        try:
            return await asyncio.gather(*talks)
        finally:
            await engine.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
        dialogues = asyncio.run(run())
    assert len(engines) == 2
    assert all(len(made.turns) == 5 and made.summary for made in dialogues)


def picture(number: int) -> bytes:
    noise = np.random.default_rng(number).integers(0, 255, (160, 64, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(noise).save(content, "PNG")
    return content.getvalue()


# --- many images ------------------------------------------------------------------------------------------


def peak_of(process: subprocess.Popen) -> int:
    """Bytes of its own, without what it shares, that the command's process had at most, once it has ended."""
    peak = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon"):
                peak = max(peak, int(line.split()[1]) * 1024)
        time.sleep(0.02)
    return peak


@pytest.mark.long
def test_the_drivers_memory_does_not_grow_with_the_images(tmp_path):
    source, data = draw(tmp_path / "drawn", 10_000), tmp_path / "data"
    finish(command("ingest", "--source", source, "--data", data))
    peaks = {}
    for images in (2_000, 10_000):
        log = tmp_path / f"{images}.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "jobs/dialogue.py", "--data", data, "--engine", "oracle", "--limit", str(images)],
                cwd=REPOSITORY, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
            peaks[images] = peak_of(process)
        assert process.returncode == 0, log.read_text()[-5000:]
        assert Store(str(data)).current("dialogues").rows == images
    print({images: f"{peak / 1e6:.0f} MB" for images, peak in peaks.items()})
    assert peaks[10_000] < 1.1 * peaks[2_000]


# --- prefix cache -----------------------------------------------------------------------------------------


@pytest.mark.long
def test_greedy_answers_are_the_same_with_the_prefix_cache_on_and_off(tmp_path):
    data, model = tmp_path / "data", make_tiny_vlm(tmp_path / "model")
    finish(command("ingest", "--source", draw(tmp_path / "drawn", 64), "--data", data))
    settings = ("--vllm.model", model, "--vllm.gpus", 0, "--vllm.enforce-eager", "--vllm.dtype", "float32")
    lengths = ("--answer-tokens", 16, "--summary-tokens", 24, "--vllm.max-model-len", 1024)

    def answers(*arguments: str) -> tuple[Manifest, dict[str, list[str]]]:
        finish(command("dialogue", "--data", data, *settings, *lengths, "--redo", *arguments))
        store = Store(str(data))
        manifest = store.current("dialogues")
        rows = store.read(manifest).to_pylist()
        return manifest, {row["image_id"]: [t["answer"] for t in row["turns"]] + [row["summary"]] for row in rows}

    cached, with_cache = answers()
    plain, without_cache = answers("--vllm.no-prefix-caching")
    assert len(with_cache) == 64
    assert with_cache == without_cache
    assert cached.notes["counts"]["cached_tokens"] >= 0.9 * cached.notes["counts"]["reusable_tokens"] > 0
    assert plain.notes["counts"]["cached_tokens"] == 0
    assert len({tuple(words) for words in with_cache.values()}) > 32  # the images are seen
