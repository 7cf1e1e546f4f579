"""Encoded images of a training: in Ray's object store, or in files of each machine."""

from __future__ import annotations

import contextlib
import os
import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import yaml
from PIL import Image
from ray.cluster_utils import Cluster

from ceca.data.parts import decode
from ceca.data.schema import CAPTIONS, IMAGES, caption_id, image_id
from ceca.data.store import Receipt, Store, StoreError
from ceca.environment import cache_folder
from ceca.model.registry import find_model
from jobs.training import images as training_images
from jobs.training.images import ImagePart, InFiles, InMemory, hold_images, kept_while_training
from tests.ceca.data.dataset import IDS, word, write


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> InFiles:
    """Ten images in two parts."""
    monkeypatch.setenv("CECA_CACHE", str(tmp_path / "cache"))
    store = Store(str(tmp_path / "data"))
    parts = write(store, "images", "v", IDS[:6], IDS[6:10])
    store.publish("images", "v", ("images",), [Receipt({"images": part}) for part in parts], made_from={}, config={})
    table = store.current("images")
    return InFiles(store.uri, "models/m/run-1", {part: ImagePart(store.uri, table, part) for part in (0, 1)})


def content(number: int) -> bytes:
    return f"bytes of {word(IDS[number])}".encode() * 9


def test_files_hold_the_bytes_of_the_table_in_any_order(files: InFiles):
    sent = pickle.loads(pickle.dumps(files))
    assert sent.read([1, 0, 1, 0], [3, 5, 0, 5]) == [content(9), content(5), content(6), content(5)]
    assert len(list(files.folder.glob("*.arrow"))) == 2


def test_a_part_is_read_from_the_dataset_once_by_all_processes(files: InFiles):
    files.read([0], [0])
    store = Store(files.uri)
    table = store.current("images")
    store.remove("images", table.parts[0].path)
    assert pickle.loads(pickle.dumps(InFiles(files.uri, files.run, files.parts))).read([0], [1]) == [content(1)]
    store.remove("images", table.parts[1].path)
    with pytest.raises(StoreError, match="is named by its manifest but missing"):
        files.read([1], [0])


def test_few_files_are_open_at_a_time(files: InFiles, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training_images, "OPEN", 1)
    assert files.read([0, 1], [0, 0]) == [content(0), content(6)]
    assert list(files.columns) == [1]
    assert files.read([0], [1]) == [content(1)]


def test_files_go_with_their_training_and_what_was_left_behind_after_days(files: InFiles):
    left = InFiles(files.uri, "models/m/run-0", files.parts)
    recent = InFiles(files.uri, "models/n/run-0", files.parts)
    for other in (left, recent):
        other.read([0], [0])
    days_ago = time.time() - 3 * 86_400
    for path in (*left.folder.iterdir(), left.folder):
        os.utime(path, (days_ago, days_ago))
    with kept_while_training(files):
        files.read([0, 1], [0, 0])
        assert len(list(cache_folder("training").iterdir())) == 2
    (kept,) = cache_folder("training").iterdir()
    assert kept == recent.folder


def test_a_disk_that_is_full_is_an_error_that_names_the_variable(files: InFiles, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training_images, "writing", full)
    with pytest.raises(StoreError, match=r"No space left on device.*set CECA_CACHE to a folder with room"):
        files.read([0], [0])


def test_images_are_held_in_memory_if_half_of_the_object_stores_has_room(
    files: InFiles, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    store = Store(files.uri)
    table = store.current("images")
    needed, tables = table.parts[0].bytes, [(store.uri, table)]
    fetched: list[int] = []

    class Fetch:
        def options(self, **_: object) -> Fetch:
            return self

        def remote(self, parts: list[ImagePart]) -> int:
            (part,) = parts
            fetched.append(part.number)
            return part.number

    monkeypatch.setattr(training_images, "_load_parts", Fetch())
    monkeypatch.setattr(training_images.ray, "cluster_resources", lambda: {"object_store_memory": 2.0 * needed})
    assert hold_images(store, tables, {0}, "r", {}) == InMemory({0: 0})
    assert fetched == [0]
    assert hold_images(store, tables, {0, 1}, "r", {}) == InFiles(store.uri, "r", files.parts)
    assert "each machine keeps them in files (CECA_CACHE)" in " ".join(capsys.readouterr().err.split())
    assert fetched == [0]


ROOM = 80 * 2**20  # bytes of the smallest object store that Ray starts with


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Noisy pictures of 24 people, three times as large as the object store."""
    store = Store(str(tmp_path_factory.mktemp("large") / "data"))
    source, rows, captions = np.random.default_rng(0), [], []
    side = 512
    for number in range(3 * ROOM // (3 * side * side) + 8):
        key, path = image_id(f"{number}.bmp"), store.path(f"{number}.bmp")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.integers(0, 255, (side, side, 3), np.uint8)).save(path)
        common = {"image_id": key, "identity": number % 24, "split": "train" if number % 24 < 20 else "val"}
        size = {"width": side, "height": side, "source_path": path}
        rows.append({**common, **size, "image": Path(path).read_bytes()})
        captions.append({**common, "caption_id": caption_id(key, 0), "text": f"person number {number % 24}"})
        Path(path).unlink()
    for table, schema, content in (("images", IMAGES, rows), ("captions", CAPTIONS, captions)):
        pieces = [pa.Table.from_pylist(content[start : start + 16], schema) for start in range(0, len(content), 16)]
        parts = [store.write_part(table, "v", number, piece) for number, piece in enumerate(pieces)]
        receipts = [Receipt({table: part}) for part in parts]
        store.publish("ingest", "v", (table,), receipts, made_from={"images": "v"}, config={})
    return store


@contextlib.contextmanager
def cluster(room: int) -> Iterator[dict[str, str]]:
    """The environment of commands that join a cluster whose object store has this many bytes."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 6, "object_store_memory": room})
    try:
        yield {"RAY_ADDRESS": made.address}
    finally:
        made.shutdown()


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_training_set_three_times_the_object_store_has_the_losses_of_one_that_fits(run, large: Store, tmp_path: Path):
    assert sum(part.bytes for part in large.current("images").parts) > 3 * ROOM
    recipe = tmp_path / "large.yaml"
    plain = {"model": {"summary_weight": 0.0, "local_branch": False}, "losses": {"terms": ["infonce"]}}
    recipe.write_text(yaml.safe_dump({"train": {"epochs": 1, "workers": 2, **plain}}))
    curves = []
    for name, room in (("fits", 12 * ROOM), ("files", ROOM)):
        arguments = ("--recipe", f"tests/jobs/small.yaml+{recipe}", "--data", large.uri, "--name", name)
        with cluster(room) as environment:
            said = run("train", *arguments, environment=environment).stdout
        assert ("keeps them in files" in said) == (name == "files")
        model = find_model(large, name)
        assert model is not None
        curves.append(
            decode(pa.BufferReader(large.read_bytes("models", name, model.digest, "curve.parquet")))["loss"].to_numpy()
        )
    assert len(curves[0]) > 5
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-6)
    assert not list(cache_folder("training").iterdir())
