"""The local S3 server keeps objects; what it refuses is in tests/ceca/data/test_store.py."""

from __future__ import annotations

import signal
import subprocess
import sys

import psutil
import pytest

from ceca.data.store import Store, StoreError
from cluster.object_store import free_port
from tests.conftest import REPOSITORY


def test_a_store_on_s3_reads_what_it_wrote(s3_environment):
    store = Store("s3://bucket/prefix")
    store.write_json({"a": 1}, "table", "manifest.json")
    assert store.read_json("table", "manifest.json") == {"a": 1}
    assert store.read_json("table", "other.json") is None
    store.remove("table")
    assert store.read_json("table", "manifest.json") is None


def test_a_process_may_change_its_endpoint_and_one_that_is_down_is_an_error_that_names_the_variable(
    s3_environment, monkeypatch
):
    Store("s3://bucket/prefix").write_json({"a": 1}, "manifest.json")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(StoreError, match="AWS_ENDPOINT_URL"):
            Store("s3://bucket/prefix").read_json("manifest.json")
    assert Store("s3://bucket/prefix").read_json("manifest.json") == {"a": 1}


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_the_command_takes_its_server_along(tmp_path, stop):
    command = [sys.executable, "-m", "cluster.object_store", "--folder", tmp_path / "s3", "--port", str(free_port())]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("# serving"):
        assert process.poll() is None
    (server,) = psutil.Process(process.pid).children()
    process.send_signal(stop)
    assert process.wait(20) == 0
    psutil.wait_procs([server], timeout=10)
    assert not server.is_running()
