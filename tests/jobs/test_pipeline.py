"""From a dataset to a gallery: on disk, on S3, by job submission, and with the trainer killed on the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ceca.gallery import Searcher
from ceca.model.weights import find_model, load_model
from ceca.store import Store
from tests.conftest import REPOSITORY
from tests.jobs.test_stages import SMALL, digests, kill_after_some_units

pytestmark = pytest.mark.timeout(600)


def prepare(run, drawn: Path, data: str, environment: dict[str, str] | None = None) -> None:
    run("ingest", "--recipe", "tiny", "--source", drawn, "--data", data, environment=environment)
    run("dialogue", "--recipe", "tiny", "--data", data, environment=environment)


def metrics(store: Store) -> dict[str, dict[str, float]]:
    model = find_model(store, "ceca")
    assert model is not None
    return store.read_json("evaluations", model.digest, "test.json")["metrics"]


@pytest.fixture(scope="module")
def on_disk(run, drawn, tmp_path_factory) -> Store:
    """The whole pipeline on disk, undisturbed."""
    data = tmp_path_factory.mktemp("data")
    prepare(run, drawn, str(data))
    run("train", *SMALL, "--data", data)
    run("evaluate", *SMALL, "--data", data)
    run("index", *SMALL, "--data", data)
    return Store(str(data))


def test_the_model_is_published_with_its_record(on_disk):
    model = find_model(on_disk, "ceca")
    assert model is not None
    assert [record["epoch"] for record in model.training["history"]] == [1, 2, 3]
    assert model.training["validation_split"] == "val"
    assert model.training["best"]["rank1"] == max(record["val_rank1"] for record in model.training["history"])
    assert model.config["train"]["global_batch"] == 16
    assert model.training["history"][-1]["loss"] < model.training["history"][0]["loss"]
    assert not on_disk.fs.exists(on_disk.path("models", "ceca", f"run-{model.version}"))


def test_evaluation_compares_every_similarity_with_chance(on_disk):
    found = metrics(on_disk)
    assert set(found) == {"global", "local", "fused", "chance"}
    assert 0 < found["fused"]["rank1"] <= 100


def test_a_search_finds_gallery_images_of_the_test_split(on_disk):
    hits = Searcher(on_disk).search("a woman in a red coat", omega=0.3, top_k=5)
    assert len(hits) == 5
    assert [hit.similarity for hit in hits] == sorted((hit.similarity for hit in hits), reverse=True)
    for hit in hits:
        fused = 0.7 * hit.global_similarity + 0.3 * hit.local_similarity
        assert hit.similarity == pytest.approx(fused, abs=2e-3)


def test_other_settings_under_a_published_name_are_refused(run, on_disk):
    failed = run("train", *SMALL, "--data", on_disk.uri, "--epochs", 4, expect=2)
    assert "epochs: 3 there, 4 here" in " ".join(failed.stdout.split())


def test_index_killed_and_started_again_ends_with_the_same_table(start, run, on_disk, tmp_path):
    shutil.copytree(on_disk.root, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "gallery")
    store = Store(str(tmp_path))
    kill_after_some_units(start, store, "index", *SMALL, "--data", tmp_path)
    assert store.manifest("gallery") is None
    assert "continuing" in run("index", *SMALL, "--data", tmp_path).stdout
    assert digests(store, "gallery") == digests(on_disk, "gallery")


@pytest.mark.slow
def test_training_in_bf16_with_partitioned_parameters_publishes_a_whole_model(run, on_disk, tmp_path):
    shutil.copytree(on_disk.root, tmp_path, dirs_exist_ok=True)
    settings = ("--name", "partitioned", "--epochs", 1, "--precision", "bf16", "--zero-stage", 3)
    run("train", *SMALL, "--data", tmp_path, *settings)
    model, published = load_model(Store(str(tmp_path)), "partitioned", torch.device("cpu"))
    other, _ = load_model(on_disk, "ceca", torch.device("cpu"))
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}
    (record,) = published.training["history"]
    assert record["loss"] == pytest.approx(find_model(on_disk, "ceca").training["history"][0]["loss"], rel=0.02)


def test_the_pipeline_on_s3_by_job_submission_gives_the_same_metrics(
    run, drawn, on_disk, s3, s3_environment, ray_cluster
):
    data, environment = "s3://bucket/dataset", s3.environment()
    prepare(run, drawn, data, environment)
    submitted = subprocess.run(
        [
            str(Path(sys.executable).parent / "ray"), "job", "submit",
            "--address", f"http://127.0.0.1:{ray_cluster.dashboard_port}",
            "--working-dir", ".", "--runtime-env-json", json.dumps({"env_vars": environment}),
            "--", sys.executable, "jobs/train.py", *SMALL, "--data", data,
        ],
        cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stdout[-5000:] + submitted.stderr[-3000:]
    run("evaluate", *SMALL, "--data", data, environment=environment)
    run("index", *SMALL, "--data", data, environment=environment)
    store = Store(data)
    assert metrics(store) == metrics(on_disk)
    assert digests(store, "gallery") == digests(on_disk, "gallery")
