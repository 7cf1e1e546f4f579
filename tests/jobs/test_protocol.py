"""How the epoch of a model is chosen, and that tables, JSON and pictures name it."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest

from ceca.config import OMEGA, TrainConfig
from ceca.data.store import Store
from ceca.evaluation.names import METRICS
from ceca.model.registry import PublishedModel
from ceca.settings import from_mapping, to_mapping
from jobs import compare
from jobs.runtime import console
from jobs.training.samples import held_out
from tests.serve.dataset import publish_people


@pytest.fixture
def without_val(tmp_path: Path) -> Store:
    """Five images of the split test and one of train, as a benchmark with two splits has them."""
    store = Store(str(tmp_path / "data"))
    publish_people(store, 6)
    return store


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    sink = io.StringIO()
    monkeypatch.setattr(console.console, "_file", sink)  # `file` would be set for good
    monkeypatch.setattr(console.console, "_width", 300)
    return sink


def test_without_the_word_nothing_is_chosen_on_test(without_val: Store, shown: io.StringIO) -> None:
    tables = {name: without_val.current(name) for name in ("images", "captions", "dialogues")}
    assert held_out(without_val, tables) is None
    assert "there is no split val: the last epoch is kept; --protocol released chooses it on test" in shown.getvalue()
    released = held_out(without_val, tables, "released")
    assert released is not None
    assert (released.split, len(released.images)) == ("test", 5)


def published(protocol: str | None, split: str | None) -> PublishedModel:
    train = {} if protocol is None else {"protocol": protocol}
    return PublishedModel("", "", 1, 1, {"train": train}, {"validation_split": split}, {}, "")


@pytest.mark.parametrize(
    ("protocol", "split", "name", "label"),
    [
        (None, "val", "validation", "m"),  # of a program that knew no protocols
        (None, "test", "epoch on test", "m (protocol epoch on test)"),
        ("validation", "val", "validation", "m"),
        ("validation", None, "validation", "m"),
        ("released", "test", "released", "m (protocol released)"),
    ],
)
def test_a_models_label_names_its_protocol(protocol: str | None, split: str | None, name: str, label: str) -> None:
    model = published(protocol, split)
    assert (model.protocol, model.label("m")) == (name, label)
    assert model.omega() == OMEGA["released" if name == "released" else "validation"]
    assert model.omega(0.7) == 0.7
    assert model.omega(0.0) == 0.0


def test_the_protocol_is_a_part_of_a_models_version_only_where_it_is_not_the_default() -> None:
    plain, released = (
        to_mapping(from_mapping(TrainConfig, m), results_only=True) for m in ({}, {"protocol": "released"})
    )
    assert "protocol" not in plain
    assert released["protocol"] == "released"


def test_compare_trains_models_of_a_protocol_under_names_of_their_own() -> None:
    plain, released = (compare.plan("rde", "tiny", 1, "test", word) for word in (None, "released"))  # type: ignore[arg-type]
    assert (plain.training.name, plain.training.protocol) == ("rde-1", "validation")
    assert (released.training.name, released.evaluation.model) == ("rde-released-1", "rde-released-1")
    assert released.training == dataclasses.replace(plain.training, protocol="released", name="rde-released-1")
    assert plain.evaluation.omega == 0.5
    assert compare.plan("rde", "cuhk_pedes", 0, "test").evaluation.omega == 0.5  # the benchmark says nothing of ω


def test_the_comparison_prints_recipe_and_protocol_beside_each_row(shown: io.StringIO) -> None:
    row = dict.fromkeys(METRICS, (50.0, 1.0))
    comparison: dict[str, Any] = {
        "recipe": "cuhk_pedes+mine/views.yaml",
        "split": "test",
        "seeds": 2,
        "made": {
            "ceca": {"recipe": "ceca+cuhk_pedes+mine/views.yaml", "protocol": "validation", "omega": 0.3},
            "rde": {"recipe": "rde+cuhk_pedes+mine/views.yaml", "protocol": "released", "omega": 0.5},
        },
        "summary": {"ceca": row, "rde": row},
    }
    compare.print_comparison(comparison)
    lines = [" ".join(line.split()) for line in shown.getvalue().splitlines()]
    assert any("ceca │ ceca+cuhk_pedes+views │ validation, ω 0.3 │ 50.00 ± 1.00" in line for line in lines), lines
    assert any("rde │ rde+cuhk_pedes+views │ released, ω 0.5 │ 50.00 ± 1.00" in line for line in lines)
    assert any("75.94 (67.56)" in line for line in lines)
    assert set(compare.labelled(comparison)) == {"ceca", "rde (protocol released)"}
    assert set(compare.labelled({"summary": {"ceca": row}})) == {"ceca"}  # a comparison before 0.2
