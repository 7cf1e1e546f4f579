"""Training loses a worker, a node, its driver, or finds another number of workers, and its loss curve stays.

A cluster of its own: a head without workers and three nodes with room for one worker each. The curve is that of the
undisturbed pipeline, which trained on two workers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from ceca.data.store import Store
from ceca.model.registry import find_model
from tests.conftest import REPOSITORY, finish, own_processes
from tests.drills.conftest import RECIPE

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

# Checkpoints within epochs; a worker fills its node.
TRAIN = ("--recipe", RECIPE, "--checkpoint-every", 2, "--cpus-per-worker", 2)
STEPS = 15  # three epochs of five
# Another number of workers adds gradients in another order, and Adam magnifies the rounding of gradients near zero. The
# difference depends on the step at which a run was interrupted; a lost or repeated sample changes losses by percents.
OTHER_ORDER = 1e-3


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for _ in range(3):
        made.add_node(num_cpus=3)
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def start(cluster) -> Callable[..., subprocess.Popen]:
    def command(stage: str, *arguments: object) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, f"jobs/{stage}.py", *map(str, arguments)],
            cwd=REPOSITORY,
            env={**os.environ, "RAY_ADDRESS": cluster.address, "COLUMNS": "200"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return command


@pytest.fixture
def dataset(undisturbed: Store, tmp_path: Path) -> Path:
    """The undisturbed dataset without a model."""
    shutil.copytree(undisturbed.root, tmp_path / "data", ignore=shutil.ignore_patterns("models"))
    return tmp_path / "data"


def curve(data: Path, steps: int = STEPS) -> dict[str, np.ndarray]:
    model = find_model(Store(str(data)), "ceca")
    assert model is not None
    table = pq.read_table(data / "models" / "ceca" / model.digest / "curve.parquet")
    assert table["step"].to_pylist() == list(range(1, steps + 1))
    return {column: table[column].to_numpy() for column in ("loss", "tal_global", "tal_local", "cawl")}


def assert_same_curve(data: Path, undisturbed: Store, tolerance: float) -> None:
    found, expected = curve(data), curve(Path(undisturbed.root))
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=tolerance, err_msg=name)


def variances(data: Path) -> dict[str, torch.Tensor]:
    """The statistics of the batch normalisation; its means follow a bias whose gradient is rounding alone."""
    model = find_model(Store(str(data)), "ceca")
    assert model is not None
    weights = load_file(data / "models" / "ceca" / model.digest / "model.safetensors")
    return {name: value for name, value in weights.items() if "running_var" in name}


def checkpoints(data: Path) -> int:
    """How many checkpoints Ray Train counts as whole."""
    for snapshot in data.glob("models/ceca/run-*/checkpoint_manager_snapshot.json"):
        try:
            return len(json.loads(snapshot.read_text())["checkpoint_results"])
        except (ValueError, FileNotFoundError):
            return 0
    return 0


def wait_for_a_checkpoint(data: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 400
    while checkpoints(data) == 0:
        assert process.poll() is None, process.communicate()[0][-5000:]
        assert time.monotonic() < deadline, "training does not get so far"
        time.sleep(0.02)


def training_workers() -> list[psutil.Process]:
    return sorted(own_processes("RayTrainWorker"), key=lambda process: process.pid)


@pytest.mark.long
def test_a_killed_worker_is_replaced_and_training_goes_on_from_its_checkpoint(start, undisturbed, dataset):
    process = start("train", *TRAIN, "--data", dataset)
    wait_for_a_checkpoint(dataset, process)
    training_workers()[-1].send_signal(signal.SIGKILL)
    output = finish(process)
    assert re.search(r"ceca: resuming after (step \d of )?epoch \d", output)
    assert_same_curve(dataset, undisturbed, 1e-6)


@pytest.mark.long
def test_a_killed_node_is_replaced_by_another(cluster, start, undisturbed, dataset):
    process = start("train", *TRAIN, "--data", dataset)
    wait_for_a_checkpoint(dataset, process)
    output = finish_without_a_node(cluster, process)
    assert "ceca: resuming after" in output
    assert_same_curve(dataset, undisturbed, 1e-6)


def finish_without_a_node(cluster: Any, process: subprocess.Popen[str]) -> str:
    """Take the node of the last training worker away, and return what the command says until its end."""
    cluster.remove_node(node_with(cluster, training_workers()[-1]), allow_graceful=False)
    try:
        return finish(process)
    finally:
        cluster.add_node(num_cpus=3)


def node_with(cluster: Any, worker: psutil.Process) -> Any:
    """The node on which a worker runs: its raylet is the worker's parent."""
    raylet = worker.ppid()
    found = [node for node in cluster.worker_nodes if node.all_processes["raylet"][0].process.pid == raylet]
    assert len(found) == 1
    return found[0]


