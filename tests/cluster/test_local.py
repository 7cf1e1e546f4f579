"""A cluster on this machine: it starts with a head, says what is wrong, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from cluster import local
from cluster.processes import processes_of
from serve.environment import ENVIRONMENT
from tests.conftest import REPOSITORY

NAME = "test"


@pytest.fixture(scope="module")
def cluster() -> Iterator[local.Cluster]:
    local.down(NAME)
    try:
        yield local.up(NAME, nodes=2, gpus=1, dashboard_port=0)
    finally:
        local.down(NAME)


def ceca_cluster(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs.cli", "cluster", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("module", ["cluster.local", "cluster.object_store"])
def test_help_imports_neither_ray_nor_torch(module: str) -> None:
    """Run the module in a process of its own and look at what it has imported when it exits."""
    script = (
        "import runpy, sys\n"
        "sys.argv = ['-m', '--help']\n"
        f"try: runpy.run_module({module!r}, run_name='__main__')\n"
        "except SystemExit as exit: print('exit', exit.code, sorted({'ray', 'torch', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "usage:" in done.stdout
    assert done.stdout.endswith("exit 0 []\n")


def test_nodes_have_the_environment_that_serving_needs() -> None:
    assert local.SERVING == ENVIRONMENT


def test_the_script_holds_what_finds_the_cluster_and_only_its_owner_reads_it(cluster: local.Cluster) -> None:
    shown = subprocess.run(
        ["bash", "-c", f"source {cluster.script} && env"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name, value in cluster.variables.items():
        assert f"{name}={value}" in shown
    assert cluster.variables["CECA_DECLARED_GPUS"] == "1"
    assert cluster.script.stat().st_mode & 0o077 == 0
    assert cluster.script.parent.stat().st_mode & 0o077 == 0
    assert local.find(NAME) == cluster


def test_no_list_of_processes_shows_its_keys(cluster: local.Cluster) -> None:
    secrets = [cluster.variables["AWS_SECRET_ACCESS_KEY"], Path(cluster.variables["RAY_AUTH_TOKEN_PATH"]).read_text()]
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or ())
        assert not any(secret in words for secret in secrets), process


def test_status_shows_the_head_alone(cluster: local.Cluster) -> None:
    done = ceca_cluster("status", "--name", NAME)
    assert "ray.head.default" in done.stdout or "Active" in done.stdout, done.stdout + done.stderr
    assert "(no pending nodes)" in done.stdout


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="Prometheus is not installed")
def test_prometheus_reads_what_the_nodes_measure(cluster: local.Cluster) -> None:
    query = (Path(cluster.folder) / "prometheus.url").read_text() + "/api/v1/query?query=ray_node_mem_total"
    deadline = time.monotonic() + 60
    while True:
        with contextlib.suppress(httpx.TransportError, ValueError):  # until it listens and has begun
            if series := httpx.get(query).json()["data"]["result"]:
                break
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert float(series[0]["value"][1]) > 0


def test_one_that_runs_is_not_started_again_and_a_taken_port_is_named(cluster: local.Cluster) -> None:
    with pytest.raises(local.ClusterError, match="runs already; end it with `down --name test`"):
        local.up(NAME)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = ceca_cluster("up", "--name", "other", "--dashboard-port", str(port))
    assert done.returncode == 2
    assert f"error: port {port} is taken" in done.stderr
    assert not local.folder_of("other").exists()
    with pytest.raises(local.ClusterError, match="3 nodes with a GPU are more than 2 nodes"):
        local.up("other", nodes=2, gpus=3)


def test_down_leaves_no_process_and_no_folder() -> None:
    name = "short"
    cluster = local.up(name, dashboard_port=0)
    assert len(processes_of(local.folder_of(name))) > 5
    done = ceca_cluster("down", "--name", name)
    assert "processes ended" in done.stdout
    assert not any(
        cluster.folder in " ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])
    )
    assert not local.folder_of(name).exists()
    assert "no cluster 'short' runs" in ceca_cluster("down", "--name", name).stdout
    assert "no cluster 'short' runs" in ceca_cluster("status", "--name", name).stderr
