"""Starting the service from the command line, and what is refused before anything is deployed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import httpx
import pytest
from ray import serve as ray_serve

from ceca.data.store import Store
from ceca.errors import UserError
from cluster.object_store import free_port
from serve.app import build
from tests.serve.conftest import ROOT
from tests.serve.dataset import QUERY, publish_tiny


def start(data: str, *options: str, **variables: str) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | variables
    command = [sys.executable, "-m", "serve", "--data", data, *options]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize("module", ["serve", "serve.access"])
def test_help_imports_neither_ray_nor_torch(module: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['{module}', '--help']\n"
        f"try: runpy.run_module('{module}', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print(*sorted(sys.modules), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python -m {module}")
    loaded = set(done.stderr.split())
    assert "tyro" in loaded
    assert not {"ray", "torch", "pyarrow", "fastapi"} & loaded


def test_no_gallery_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    process = start(str(tmp_path))
    out, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out == ""
    assert error.startswith("error: no table 'gallery'")
    assert "index" in error
    assert error.count("\n") == 1


def test_what_cannot_be_served_is_found_before_anything_is_deployed(people: Store, tmp_path: Path) -> None:
    publish_tiny(people, "other", seed=2)
    with pytest.raises(UserError, match="the gallery was made by model"):
        build({"data": people.uri, "model": "other", "open": True})
    with pytest.raises(UserError, match=r"no published model 'absent'.*there: other, tiny"):
        build({"data": people.uri, "model": "absent", "open": True})
    with pytest.raises(UserError, match="needs keys=FILE"):
        build({"data": people.uri})
    with pytest.raises(UserError, match="needs data=URI"):
        build({})
    with pytest.raises(UserError, match="http_options"):
        build({"data": people.uri, "port": "8001"})
    with pytest.raises(UserError, match="unknown key 'omg'"):
        build({"data": people.uri, "omg": "0.5"})
    with pytest.raises(UserError, match="omega"):
        build({"data": people.uri, "omega": "1.5"})


def test_build_reads_strings_as_the_command_line_gives_them(people: Store) -> None:
    built = build({"data": people.uri, "omega": "0.5", "batch": "8", "recipe": "tiny", "open": "true"})
    assert isinstance(built, ray_serve.Application)


@pytest.mark.slow
def test_command_serves_until_it_is_interrupted(people: Store) -> None:
    """Also where a cluster that is gone has left its address."""
    port, folder = free_port(), Path(tempfile.mkdtemp(prefix="ceca-"))  # short: Ray's sockets lie below
    (folder / "ray").mkdir()
    (folder / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{free_port()}")
    process = start(people.uri, "--port", str(port), RAY_TMPDIR=str(folder))
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(3)]
        assert lines[1] == f"http://127.0.0.1:{port}", process.communicate(timeout=5)[1]
        assert lines[2].startswith("for Prometheus: http://")
        answer = httpx.post(f"{lines[1]}/v1/search", json={"query": QUERY}, timeout=30)
        assert len(answer.json()["hits"]) == 10
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=30)
        assert process.returncode == 0
        assert out.strip() == "stopping"
        assert "Traceback" not in error
    finally:
        process.kill()
        shutil.rmtree(folder, ignore_errors=True)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/healthz")


def test_taken_port_is_one_line_and_exit_code_2(people: Store) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = start(people.uri, "--port", str(taken.getsockname()[1]))
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.startswith("error: cannot listen on 127.0.0.1")


def test_others_are_not_let_in_by_mistake(people: Store) -> None:
    process = start(people.uri, "--host", "0.0.0.0")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.startswith("error: others can reach 0.0.0.0, and this searches for people: give --keys FILE")
