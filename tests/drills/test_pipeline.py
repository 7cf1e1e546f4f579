"""What the undisturbed pipeline comes to, what its reports show, and the same pipeline on S3."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ceca.data.store import Store
from ceca.data.tables import find_images
from ceca.errors import UserError
from ceca.model.registry import find_model
from ceca.model.weights import load_model
from ceca.search.searcher import Searcher
from jobs.index import SMALL_PARTS, CopiedRows, reuse
from jobs.reports.figures import (
    report_attributes,
    report_confidence,
    report_omega,
    report_ranked,
    report_significance,
)
from jobs.reports.page import report_page
from tests.conftest import REPOSITORY
from tests.drills.conftest import RECIPE
from tests.jobs.test_stages import digests

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SETTINGS = ("--recipe", RECIPE)


def prepare(run, drawn: Path, data: str, environment: dict[str, str] | None = None) -> None:
    run("ingest", "--recipe", "tiny", "--source", drawn, "--data", data, environment=environment)
    run("dialogue", "--recipe", "tiny", "--data", data, environment=environment)


def evaluated(store: Store) -> dict[str, Any]:
    model = find_model(store, "ceca")
    assert model is not None
    result: dict[str, Any] = store.read_json("evaluations", model.digest, "test.json")
    return result


def metrics(store: Store) -> dict[str, dict[str, float]]:
    return evaluated(store)["metrics"]


def test_the_model_is_published_with_its_record(undisturbed):
    model = find_model(undisturbed, "ceca")
    assert model is not None
    assert [record["epoch"] for record in model.training["history"]] == [1, 2, 3]
    assert model.training["validation_split"] == "val"
    assert model.training["best"]["rank1"] == max(record["val_rank1"] for record in model.training["history"])
    assert model.config["train"]["global_batch"] == 16
    assert model.training["history"][-1]["loss"] < model.training["history"][0]["loss"]
    assert not undisturbed.fs.exists(undisturbed.path("models", "ceca", f"run-{model.version}"))


def test_evaluation_compares_every_similarity_with_chance(undisturbed):
    found = metrics(undisturbed)
    assert set(found) == {"global", "local", "fused", "chance"}
    assert 0 < found["fused"]["rank1"] <= 100


def test_the_figures_of_every_query_lie_beside_the_means_that_they_make(undisturbed, drawn):
    model = find_model(undisturbed, "ceca")
    place = ("evaluations", model.digest, "test.queries.parquet")
    table = pq.read_table(pa.BufferReader(undisturbed.read_bytes(*place)))
    texts = {text for record in json.loads((drawn / "reid_raw.json").read_text()) for text in record["captions"]}
    assert set(table["text"].to_pylist()) <= texts
    for similarity, means in metrics(undisturbed).items():
        if similarity != "chance":
            for mean, column in (("rank1", "rank1"), ("mean_average_precision", "average_precision")):
                values = table[f"{similarity}_{column}"].to_numpy()
                assert 100 * values.mean() == pytest.approx(means[mean]), (similarity, mean)
    reverse = undisturbed.read_json("evaluations", model.digest, "test.json")["image_to_text"]
    assert set(reverse) == {"global", "local", "fused", "chance"}


def test_the_omega_curve_has_the_figures_of_an_evaluation_and_a_picture(undisturbed, tmp_path):
    for picture in ("omega.png", "omega.svg"):
        curve = report_omega(undisturbed.uri, ("ceca",), picture=tmp_path / picture)["ceca"]
        assert (tmp_path / picture).stat().st_size > 5000
    assert list(curve) == pytest.approx([step / 10 for step in range(11)])
    for omega, similarity in ((0.0, "global"), (0.3, "fused"), (1.0, "local")):
        found = metrics(undisturbed)[similarity]
        assert curve[omega] == pytest.approx((found["rank1"], found["rsum"]))


def test_the_picture_of_confidence_has_the_open_set_figures_of_an_evaluation(undisturbed, tmp_path):
    found = report_confidence(undisturbed.uri, ("ceca",), picture=tmp_path / "confidence.png")
    assert (tmp_path / "confidence.png").stat().st_size > 5000
    model = find_model(undisturbed, "ceca")
    assert found == {"ceca": undisturbed.read_json("evaluations", model.digest, "test.json")["open_set"]}


def test_a_model_does_not_differ_from_itself_and_one_that_was_not_evaluated_is_named(undisturbed):
    found = report_significance(undisturbed.uri, ("ceca", "ceca"))
    assert {(made.mean, made.p) for made in found.values()} == {(0.0, 1.0)}
    with pytest.raises(UserError, match=r"test-3-neighbours.queries.parquet is not there; run `ceca evaluate"):
        report_significance(undisturbed.uri, ("ceca", "ceca"), neighbours=(0, 3))


def test_the_report_is_one_page_whose_pictures_a_browser_shows(undisturbed, browser, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(undisturbed.root, data)
    shutil.copytree(data / "models" / "ceca", data / "models" / "<other>")
    folder = tmp_path / "report"
    report_page(str(data), ("ceca", "<other>"), folder=folder)

    page, asked, errors = browser.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto(f"file://{folder}/index.html")
    assert not errors
    assert [url for url in asked if not url.startswith("data:")] == [f"file://{folder}/index.html"]
    pictures = page.evaluate("[...document.images].map(i => [i.alt, i.complete && i.naturalWidth])")
    assert [name for name, width in pictures if width >= 400] == [name for name, _ in pictures]
    assert len(pictures) == 7
    headings = page.locator("h2").all_inner_texts()
    assert {"Results", "Ranked lists", "Errors by attribute", "Training", "Dataset"} <= set(headings)
    # Escaped: in both directions, at each rate of false alarms, and at those for which a confidence was chosen.
    alarms = evaluated(undisturbed)["open_set"]
    rates = len(alarms["rates"]) + len(alarms["confidence"]["rates"])
    assert page.get_by_role("cell", name="<other>", exact=True).count() == 2 + rates
    first = page.locator("table").first.locator("tr", has_text="ceca").first.locator("td").all_inner_texts()
    fused = metrics(undisturbed)["fused"]
    assert first[1:3] == [f"{fused['rank1']:.2f}", f"{fused['rank5']:.2f}"]
    for width in (390, 1200):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
    figures = {path.name for path in folder.iterdir()}
    names = ("omega", "ranked", "attributes", "training", "statistics")
    assert figures >= {f"{name}.{kind}" for name in names for kind in ("png", "svg")}


def test_ranked_lists_of_a_report_are_those_of_a_search(undisturbed, tmp_path):
    lists = report_ranked(undisturbed.uri, count=3, top_k=4, picture=tmp_path / "ranked.png")
    searcher = Searcher(undisturbed)
    for ranked in lists:
        hits = searcher.search(ranked.query, omega=0.3, top_k=4)
        assert [hit.identity for hit in hits] == list(ranked.identities)
        assert len(ranked.images) == 4


def test_wrong_first_places_differ_from_the_person_in_some_attribute(undisturbed, tmp_path):
    confused = report_attributes(undisturbed.uri, picture=tmp_path / "attributes.svg")
    assert {"gender", "upper_colour"} <= set(confused)
    assert all(0 <= share <= 1 for both in confused.values() for share in both)
    assert any(wrong > 0 for wrong, _ in confused.values())
    with pytest.raises(UserError, match="cannot write"):
        report_attributes(undisturbed.uri, picture=tmp_path / "attributes.docx")


def test_a_search_finds_gallery_images_of_the_test_split(undisturbed):
    hits = Searcher(undisturbed).search("a woman in a red coat", omega=0.3, top_k=5)
    assert len(hits) == 5
    assert [hit.similarity for hit in hits] == sorted((hit.similarity for hit in hits), reverse=True)
    for hit in hits:
        fused = 0.7 * hit.global_similarity + 0.3 * hit.local_similarity
        assert hit.similarity == pytest.approx(fused, abs=2e-3)


def test_other_settings_under_a_published_name_are_refused(run, undisturbed):
    failed = run("train", *SETTINGS, "--data", undisturbed.uri, "--epochs", 4, expect=2)
    assert "epochs: 3 there, 4 here" in " ".join(failed.stdout.split())


def test_many_small_parts_become_one_and_a_gallery_of_another_model_is_not_added_to(undisturbed):
    earlier = undisturbed.current("gallery")
    model = find_model(undisturbed, "ceca")
    images = find_images(undisturbed, undisturbed.current("images"), "test")
    reused = reuse(undisturbed, earlier, model, images, dict(earlier.made_from), images_per_part=1000)
    assert len(earlier.parts) > SMALL_PARTS
    assert reused.parts == []
    assert reused.copies == [[CopiedRows(number, [0]) for number in range(len(earlier.parts))]]
    other = dataclasses.replace(earlier, made_from={**earlier.made_from, "model": "another"})
    with pytest.raises(UserError, match="made by model another"):
        reuse(undisturbed, other, model, images, dict(earlier.made_from), images_per_part=1000)


@pytest.mark.long
def test_training_in_bf16_with_partitioned_parameters_publishes_a_whole_model(run, undisturbed, tmp_path):
    shutil.copytree(undisturbed.root, tmp_path, dirs_exist_ok=True)
    settings = ("--name", "partitioned", "--epochs", 1, "--precision", "bf16", "--zero-stage", 3)
    run("train", *SETTINGS, "--data", tmp_path, *settings)
    model, published = load_model(Store(str(tmp_path)), "partitioned", torch.device("cpu"))
    other, _ = load_model(undisturbed, "ceca", torch.device("cpu"))
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}
    (record,) = published.training["history"]
    assert record["loss"] == pytest.approx(find_model(undisturbed, "ceca").training["history"][0]["loss"], rel=0.02)


@pytest.mark.long
def test_the_pipeline_on_s3_by_job_submission_gives_the_same_metrics(
    run, drawn, undisturbed, s3, s3_environment, ray_cluster
):
    data, environment = "s3://bucket/dataset", s3.environment()
    prepare(run, drawn, data, environment)
    submitted = subprocess.run(
        [
            str(Path(sys.executable).parent / "ray"), "job", "submit",
            "--address", f"http://127.0.0.1:{ray_cluster.dashboard_port}",
            "--working-dir", ".", "--runtime-env-json", json.dumps({"env_vars": environment}),
            "--", sys.executable, "jobs/train.py", *SETTINGS, "--data", data,
        ],
        cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stdout[-5000:] + submitted.stderr[-3000:]
    run("evaluate", *SETTINGS, "--data", data, environment=environment)
    run("index", *SETTINGS, "--data", data, environment=environment)
    store = Store(data)
    assert metrics(store) == metrics(undisturbed)
    assert digests(store, "gallery") == digests(undisturbed, "gallery")
