"""A worker's machine has a full disk, or a wrong clock, in every stage: the result is that of an undisturbed run."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from ceca.data.store import Store
from tests.conftest import REPOSITORY
from tests.drills.conftest import AT_WORK, RECIPE, assert_same, result, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DISK = "256m"  # of a machine; its workers' logs, checkpoints and temporary files lie there
FULL_S = 10


@contextmanager
def cluster_of(*machines: dict[str, str], **parameters: Any) -> Iterator[dict[str, str]]:
    """The environment of commands on a head without work and a node with each of these environments."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for machine in machines:
            with mock.patch.dict(os.environ, machine):
                made.add_node(**parameters)
        yield {"RAY_ADDRESS": made.address}
    finally:
        made.shutdown()


class Disk:
    """A machine's own, which can be filled."""

    def __init__(self, place: Path):
        self.place, self.filler = place, place / "filler"

    def fill(self) -> None:
        with self.filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(2**16))
        assert not shutil.disk_usage(self.place).free

    def empty(self) -> None:
        self.filler.unlink(missing_ok=True)


@pytest.fixture
def disk() -> Iterator[Disk]:
    place = Path(tempfile.mkdtemp(prefix="ceca-"))  # short: Ray's sockets lie below
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "ceca", place], capture_output=True)
        if mounted.returncode:
            pytest.skip(f"a disk of its own cannot be mounted here: {mounted.stderr.decode().strip()}")
        try:
            yield Disk(place)
        finally:
            subprocess.run(["umount", "--lazy", place], check=True)
    finally:
        shutil.rmtree(place)


@pytest.mark.long
def test_a_workers_disk_is_full_in_every_stage(disk: Disk, drawn: Path, undisturbed: Store, tmp_path: Path) -> None:
    """Ray cannot start processes there, nor a worker write a checkpoint: the job waits until there is room again."""
    data, log = tmp_path / "data", tmp_path / "log"
    place = str(disk.place)
    with cluster_of({"TMPDIR": place}, num_cpus=6, temp_dir=place) as environment, log.open("w") as output:
        job = subprocess.Popen(
            [sys.executable, "jobs/pipeline.py", "--recipe", RECIPE, "--source", drawn, "--data", data],
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            for stage in AT_WORK:
                wait_for(stage, data, job)
                disk.fill()
                time.sleep(FULL_S)
                disk.empty()
            assert job.wait(300) == 0, log.read_text()[-6000:]
        finally:
            job.kill()
    assert_same(result(Store(str(data))), result(undisturbed))


# What time each node with CPUs says it is.
CLOCKS = """
import ray, time
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
ray.init(logging_level="error")
now = ray.remote(num_cpus=1)(lambda: time.time())
nodes = [node["NodeID"] for node in ray.nodes() if node["Resources"].get("CPU")]
print(*ray.get([now.options(scheduling_strategy=On(node, False)).remote() for node in nodes]))
"""


def clock(folder: Path, minutes: int) -> dict[str, str]:
    """The environment of a node on which Python's clock is wrong by so much: our code's, and that of the S3 client.

    Ray's C++ keeps the right time: what shifts a whole process's (libfaketime) misses some of its timers, so that
    it hangs for other reasons than a wrong clock.
    """
    folder.mkdir()
    wrong = f"time_machine.travel(datetime.timedelta(minutes={minutes}), tick=True).start()"
    (folder / "sitecustomize.py").write_text(f"import datetime, time_machine\n{wrong}\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


@pytest.mark.long
def test_the_workers_clocks_are_wrong(
    run: Callable[..., subprocess.CompletedProcess],
    drawn: Path,
    undisturbed: Store,
    s3_environment: None,
    tmp_path: Path,
) -> None:
    """By as much as S3 allows, for it looks at the time in every request."""
    data = "s3://bucket/wrong-clocks"
    with cluster_of(clock(tmp_path / "fast", 10), clock(tmp_path / "slow", -10), num_cpus=4) as environment:
        told = subprocess.run(
            [sys.executable, "-c", CLOCKS],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        now = time.time()
        assert sorted(round((float(line) - now) / 60) for line in told.stdout.split()) == [-10, 10]
        run("pipeline", "--recipe", RECIPE, "--source", drawn, "--data", data, environment=environment)
    assert_same(result(Store(data)), result(undisturbed))
