"""The whole pipeline submitted to a cluster that is a head alone: nodes come for the work and go after it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import pytest
import s3fs
from PIL import Image

from ceca.data.store import Store
from ceca.dialogue.tiny import make_tiny_vlm
from ceca.search.edition import find_edition
from cluster import local
from cluster.object_store import free_port
from serve.client import Client
from tests.conftest import REPOSITORY, finish
from tests.drills.conftest import submit

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

NAME = "drill"
RECIPE = Path(__file__).parent / "people.yaml"
PLANTED = "planted-secret-8c1f"
BROWSER = {"User-Agent": "Mozilla/5.0 (X11; Linux x86_64) Firefox/140.0", "Sec-Fetch-Mode": "cors"}


@dataclass
class Running:
    """A local cluster with a bucket that holds drawn people and a tiny model, and a folder to submit from."""

    cluster: local.Cluster
    folder: Path
    nodes: list[tuple[int, int]] = field(default_factory=list)  # seen while work went on: without and with a GPU

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, **self.cluster.variables, "RAY_JOB_LOGS_TIMEOUT": "600", "COLUMNS": "200"}

    def submit(self, *command: str, job: str = "", secrets: dict[str, str] | None = None) -> subprocess.Popen[str]:
        options = ["--working-dir", ".", *(["--submission-id", job] if job else [])]
        if secrets:
            options += ["--runtime-env-json", json.dumps({"env_vars": secrets})]
        return submit(self.folder, self.environment, *options, "--", *command)

    def alive(self) -> tuple[int, int]:
        """Nodes beside the head, without and with a GPU."""
        answer = self.get("/api/v0/nodes?detail=1&limit=1000")
        nodes = [node for node in answer["data"]["result"]["result"] if node["state"] == "ALIVE"]
        gpus = sum("GPU" in node["resources_total"] for node in nodes)
        return len(nodes) - 1 - gpus, gpus

    def get(self, path: str, headers: dict[str, str] | None = None) -> dict:
        token = Path(self.cluster.variables["RAY_AUTH_TOKEN_PATH"]).read_text()
        headers = {"Authorization": f"Bearer {token}", **(headers or {})}
        answer = httpx.get(self.cluster.dashboard + path, headers=headers, timeout=60)
        answer.raise_for_status()
        return answer.json()

    def watch(self, work: subprocess.Popen[str]) -> None:
        while work.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                self.nodes.append(self.alive())
            time.sleep(1)


@pytest.fixture(scope="module")
def running(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("submitted")
    for package in ("ceca", "jobs"):
        shutil.copytree(REPOSITORY / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(RECIPE, folder)
    make_tiny_vlm(folder / "tiny-vlm")
    local.down(NAME)
    cluster = local.up(NAME, nodes=4, gpus=2, idle_minutes=0.4, dashboard_port=0)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in cluster.variables.items():
                if name.startswith("AWS_"):
                    patch.setenv(name, value)
            fs = s3fs.S3FileSystem(skip_instance_cache=True)
            fs.mkdir("bucket")
            fs.put(str(folder / "tiny-vlm"), "bucket/tiny-vlm", recursive=True)
            fs.put(str(drawn), "bucket/drawn", recursive=True)
            shutil.rmtree(folder / "tiny-vlm")
            yield Running(cluster, folder)
    finally:
        local.down(NAME)


PIPELINE = ("python", "jobs/pipeline.py", "--source", "s3://bucket/drawn", "--recipe", RECIPE.name)


@pytest.fixture(scope="module")
def finished(running: Running) -> tuple[str, str]:
    """The output of the pipeline's job, with secrets that it does not need, and of another one of the same name that
    came while the first one worked."""
    assert running.alive() == (0, 0)
    secrets = {"OPENAI_API_KEY": PLANTED, "WANDB_API_KEY": PLANTED}
    first = running.submit(*PIPELINE, "--data", "s3://bucket/data", job="first", secrets=secrets)
    watching = threading.Thread(target=running.watch, args=(first,))
    watching.start()
    deadline = time.monotonic() + 120
    while running.alive() == (0, 0):  # the first node comes for ingest, which holds the name
        assert time.monotonic() < deadline
        time.sleep(0.5)
    second = running.submit(*PIPELINE, "--data", "s3://bucket/data", job="second")
    refused = finish(second, 600, expect=1)
    output = finish(first, 1200)
    watching.join()
    return output, refused


def test_nodes_come_for_the_work_and_go_when_it_is_done(running: Running, finished: tuple[str, str]) -> None:
    assert max(gpus for _, gpus in running.nodes) == 2  # for training
    assert max(cpus for cpus, _ in running.nodes) >= 1
    deadline = time.monotonic() + 120
    while running.alive() != (0, 0):
        assert time.monotonic() < deadline, running.alive()
        time.sleep(1)


def test_of_two_submissions_of_one_name_one_works_and_the_other_says_who_does(finished: tuple[str, str]) -> None:
    output, refused = finished
    assert "error: pipeline-ceca is held by first (process" in refused, refused[-3000:]
    assert "since 20" in refused
    assert "s3://bucket/data/gallery" in output


def test_the_same_name_again_finds_everything_published(running: Running, finished: tuple[str, str]) -> None:
    again = running.submit(*PIPELINE, "--data", "s3://bucket/data")
    output = finish(again, 600)
    for table in ("images", "dialogues", "gallery"):
        assert "is published already" in next(
            line for line in output.splitlines() if f"s3://bucket/data/{table}" in line
        )
    assert "models/ceca is published already" in output


def test_no_secret_is_in_logs_tables_or_what_the_dashboard_shows(running: Running, finished: tuple[str, str]) -> None:
    folder = Path(running.cluster.folder)
    secrets = {PLANTED.encode(), running.cluster.variables["AWS_SECRET_ACCESS_KEY"].encode()}
    logs = [path for path in (folder / "ray").rglob("*") if path.is_file() and "logs" in path.parts]
    assert any(b"ceca" in path.read_bytes() for path in logs)
    stored = [path for path in (folder / "s3" / "bucket" / "data").rglob("*") if path.is_file()]
    assert any(path.name == "manifest.json" for path in stored)
    for path in [*logs, *stored]:
        assert not any(secret in path.read_bytes() for secret in secrets), path
    shown = json.dumps(running.get("/api/jobs/", BROWSER)).encode()
    assert b"OPENAI_API_KEY" in shown
    assert not any(secret in shown or secret in text.encode() for secret in secrets for text in finished)


@pytest.mark.long
def test_the_service_runs_on_such_nodes_and_a_real_vllm_describes_an_added_image(
    running: Running, finished: tuple[str, str], drawn: Path
) -> None:
    port, serve = free_port(), Path(sys.executable).parent / "serve"
    picture = io.BytesIO()
    Image.open(next(drawn.rglob("*.jpg"))).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(picture, "JPEG")
    arguments = ("data=s3://bucket/data", "open=true", "gpus=0.5", "shrink_s=5")  # encoder and searcher share one
    arguments += ("engine_model=s3://bucket/tiny-vlm",)
    for command in (
        ("start", "--http-host", "127.0.0.1", "--http-port", port),
        ("run", "--non-blocking", "--name", "people", "serve.app:build", *arguments),
    ):
        done = subprocess.Popen(
            [serve, *map(str, command)],
            cwd=REPOSITORY,
            env=running.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        finish(done, 200)
    try:
        with Client(f"http://127.0.0.1:{port}", timeout_s=120, job_timeout_s=240) as client:
            client.ready()
            assert running.alive()[1] == 1  # none for an engine that nobody needs
            image_id = client.add(picture.getvalue()).image_id
            found = {hit.image_id: hit for hit in client.search("a man in a yellow cap", 200).hits}
        assert running.alive()[1] == 2
        assert image_id in found
        (added,) = find_edition(Store("s3://bucket/data")).read_added(["image_id", "turns", "dialogue_model"])
        (told,) = added.to_pylist()
        assert (told["image_id"], told["dialogue_model"]) == (image_id, "s3://bucket/tiny-vlm")
        assert told["turns"]
        assert all(turn["answer"] for turn in told["turns"])
        deadline = time.monotonic() + 120
        while running.alive()[1] != 1:  # the engine goes, and its node
            assert time.monotonic() < deadline, running.alive()
            time.sleep(1)
    finally:
        subprocess.run([serve, "shutdown", "--yes"], env=running.environment, check=True, timeout=120)


@pytest.mark.long
def test_the_result_is_that_of_one_machine(running: Running, finished: tuple[str, str], tmp_path: Path) -> None:
    """The same commands with the same settings, but for declared GPUs, on a Ray that the command starts itself."""
    alone = tmp_path / "alone.yaml"
    alone.write_text(
        RECIPE.read_text().replace("gpus: 1", "gpus: 0").replace("gpus_per_worker: 1", "gpus_per_worker: 0")
    )
    command = [
        sys.executable,
        "jobs/pipeline.py",
        *PIPELINE[2:4],
        "--recipe",
        str(alone),
        "--data",
        str(tmp_path / "d"),
    ]
    names = ("RAY_ADDRESS", "CECA_DECLARED_GPUS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")
    environment = {name: value for name, value in running.environment.items() if name not in names}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    here, there = Store(str(tmp_path / "d")), Store("s3://bucket/data")
    for table, columns in (("images", None), ("captions", None), ("dialogues", ["image_id", "turns", "summary"])):
        assert here.read(here.current(table), columns).equals(there.read(there.current(table), columns)), table
    found = [store.read(store.current("gallery")) for store in (here, there)]
    assert found[0]["image_id"].equals(found[1]["image_id"])
    for name in ("global", "local"):
        rows = [np.stack(table[name].to_pylist()).astype(np.float32) for table in found]
        np.testing.assert_allclose(rows[0], rows[1], atol=5e-3)  # fp16, and sums in another order
