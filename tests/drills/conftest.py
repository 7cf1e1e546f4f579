"""What an undisturbed pipeline comes to, with which those in trouble are compared."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml

from ceca.data.store import Store
from ceca.model.registry import find_model
from tests.conftest import REPOSITORY

RECIPE = "tests/drills/oracle.yaml"
# A sign that each stage is at work, and has not finished: these are below the dataset.
AT_WORK = {
    "ingest": ".work/ingest",
    "dialogue": ".work/dialogue",
    "train": "models/ceca",
    "evaluate": ".work/evaluate",
    "index": ".work/index",
}
TABLES = ("images", "captions", "attributes", "dialogues")


class Demo(NamedTuple):
    """A demo that has been run: its folder, and what it said."""

    folder: Path
    said: str


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Run the demo with the same people as `drawn`, and the recipe of the drills."""
    folder = tmp_path_factory.mktemp("demo")
    few = folder / "few.yaml"
    drawn = {"seed": 7, "identities": 24, "images_per_identity": 3, "split_identities": [14, 4, 6], "workers": 1}
    few.write_text(yaml.safe_dump({"draw": drawn}))
    command = [sys.executable, "-m", "jobs.cli", "demo", "--folder", folder / "demo", "--recipe", f"{RECIPE}+{few}"]
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=560, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return Demo(folder / "demo", done.stderr)


@pytest.fixture(scope="session")
def undisturbed(demo: Demo) -> Store:
    """The dataset of the demo: its pipeline was not disturbed."""
    return Store(str(demo.folder / "data"))


def submit(folder: Path, environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    """`ray job submit` from a folder, its output in one stream."""
    return subprocess.Popen(
        [Path(sys.executable).parent / "ray", "job", "submit", *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for(stage: str, dataset: Path, job: subprocess.Popen) -> None:
    """Until the stage has done some of its work."""
    place = dataset / AT_WORK[stage]
    deadline = time.monotonic() + 400
    while not any(path.is_file() for path in place.rglob("*")):
        assert job.poll() is None, f"ended before {stage}: {(job.communicate()[0] or '')[-4000:]}"
        assert time.monotonic() < deadline, stage
        time.sleep(0.02)


def result(store: Store) -> dict[str, Any]:
    """What a pipeline comes to: digests of tables, the weights, figures, and embeddings by image."""
    model = find_model(store, "ceca")
    assert model is not None
    gallery = store.read(store.current("gallery"))
    rows = [
        np.concatenate(pair) for pair in zip(*(gallery[name].to_pylist() for name in ("global", "local")), strict=True)
    ]
    return {
        "digests": {table: [part.sha256 for part in store.current(table).parts] for table in TABLES},
        "losses": [record["loss"] for record in model.training["history"]],
        "figures": store.read_json("evaluations", model.digest, "test.json")["metrics"],
        "gallery": dict(zip(gallery["image_id"].to_pylist(), rows, strict=True)),
    }


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["digests"] == expected["digests"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    for similarity, figures in expected["figures"].items():
        assert found["figures"][similarity] == pytest.approx(figures, abs=1e-3), similarity
    assert list(found["gallery"]) == list(expected["gallery"])
    for image_id, row in expected["gallery"].items():
        np.testing.assert_allclose(found["gallery"][image_id], row, atol=5e-3)
