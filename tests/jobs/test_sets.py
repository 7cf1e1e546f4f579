"""Several datasets in one training."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ceca.config import EvaluateConfig, IndexConfig, TrainConfig
from ceca.data.schema import NOBODY
from ceca.data.store import Store, StoreError
from ceca.datasets.drawn import draw_dataset
from ceca.datasets.images import decode_image
from ceca.errors import UserError
from ceca.model.registry import require_model
from ceca.settings import ConfigError, from_mapping, to_mapping
from ceca.training.order import Batches
from jobs.evaluate import evaluate
from jobs.index import index
from jobs.training import samples as module
from jobs.training.data import LoadSamples, TrainingSet, worker_places
from jobs.training.images import InFiles, parts_of
from jobs.training.samples import held_out, training_set
from jobs.training.sets import input_sets, input_tables, versions_of
from tests.jobs.conftest import SMALL
from tests.serve.dataset import draw_person, publish_people, publish_tiny

TWO: dict[str, Any] = {"split": "test", "global_batch": 4, "last_batch": "keep", "seed": 3}
TWO |= {"model": {"image_height": 8, "image_width": 4}}


@pytest.fixture
def places(tmp_path: Path) -> tuple[str, str]:
    """Five pictures of three people, and eight of four: paths, ids and identities are the same numbers in both."""
    for name, count in (("a", 6), ("b", 9)):
        publish_people(Store(str(tmp_path / name)), count)
    return str(tmp_path / "a"), str(tmp_path / "b")


def config(places: tuple[str, str], *weights: float) -> TrainConfig:
    return from_mapping(TrainConfig, {**TWO, "sets": [places[1]], "set_weights": list(weights)})


def both(places: tuple[str, str], *weights: float) -> TrainingSet:
    settings = config(places, *weights)
    return training_set(input_sets(Store(places[0]), settings), settings)


def test_people_and_images_of_two_sets_are_kept_apart(places: tuple[str, str]) -> None:
    samples = both(places)
    assert samples.identity.tolist() == [0, 0, 1, 1, 2, *(3, 3, 4, 4, 5, 5, 6, 6)]
    assert len(set(samples.image.tolist())) == 13
    assert samples.portions == ((5, 5), (8, 8))
    alone = training_set(input_sets(Store(places[1]), TrainConfig(**TWO)), TrainConfig(**TWO))
    for texts, own in ((samples.caption, alone.caption), (samples.summary, alone.summary)):
        assert np.array_equal(texts[np.arange(5, 13)], own[np.arange(8)])


def test_a_worker_reads_each_sample_from_its_set(
    places: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three workers load what one loads: every picture of the first set, and half of the other's in each epoch."""
    monkeypatch.setenv("CECA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("ray.get", lambda reference: reference)
    settings, samples = config(places, 0.5), both(places, 0.5)
    tables = [(each.store.uri, each.tables["images"]) for each in input_sets(Store(places[0]), settings)]
    images = InFiles(places[0], "run", dict(enumerate(parts_of(tables))))

    def loaded(workers: int, epoch: int) -> list[bytes]:
        found: dict[int, bytes] = {}
        for rank in range(workers):
            in_epoch = worker_places(Batches.of(samples.visited, settings), rank, workers)
            load = LoadSamples(settings, rank, workers, samples, images, epoch * len(in_epoch))  # type: ignore[arg-type]
            batch = load({"first": np.array([0]), "end": np.array([len(in_epoch)])})
            found |= dict(zip(in_epoch.tolist(), (picture.tobytes() for picture in batch["image"]), strict=True))
        return [found[place] for place in sorted(found)]

    def shown(number: int) -> bytes:
        return decode_image(draw_person(number), 8, 4, "bicubic").tobytes()

    epochs = [loaded(1, epoch) for epoch in (0, 1)]
    assert [loaded(3, epoch) for epoch in (0, 1)] == epochs
    assert epochs[0] != epochs[1]
    # Picture n is the same in both sets, so the first five are there once or twice, the last three once in two epochs.
    counted = [sum(epoch.count(shown(number)) for epoch in epochs) for number in range(8)]
    assert counted == [3, 3, 3, 3, 3, 1, 1, 1]


def test_versions_name_the_tables_of_every_set_and_of_one_set_as_before(places: tuple[str, str]) -> None:
    alone = TrainConfig(**TWO)
    assert versions_of(input_sets(Store(places[0]), alone)).keys() == {"images", "captions", "dialogues"}
    made_from = versions_of(input_sets(Store(places[0]), config(places)))
    assert list(made_from)[3:] == ["images of set 2", "captions of set 2", "dialogues of set 2"]
    assert to_mapping(config(places), results_only=True) == to_mapping(
        alone, results_only=True
    )  # places decide nothing
    assert to_mapping(config(places, 0.5), results_only=True)["set_weights"] == [0.5]


def test_sets_that_cannot_be_used_are_errors_that_say_why(places: tuple[str, str], tmp_path: Path) -> None:
    store = Store(places[0])

    def refused(uri: str, error: type[Exception], message: str, **settings: Any) -> None:
        wrong = from_mapping(TrainConfig, {**TWO, "sets": [uri], **settings})
        with pytest.raises(error, match=message):
            training_set(input_sets(store, wrong), wrong)

    refused(f"file://{places[0]}", UserError, "a is named twice among --data and --sets")
    refused("memory://elsewhere", UserError, "lie in stores of two kinds")
    refused(places[1], UserError, r"split 'val' of .*b has no pairs|split 'val' of .*a has no pairs", split="val")
    refused(str(tmp_path / "none"), StoreError, "no table 'images' in .*none; run the stage `ingest` first")
    undescribed = Store(shutil.copytree(places[1], tmp_path / "undescribed").as_posix())
    shutil.rmtree(tmp_path / "undescribed" / "dialogues")
    refused(undescribed.uri, StoreError, "no table 'dialogues' in .*undescribed; run the stage `dialogue` first")
    other = Path(shutil.copytree(places[1], tmp_path / "other")) / "images" / "manifest.json"
    other.write_text(json.dumps({**json.loads(other.read_text()), "schema_version": 99}))
    refused(str(tmp_path / "other"), StoreError, "other/images/manifest.json has schema version 99, this program reads")


@pytest.mark.parametrize(
    ("weights", "message"),
    [([0.0], "greater than 0"), ([-1.0], "greater than 0"), ([1.0, 2.0], "found 2 for 1")],
    ids=["zero", "negative", "too many"],
)
def test_weights_that_cannot_be_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(TrainConfig, {"sets": ["b"], "set_weights": weights})


def test_fewer_pairs_than_a_batch_are_counted_over_all_sets(places: tuple[str, str]) -> None:
    settings = dataclasses.replace(config(places, 0.5), global_batch=9, last_batch="drop")
    assert training_set(input_sets(Store(places[0]), settings), settings).visited == 9
    more = dataclasses.replace(settings, global_batch=10)
    with pytest.raises(UserError, match="has 9 image-caption pairs, fewer than one global batch of 10"):
        training_set(input_sets(Store(places[0]), more), more)


def test_a_set_in_which_nobody_is_named_validates_nothing_and_is_marked(
    places: tuple[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, settings = Store(places[0]), TrainConfig(**TWO)
    tables = input_tables(store, settings)
    assert held_out(store, tables, "released") is not None
    named = module.find_images

    def unnamed(*arguments: Any) -> Any:
        images = named(*arguments)
        return dataclasses.replace(images, identities=np.full_like(images.identities, NOBODY))

    monkeypatch.setattr(module, "find_images", unnamed)
    assert held_out(store, tables, "released") is None
    assert "nobody is named in the split test: the last epoch is kept" in " ".join(capsys.readouterr().err.split())
    samples = training_set(input_sets(store, settings), settings)
    assert samples.nobody.all()
    assert samples.identity.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.usefixtures("without_ray")
def test_a_model_of_one_dataset_is_measured_on_another_and_makes_its_gallery(places: tuple[str, str]) -> None:
    publish_tiny(Store(places[0]), "ceca", seed=0)
    model = f"{places[0]}/models/ceca"
    sizes = [evaluate(data, EvaluateConfig(model=model))["gallery"] for data in places]
    assert sizes == [5, 8]
    digest = require_model(Store(places[0]), "ceca").digest
    assert all(Store(data).read_json("evaluations", digest, "test.json") for data in places)
    index(places[1], IndexConfig(model=model))
    assert Store(places[1]).current("gallery").rows == 8


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_drawn_sets_train_one_model_that_is_measured_on_each(run, told: Path, tmp_path: Path) -> None:
    """Nobody is named in the second set's split train. Three workers have the losses of two."""
    draw_dataset(tmp_path / "drawn", seed=8, identities=9, images_per_identity=3, split_identities=(6, 1, 2), workers=1)
    first, second = str(shutil.copytree(told, tmp_path / "first")), str(tmp_path / "second")
    annotation = tmp_path / "drawn" / "reid_raw.json"
    records = json.loads(annotation.read_text())
    unnamed = [{**record, "id": NOBODY} if record["split"] == "train" else record for record in records]
    annotation.write_text(json.dumps(unnamed))
    run("ingest", *SMALL, "--source", tmp_path / "drawn", "--data", second)
    run("dialogue", *SMALL, "--data", second)
    together = ("--sets", second, "--set-weights", 0.5, "--losses.soft-labels", 0.5, "--global-batch", 12)
    models = []
    for workers in (2, 3):
        name = f"of-{workers}"
        run("train", *SMALL, "--data", first, "--name", name, "--workers", workers, *together)
        models.append(require_model(Store(first), name))
    assert "images of set 2" in models[0].made_from
    losses = [[epoch["loss"] for epoch in model.training["history"]] for model in models]
    np.testing.assert_allclose(*losses, rtol=1e-3)
    for data in (first, second):
        run("evaluate", "--data", data, "--model", f"{first}/models/of-2")
