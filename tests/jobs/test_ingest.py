"""Files behind the paths of an annotation file: those of the dataset are read, and every other kind is a reject."""

from __future__ import annotations

import os
import shutil
import unicodedata

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from ceca.config import IngestConfig
from ceca.data.changes import hide
from ceca.data.erase import finish
from ceca.data.schema import IMAGES, image_id
from ceca.data.store import Store
from ceca.data.webdataset import samples
from ceca.datasets.drawn import draw_dataset
from ceca.datasets.records import Caption, Record
from ceca.errors import UserError
from ceca.metrics import Matches, retrieval_metrics
from ceca.settings import ConfigError
from jobs.ingest import IngestWorker
from jobs.ingest import ingest as run_ingest
from jobs.runtime import units
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
    (source / "reid_raw.json").write_text("[]")
    output = IngestWorker({"source": str(source)}, str(data or source / "data")).check(records)
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


def test_images_of_nobody_are_people_of_their_own_in_training():
    images = np.arange(4)
    assert number_identities(np.array([7, 3, 7, 9]), images).tolist() == [1, 0, 1, 2]
    numbers = number_identities(np.array([-1, 3, -1, 3]), images)
    assert len(set(numbers.tolist())) == 3
    assert numbers[1] == numbers[3]


def test_images_of_nobody_match_nobody_in_the_figures():
    similarity = np.array([[0.9, 0.8, 0.1], [0.2, 0.9, 0.8]])
    figures = retrieval_metrics(similarity, np.array([5, -1]), np.array([-1, 5, -1]))
    assert figures.rank1 == 0.0  # a stranger is before person 5, and nobody is found
    assert figures.rank5 == 50.0
    assert Matches(np.array([-1, 5]), np.array([-1, -1, 5])).count.tolist() == [0, 1]


# --- any source becomes the tables ------------------------------------------------------------------------


def put(folder, *names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 8 + number)).save(folder / name, "PNG")


def test_a_folder_of_pictures_becomes_a_gallery_of_nobody(tmp_path, without_ray):
    put(tmp_path / "in", "a.png", "b/c.png", "d.png")
    (tmp_path / "in" / "notes.bin").write_bytes(b"no picture")
    config = IngestConfig(source=str(tmp_path / "in"), images_per_part=2)
    manifests = run_ingest(str(tmp_path / "data"), config)
    store = Store(str(tmp_path / "data"))
    rows = store.read(manifests["images"]).to_pylist()
    assert [(row["source_path"], row["identity"], row["split"], row["height"]) for row in rows] == [
        ("a.png", -1, "test", 8),
        ("d.png", -1, "test", 10),
        ("b/c.png", -1, "test", 9),
    ]
    assert (manifests["captions"].rows, len(manifests["images"].parts)) == (0, 2)
    assert store.rejects()["reason"].to_pylist() == ["not_an_image"]
    assert store.walk(".work") == []


def test_a_dataset_is_not_put_among_the_pictures_it_is_made_of(tmp_path):
    put(tmp_path / "in", "a.png")
    for data in ("in", "in/data"):
        with pytest.raises(UserError, match="give another --data"):
            run_ingest(str(tmp_path / data), IngestConfig(source=str(tmp_path / "in")))


def test_only_new_pictures_are_read_and_the_others_stay(tmp_path, without_ray, capsys):
    put(tmp_path / "in", "a.png", "b.png")
    config = IngestConfig(source=str(tmp_path / "in"), only_missing=True)
    first = run_ingest(str(tmp_path / "data"), config)
    put(tmp_path / "in", "0.png")
    second = run_ingest(str(tmp_path / "data"), config)
    assert second["images"].parts[0] == first["images"].parts[0]
    store = Store(str(tmp_path / "data"))
    assert store.read(second["images"])["source_path"].to_pylist() == ["a.png", "b.png", "0.png"]
    assert run_ingest(str(tmp_path / "data"), config) == {"images": second["images"], "captions": second["captions"]}
    assert "lacks nothing" in capsys.readouterr().err
    (tmp_path / "in" / "a.png").unlink()
    put(tmp_path / "in", "1.png")
    assert run_ingest(str(tmp_path / "data"), config)["images"].rows == 4
    assert "1 published images are not in the source now" in " ".join(capsys.readouterr().err.split())


