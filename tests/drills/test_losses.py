"""A pipeline whose nodes, or whose whole cluster, are lost in every one of its stages ends with the same result."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ceca.data.store import Store
from cluster import local
from tests.conftest import REPOSITORY, finish
from tests.drills.conftest import AT_WORK, RECIPE, assert_same, result, submit, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

NAME = "losses"


class Cloud:
    """A cluster that can be lost and started again over the same object store, and a folder to submit from."""

    def __init__(self, folder: Path, drawn: Path):
        self.folder, self.store = folder, folder / "s3"
        for package in ("ceca", "jobs"):
            shutil.copytree(
                REPOSITORY / package, folder / "code" / package, ignore=shutil.ignore_patterns("__pycache__")
            )
        shutil.copy(REPOSITORY / RECIPE, folder / "code")
        (self.store / "bucket").mkdir(parents=True)
        shutil.copytree(drawn, self.store / "bucket" / "drawn")
        self.start()

    def start(self) -> None:
        local.down(NAME)
        self.cluster = local.up(NAME, nodes=3, idle_minutes=0.5, dashboard_port=0, store=self.store)

    def submit(self, data: str) -> subprocess.Popen[str]:
        command = ["python", "jobs/pipeline.py", "--source", "s3://bucket/drawn", "--recipe", Path(RECIPE).name]
        environment = {**os.environ, **self.cluster.variables, "COLUMNS": "200"}
        return submit(self.folder / "code", environment, "--working-dir", ".", "--", *command, "--data", data)

    def wait_for(self, stage: str, data: str, job: subprocess.Popen[str]) -> None:
        wait_for(stage, self.store / data.removeprefix("s3://"), job)  # the S3 server's folder: no request

    def result(self, data: str) -> dict:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.cluster.variables.items():
                patch.setenv(name, value)
            return result(Store(data))


@pytest.fixture(scope="module")
def cloud(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    made = Cloud(tmp_path_factory.mktemp("cloud"), drawn)
    try:
        yield made
    finally:
        local.down(NAME)


def timed(words: str, work: Callable[[], object]) -> None:
    begun = time.monotonic()
    work()
    print(f"{words}: {time.monotonic() - begun:.0f} s")


def test_a_node_is_lost_in_every_stage(cloud: Cloud, undisturbed: Store) -> None:
    data = "s3://bucket/nodes"

    def work() -> None:
        job = cloud.submit(data)
        for stage in AT_WORK:
            cloud.wait_for(stage, data, job)
            assert local.kill_node(NAME)
        finish(job, 1000)

    timed("a node lost in every stage", work)
    assert_same(cloud.result(data), result(undisturbed))


@pytest.mark.long
def test_the_head_and_with_it_the_cluster_is_lost_in_every_stage(cloud: Cloud, undisturbed: Store) -> None:
    data = "s3://bucket/heads"

    def work() -> None:
        for stage in AT_WORK:
            job = cloud.submit(data)
            cloud.wait_for(stage, data, job)
            local.kill_head(NAME)
            job.kill()  # it would ask for the head's state for long
            job.communicate()
            cloud.start()
        finish(cloud.submit(data), 1000)

    timed("the head lost in every stage", work)
    assert_same(cloud.result(data), result(undisturbed))