def kill_the_driver(start, dataset: Path, *settings: object) -> None:
    before = find_model(Store(str(dataset)), "ceca")
    process = start("train", *TRAIN, *settings, "--data", dataset)
    wait_for_a_checkpoint(dataset, process)
    process.send_signal(signal.SIGKILL)
    finish(process, 60, expect=-signal.SIGKILL)
    assert find_model(Store(str(dataset)), "ceca") == before


def test_a_killed_driver_started_again_ends_with_the_same_model(start, undisturbed, dataset):
    kill_the_driver(start, dataset)
    assert "ceca: resuming after" in finish(start("train", *TRAIN, "--data", dataset))
    assert_same_curve(dataset, undisturbed, 1e-6)
    made, expected = find_model(Store(str(dataset)), "ceca"), find_model(undisturbed, "ceca")
    assert made.digest == expected.digest
    assert [record["epoch"] for record in made.training["history"]] == [1, 2, 3]


@pytest.mark.long
def test_a_killed_redo_goes_on_and_the_next_one_begins_anew(start, undisturbed, tmp_path):
    dataset = tmp_path / "data"
    shutil.copytree(undisturbed.root, dataset)  # with a model
    kill_the_driver(start, dataset, "--redo")
    assert "ceca: resuming after" in finish(start("train", *TRAIN, "--redo", "--data", dataset))
    assert "ceca: resuming after" not in finish(start("train", *TRAIN, "--redo", "--data", dataset))
    assert_same_curve(dataset, undisturbed, 1e-6)


@pytest.mark.long
def test_an_interrupted_driver_says_so_leaves_its_workers_behind_and_may_be_started_again(start, undisturbed, dataset):
    process = start("train", *TRAIN, "--data", dataset)
    wait_for_a_checkpoint(dataset, process)
    process.send_signal(signal.SIGINT)
    output = finish(process, 60, expect=130)
    assert "interrupted; the same command continues" in output
    assert "ceca: resuming after" in finish(start("train", *TRAIN, "--data", dataset))
    assert_same_curve(dataset, undisturbed, 1e-6)


@pytest.mark.long
@pytest.mark.parametrize(
    ("workers", "stage"),
    [(1, 1), (3, 0), (3, 1), (1, 3)],
)
def test_a_run_begun_on_two_workers_ends_on_another_number(start, undisturbed, dataset, workers: int, stage: int):
    settings = ("--zero-stage", stage)
    kill_the_driver(start, dataset, *settings)
    output = finish(start("train", *TRAIN, *settings, "--workers", workers, "--data", dataset))
    assert f"from 2 workers to {workers}" in output
    assert_same_curve(dataset, undisturbed, OTHER_ORDER)
    torch.testing.assert_close(variances(dataset), variances(Path(undisturbed.root)), rtol=1e-4, atol=0)


@pytest.mark.long
def test_a_divided_run_goes_on_with_its_division_on_another_number_of_workers(start, dataset, tmp_path):
    """Of 84 pairs an epoch's sixth batch has four; the pairs called noisy are the same after the interruption."""
    settings = ("--division", "consensus", "--last-batch", "keep")
    whole = tmp_path / "whole"
    shutil.copytree(dataset, whole)
    finish(start("train", *TRAIN, *settings, "--data", whole))
    kill_the_driver(start, dataset, *settings)
    output = finish(start("train", *TRAIN, *settings, "--workers", 3, "--data", dataset))
    assert "from 2 workers to 3" in output
    found, expected = curve(dataset, steps=18), curve(whole, steps=18)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=OTHER_ORDER, err_msg=name)
    shares = [
        [record["clean"] for record in find_model(Store(str(data)), "ceca").training["history"]]  # type: ignore[union-attr]
        for data in (dataset, whole)
    ]
    assert shares[0] == shares[1]
    assert all(0 < share < 1 for share in shares[0])


@pytest.mark.long
def test_a_loss_that_is_no_number_ends_the_training_with_its_step(start, dataset):
    output = finish(start("train", *TRAIN, "--optimiser.learning-rate", 1e30, "--data", dataset), expect=2)
    words = " ".join(output.split())
    assert re.search(r"error: the loss is not a number from step \d+ on \(.*tal_global", words)
    assert "Traceback" not in output


@pytest.mark.long
def test_an_elastic_run_goes_on_with_the_workers_that_are_left(cluster, start, undisturbed, dataset):
    process = start("train", *TRAIN, "--workers", 3, "--workers-min", 2, "--data", dataset)
    wait_for_a_checkpoint(dataset, process)
    output = finish_without_a_node(cluster, process)
    assert "from 3 workers to 2" in output
    assert_same_curve(dataset, undisturbed, OTHER_ORDER)
