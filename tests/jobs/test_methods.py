"""Drills of the recipes: every benchmark's with the full model for two steps, and every method to a table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ceca.data.store import Store
from ceca.datasets.drawn import draw_dataset
from ceca.model.weights import load_model
from jobs.compare import summarise
from jobs.dialogue import dialogue
from jobs.ingest import ingest
from jobs.pipeline import recipe_config
from tests.conftest import REPOSITORY
from tests.stages import in_this_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def ceca(*arguments: object) -> str:
    """Run a command of the product with a Ray of its own, as on one machine."""
    command = [str(Path(sys.executable).parent / "ceca"), *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "200"}  # tables as they are
    finished = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=800, check=False
    )
    output = finished.stdout + finished.stderr
    assert finished.returncode == 0, output[-6000:]
    return " ".join(output.split())


@pytest.mark.parametrize(
    ("method", "benchmark"),
    [
        *(("ceca", name) for name in ("cuhk_pedes", "icfg_pedes", "rstpreid")),
        *(("irra", name) for name in ("cuhk_pedes", "icfg_pedes", "rstpreid")),
    ],
)
@pytest.mark.long
def test_a_published_recipe_takes_two_steps_with_the_full_model_on_this_machine(benchmark, method, tmp_path):
    people = (6, 0, 2) if benchmark == "icfg_pedes" else (6, 1, 1)
    source, data = tmp_path / "drawn", tmp_path / "data"
    draw_dataset(source, identities=8, images_per_identity=2, layout=benchmark, split_identities=people, workers=1)
    recipe = f"{method}+{benchmark}"
    ceca("ingest", "--recipe", recipe, "--source", source, "--data", data)
    ceca("dialogue", "--recipe", recipe, "--data", data, "--engine", "oracle")
    output = ceca("train", "--recipe", recipe, "--data", data, "--dry-run")
    losses = output.split("dry run of ViT-B-16-quickgelu, losses ")[1].split()[:2]
    assert all(0 < float(loss.rstrip(",")) < 200 for loss in losses)
    assert not (data / "models").exists()


@pytest.mark.long
def test_every_method_trains_from_its_recipe_and_one_command_prints_the_table(drawn, tmp_path):
    methods, seeds = ("clip", "irra", "rde", "ceca", "agreement", "no_mixer", "noise50"), 2
    data = tmp_path / "data"
    with in_this_process():
        ingest(str(data), recipe_config("tiny", "ingest", source=str(drawn)))
        dialogue(str(data), recipe_config("tiny+views", "dialogue"))
    small = tmp_path / "small.yaml"
    small.write_text((REPOSITORY / "tests/jobs/small.yaml").read_text().replace("epochs: 3", "epochs: 1"))
    command = ("compare", "--data", data, "--recipe", small, "--methods", *methods, "--seeds", seeds)
    output = ceca(*command, "--picture", tmp_path / "table.png")
    for method in methods:
        assert f"{method} │" in output
    (path,) = (data / "comparisons").glob("*.json")
    result = json.loads(path.read_text())
    assert {method: len(runs) for method, runs in result["methods"].items()} == dict.fromkeys(methods, seeds)
    for method, runs in result["methods"].items():
        assert result["summary"][method]["rank1"] == list(summarise(runs)["rank1"])
    assert (tmp_path / "table.png").stat().st_size > 5000
    model, _ = load_model(Store(str(data)), f"irra-{seeds - 1}")
    assert model.local_dim == model.global_dim
    assert not any(name.startswith("heads.") for name in model.state_dict())
    assert "published already" in ceca(*command)
    trained = [method for method in methods if method != "agreement"]  # it has no model of its own
    ceca(
        "report",
        "training",
        "--data",
        data,
        "--models",
        *(f"{method}-0" for method in trained),
        "--picture",
        tmp_path / "curves.png",
    )
    assert (tmp_path / "curves.png").stat().st_size > 5000