def test_a_table_keeps_captions_shares_and_times(tmp_path, without_ray, capsys):
    put(tmp_path, *(f"{number}.png" for number in range(40)))
    lines = [f"{number}.png,{number // 4},a man,{1769860800 + number}" for number in range(40)]
    (tmp_path / "t.csv").write_text("\n".join(["file,pid,text,ts", *lines]))
    config = IngestConfig(source=str(tmp_path / "t.csv"), columns=("time=ts",), split_share=(0.5, 0.25, 0.25))
    manifests = run_ingest(str(tmp_path / "data"), config)
    images = Store(str(tmp_path / "data")).read(manifests["images"])
    assert images.schema.field("time").type == pa.timestamp("us", "UTC")
    assert images["time"][1].as_py().isoformat() == "2026-01-31T12:00:01+00:00"
    splits = dict(zip(images["identity"].to_pylist(), images["split"].to_pylist(), strict=True))
    by_image = zip(images["identity"].to_pylist(), images["split"].to_pylist(), strict=True)
    assert all(splits[identity] == split for identity, split in by_image)
    assert set(splits.values()) == {"train", "test"}  # none of ten people fell into val
    assert manifests["captions"].rows == 40
    said = " ".join(capsys.readouterr().err.split())
    assert "image from file, identity from pid, text from text, time from ts; nothing says split, camera" in said


def test_a_table_keeps_tracklets_and_one_without_them_keeps_its_version(tmp_path, without_ray):
    put(tmp_path, *(f"{number}.png" for number in range(4)))
    rows = [("0.png", 1, "a"), ("1.png", 1, "a"), ("2.png", 1, " "), ("3.png", 2, "b")]
    without, named = tmp_path / "without.csv", tmp_path / "with.csv"
    without.write_text("\n".join(["file,pid", *(f"{file},{pid}" for file, pid, _ in rows)]))
    named.write_text("\n".join(["file,pid,walk", *(f"{file},{pid},{walk}" for file, pid, walk in rows)]))
    store = Store(str(tmp_path / "data"))
    before = run_ingest(store.uri, IngestConfig(source=str(without)))["images"]
    assert before.version == "12a0967abf73"  # of a program that knew no tracklets
    assert store.read(before).schema == IMAGES
    assert store.read(before, ["image_id", "tracklet"])["tracklet"].to_pylist() == [None] * 4
    assert store.take(before, [(0, 1)], ["tracklet"])["tracklet"].to_pylist() == [None]
    after = run_ingest(store.uri, IngestConfig(source=str(named), columns=("tracklet=walk",)))["images"]
    assert after.version != before.version
    assert store.read(after)["tracklet"].to_pylist() == ["a", "a", None, "b"]
    assert [known["tracklet"] for _, known in samples(store)] == ["a", "a", None, "b"]


def test_the_tracklets_of_a_drawing_are_those_of_its_truth(tmp_path, without_ray):
    drawn = tmp_path / "drawn"
    draw_dataset(drawn, identities=2, layout="rstpreid", split_identities=(1, 0, 1), level="medium", workers=1)
    store = Store(str(tmp_path / "data"))
    images = store.read(run_ingest(store.uri, IngestConfig(source=str(drawn)))["images"])
    names = [f"0000{person}-{walk}" for person in (0, 1) for walk in (0, 0, 1, 1)]
    assert images["tracklet"].to_pylist() == names
    assert all(f"_t{name[-1]}_" in path for name, path in zip(names, images["source_path"].to_pylist(), strict=True))


def test_shares_that_do_not_sum_to_one_are_refused():
    with pytest.raises(ConfigError, match="must sum to 1"):
        IngestConfig(split_share=(0.8, 0.1, 0.2))


def test_an_erasure_removes_the_listing_of_an_ingest_that_was_killed(tmp_path, without_ray, monkeypatch):
    put(tmp_path / "in", "a.png", "b.png")
    config, store = IngestConfig(source=str(tmp_path / "in")), Store(str(tmp_path / "data"))
    with monkeypatch.context() as killed:
        killed.setattr(units, "_run_units", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_ingest(store.uri, config)
    assert store.walk(".work")
    hide(store, [image_id("a.png")], erase=True)
    finish(store)
    assert store.walk(".work") == []
    assert run_ingest(store.uri, config)["images"].rows == 1
