"""Files behind the paths of an annotation file: those of the dataset are read, and every other kind is a reject."""

from __future__ import annotations

import os
import shutil
import unicodedata

import numpy as np
import pyarrow as pa
import pytest

from ceca.data.changes import hide
from ceca.data.schema import image_id
from ceca.data.store import Store
from ceca.data.tables import PAIRS
from ceca.datasets.layouts import Caption, Record
from ceca.metrics import Matches, retrieval_metrics
from jobs.ingest import IngestWorker
from jobs.runtime.records import to_json
from jobs.training.samples import number_identities


@pytest.fixture
def source(drawn, tmp_path):
    """A folder with one image, imgs/cam/a.jpg."""
    first = next((drawn / "imgs").rglob("*.jpg"))
    (tmp_path / "source" / "imgs" / "cam").mkdir(parents=True)
    shutil.copy(first, tmp_path / "source" / "imgs" / "cam" / "a.jpg")
    return tmp_path / "source"


def ingest(source, *paths: str, data=None):
    """Image ids and reasons by path that a worker makes of these paths."""
    records = [Record(path, 1, "train", (Caption(0, "a man"),)) for path in paths]
    output = IngestWorker(str(source), str(data or source / "data"))(to_json(records))
    return output.tables["images"]["image_id"].to_pylist(), {r.key: r.reason for r in output.rejects}


def test_a_link_out_of_the_dataset_is_not_followed(source, tmp_path):
    secret = tmp_path / "secret.jpg"
    shutil.copy(source / "imgs" / "cam" / "a.jpg", secret)
    (source / "imgs" / "x.jpg").symlink_to(secret)
    (source / "imgs" / "folder").symlink_to(tmp_path)
    (source / "imgs" / "inside.jpg").symlink_to("cam/a.jpg")
    ids, rejects = ingest(source, "x.jpg", "folder/secret.jpg", "inside.jpg")
    assert ids == [image_id("inside.jpg")]
    assert rejects == {"x.jpg": "outside_the_dataset", "folder/secret.jpg": "outside_the_dataset"}


def test_a_folder_of_images_may_itself_be_a_link(source, tmp_path):
    (source / "imgs").rename(tmp_path / "elsewhere")
    (source / "imgs").symlink_to(tmp_path / "elsewhere")
    assert ingest(source, "cam/a.jpg") == ([image_id("cam/a.jpg")], {})


@pytest.mark.timeout(20)
def test_every_other_kind_of_file_is_a_reject(source):
    imgs = source / "imgs"
    os.mkfifo(imgs / "pipe.jpg")
    (imgs / "circle.jpg").symlink_to("circle.jpg")
    (imgs / "dangling.jpg").symlink_to("nowhere.jpg")
    (imgs / "empty.jpg").touch()
    paths = ("pipe.jpg", "circle.jpg", "dangling.jpg", "cam", "cam/a.jpg/b.jpg", "n" * 300 + ".jpg", "empty.jpg")
    ids, rejects = ingest(source, *paths, "cam/a.jpg")
    assert ids == [image_id("cam/a.jpg")]
    assert rejects.keys() == set(paths)
    assert rejects["pipe.jpg"] == rejects["cam"] == "missing_file"
    assert rejects["circle.jpg"] == rejects["n" * 300 + ".jpg"] == "unreadable_file"


def test_an_accent_may_be_spelled_in_two_ways(source):
    name = unicodedata.normalize("NFD", "Zoë.jpg")
    shutil.copy(source / "imgs" / "cam" / "a.jpg", source / "imgs" / name)
    path = unicodedata.normalize("NFC", "Zoë.jpg")
    assert ingest(source, path) == ([image_id(path)], {})


def test_an_erased_image_does_not_come_back_from_its_source(source, tmp_path):
    shutil.copy(source / "imgs" / "cam" / "a.jpg", source / "imgs" / "b.jpg")
    hide(Store(str(tmp_path / "data")), [image_id("b.jpg")], erase=True)
    ids, rejects = ingest(source, "cam/a.jpg", "b.jpg", data=tmp_path / "data")
    assert (ids, rejects) == ([image_id("cam/a.jpg")], {})  # and no reject keeps its name


def pairs(*identities: int) -> pa.Table:
    rows = range(len(identities))
    return pa.table([[0] * len(rows), list(rows), list(identities), ["c"] * len(rows), ["s"] * len(rows)], schema=PAIRS)


def test_images_of_nobody_are_people_of_their_own_in_training():
    assert number_identities(pairs(7, 3, 7, 9)).tolist() == [1, 0, 1, 2]
    numbers = number_identities(pairs(-1, 3, -1, 3))
    assert len(set(numbers.tolist())) == 3
    assert numbers[1] == numbers[3]


def test_images_of_nobody_match_nobody_in_the_figures():
    similarity = np.array([[0.9, 0.8, 0.1], [0.2, 0.9, 0.8]])
    figures = retrieval_metrics(similarity, np.array([5, -1]), np.array([-1, 5, -1]))
    assert figures.rank1 == 0.0  # a stranger is before person 5, and nobody is found
    assert figures.rank5 == 50.0
    assert Matches(np.array([-1, 5]), np.array([-1, -1, 5])).count.tolist() == [0, 1]
