"""A cluster on this machine: it starts with a head, says what is wrong, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from ceca import settings
from cluster import local
from cluster.processes import MARK_FILE, processes_of
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


def test_a_cluster_has_a_name_like_a_model() -> None:
    assert local.NAME == settings.NAME
    for name in ("../../escaped", "a/b", "..", "", "-x"):
        with pytest.raises(local.ClusterError, match="cannot be a name"):
            local.folder_of(name)
    done = ceca_cluster("down", "--name=../../escaped")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: '../../escaped' cannot be a name")
    with pytest.raises(local.ClusterError, match="shorter --name"):
        local.folder_of("x" * 64)


def test_a_cluster_has_a_short_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 95)))
    assert local.folder_of("short") == Path(f"/tmp/ceca-{os.getuid()}-short")


@pytest.mark.parametrize("kind", ["link", "open", "file", "another's"])
def test_a_folder_that_somebody_else_has_made_is_no_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(local, "FOLDER_BYTES", 1000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder, elsewhere = local.folder_of("x"), tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    (elsewhere / "cluster.json").write_text('{"folder": "", "dashboard": "", "variables": {}}')
    if kind == "link":
        folder.symlink_to(elsewhere)
    elif kind == "file":
        folder.touch()
    else:
        shutil.copytree(elsewhere, folder)
        folder.chmod(0o777 if kind == "open" else 0o700)
    if kind == "another's":
        if os.getuid():
            pytest.skip("only root can give a folder away")
        os.chown(folder, 12345, 12345)
    for command in (local.up, local.down, local.find, local.kill_head):
        with pytest.raises(local.ClusterError, match="is not a folder of this user alone"):
            command("x")
    assert (elsewhere / "cluster.json").exists()


def test_down_ends_what_the_cluster_started_and_no_bystander(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "FOLDER_BYTES", 1000)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = local.folder_of("x")
    folder.mkdir(mode=0o700)
    (folder / MARK_FILE).write_text("0123")
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    parent = [sys.executable, "-c", f"import subprocess; subprocess.run({sleep}, env={{}})"]

    def start(command: list[str], *words: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen([*command, *words], cwd=folder, env={**os.environ, **environment})

    bystanders = [
        start(sleep, str(folder)),
        start(sleep, f"--log={folder}/start.log", "0123"),
        start(sleep, CECA_LOCAL_CLUSTER=str(folder)),
        start(sleep, CECA_LOCAL_CLUSTER=""),
    ]
    own = start(parent, CECA_LOCAL_CLUSTER="0123")
    try:
        while not (children := psutil.Process(own.pid).children()):
            time.sleep(0.02)
        assert {process.pid for process in processes_of(folder)} == {own.pid, children[0].pid}
        assert local.down("x") == 2
        assert not folder.exists()
        assert not children[0].is_running()
        assert all(process.poll() is None for process in bystanders)
        assert local.down("x") == 0
    finally:
        for process in (own, *bystanders):
            process.kill()
            process.wait()


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


@pytest.mark.slow
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
