"""serve/service.yaml: what Ray and `build` read of it, and a service that is deployed from it and again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from ceca.config import ServeConfig
from ceca.data.store import Store
from ceca.settings import from_mapping
from cluster.object_store import free_port
from serve.app import build
from serve.client import Client
from serve.environment import ENVIRONMENT
from tests.serve.conftest import COUNT, ROOT
from tests.serve.dataset import QUERY

FILE = ROOT / "serve" / "service.yaml"


def test_ray_and_build_accept_the_file(people: Store, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = ServeDeploySchema.model_validate(yaml.safe_load(FILE.read_text()))
    (application,) = found.applications
    assert (application.name, application.route_prefix) == ("ceca-search", "/")
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    config = from_mapping(ServeConfig, {key: value for key, value in application.args.items() if key != "data"})
    assert config.keys
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"keys: [{{name: a, sha256: {'ab' * 32}, scopes: [search]}}]")
    assert build({**application.args, "data": people.uri, "keys": str(keys)})


def write_deployment(file: Path, data: str, port: int, **args: Any) -> None:
    """A copy of the file for this machine."""
    content = yaml.safe_load(FILE.read_text())
    content["http_options"] = {"host": "127.0.0.1", "port": port}
    content["applications"][0]["args"] |= {"data": data, "keys": None, "open": True, "replicas_per_node": None, **args}
    file.write_text(yaml.safe_dump(content))


def processes_of(folder: str) -> list[psutil.Process]:
    """Those of the Ray whose temporary folder this is."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(folder in word for word in process.info["cmdline"] or ())
    ]


@contextmanager
def ray_head(environment: dict[str, str]) -> Iterator[str]:
    """The dashboard's address of a Ray that is started as on a cluster; its folder's path is short, for sockets."""
    folder = tempfile.mkdtemp(prefix="ceca-", dir="/tmp")
    dashboard = free_port()
    ports = {"port": free_port(), "dashboard-port": dashboard, "dashboard-agent-listen-port": free_port()}
    options = [f"--{name}={port}" for name, port in {**ports, "ray-client-server-port": free_port()}.items()]
    command = [f"{Path(sys.executable).parent}/ray", "start", "--head", "--block", "--num-cpus=16", *options]
    head = subprocess.Popen(
        [*command, f"--temp-dir={folder}", "--node-ip-address=127.0.0.1", "--disable-usage-stats"],
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    try:
        until(lambda: httpx.get(f"http://127.0.0.1:{dashboard}/api/version").status_code == 200, 60, head)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        head.send_signal(signal.SIGTERM)
        try:
            head.wait(30)
            deadline = time.monotonic() + 20
            while (left := processes_of(folder)) and time.monotonic() < deadline:
                time.sleep(0.2)
            assert not left, left
        finally:
            for process in processes_of(folder):
                process.kill()
            head.kill()
            shutil.rmtree(folder, ignore_errors=True)


def until(condition: Any, seconds: float, head: subprocess.Popen | None = None) -> None:
    deadline = time.monotonic() + seconds
    while True:
        try:
            if condition():
                return
        except httpx.TransportError:
            pass
        assert head is None or head.poll() is None, "ray start ended"
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
def test_serve_deploy_starts_the_service_and_changes_it_while_it_is_asked(people: Store, tmp_path: Path) -> None:
    """From one share of the gallery to two: every answer on the way holds the whole gallery, each image once."""
    names = ("RAY_ADDRESS", "RAY_AUTH_MODE", *ENVIRONMENT)
    environment = {name: value for name, value in os.environ.items() if name not in names}
    environment |= {"RAY_AUTH_MODE": "disabled", **ENVIRONMENT}
    environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # nothing moves from the only node
    file, port = tmp_path / "service.yaml", free_port()
    few = {"search_replicas": 1, "encoder_replicas": 1, "search_replicas_max": None, "encoder_replicas_max": None}

    def deploy(dashboard: str, shards: int) -> None:
        write_deployment(file, people.uri, port, shards=shards, **few)
        command = [f"{Path(sys.executable).parent}/serve", "deploy", str(file), "-a", dashboard]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr

    def state(dashboard: str) -> dict[str, Any]:
        found = httpx.get(f"{dashboard}/api/serve/applications/").json()["applications"]["ceca-search"]
        assert found["status"] != "DEPLOY_FAILED", found["message"]
        return found

    with ray_head(environment) as dashboard, Client(f"http://127.0.0.1:{port}", timeout_s=120) as client:
        deploy(dashboard, shards=1)
        until(lambda: state(dashboard)["status"] == "RUNNING", 240)
        assert client.ready().images == COUNT - 1
        expected = [hit.image_id for hit in client.search(QUERY, COUNT).hits]
        assert len(expected) == COUNT - 1

        stop, answers = threading.Event(), []

        def ask() -> None:
            while not stop.is_set():
                answers.append([hit.image_id for hit in client.search(QUERY, COUNT).hits])

        with ThreadPoolExecutor(3) as asking:
            askers = [asking.submit(ask) for _ in range(3)]
            try:
                deploy(dashboard, shards=2)
                until(lambda: "GallerySearch1" in state(dashboard)["deployments"], 60)
                until(lambda: state(dashboard)["status"] == "RUNNING", 240)
                time.sleep(1)
            finally:
                stop.set()
            for asker in askers:
                asker.result()  # none was refused
        wrong = [answer for answer in answers if answer != expected]
        assert not wrong, f"{len(wrong)} of {len(answers)} answers, e.g. of {len(wrong[0])} images"
        assert [hit.image_id for hit in client.search(QUERY, COUNT).hits] == expected
