"""What index and evaluation plan from columns: each image is embedded with its own summary, and nothing twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.made import make_dataset
from ceca.config import EvaluateConfig, IndexConfig
from ceca.data.changes import hide
from ceca.data.store import Receipt, Store
from jobs.evaluations.embedding import embed_split
from jobs.index import index

IMAGES = 12
CONFIG = IndexConfig(model="random", images_per_part=5)
pytestmark = pytest.mark.usefixtures("without_ray")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    make_dataset(str(folder), IMAGES, widths=None)
    return folder


@pytest.fixture
def store(made: Path, tmp_path: Path) -> Store:
    """A dataset of its own: the tables are read where they were made, and nothing of theirs is changed."""
    for file in made.rglob("*"):
        if file.is_file():
            target = tmp_path / file.relative_to(made)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.hardlink_to(file)
    return Store(str(tmp_path))


def publish_dialogues(store: Store, version: str, rows: pa.Table) -> None:
    parts = [store.write_part("dialogues", version, n, rows.slice(start, 5)) for n, start in enumerate(range(0, 12, 5))]
    receipts = [Receipt({"dialogues": part}) for part in parts]
    store.publish("dialogue", version, ("dialogues",), receipts, made_from={"images": "made"}, config={})


def rows(store: Store) -> dict[str, list[float]]:
    gallery = store.read(store.current("gallery"))
    return dict(zip(gallery["image_id"].to_pylist(), gallery["local"].to_pylist(), strict=True))


def other_summary(dialogues: pa.Table, row: int) -> pa.Table:
    summaries = dialogues["summary"].to_pylist()
    summaries[row] = "a man in a yellow cap with a green bag"
    return dialogues.set_column(
        dialogues.schema.get_field_index("summary"), dialogues.schema.field("summary"), [summaries]
    )


def test_dialogues_in_another_order_give_each_image_its_own_summary(store: Store) -> None:
    index(store.uri, CONFIG)
    before = rows(store)
    dialogues = store.read(store.current("dialogues"))
    publish_dialogues(store, "backwards", dialogues.take(np.arange(IMAGES)[::-1]))
    index(store.uri, CONFIG)
    assert rows(store) == before
    assert len({tuple(row) for row in before.values()}) == IMAGES  # one picture: summaries alone tell them apart


def test_only_the_image_whose_summary_changed_is_embedded_again(store: Store, capsys: pytest.CaptureFixture) -> None:
    index(store.uri, CONFIG)
    before = rows(store)
    changed = list(before)[7]
    dialogues = store.read(store.current("dialogues")).take(np.arange(IMAGES)[::-1])
    publish_dialogues(store, "changed", other_summary(dialogues, IMAGES - 1 - 7))
    index(store.uri, IndexConfig(model="random", images_per_part=5, only_missing=True))
    assert "7 rows stay where they are, 4 are copied, 1 images are embedded" in " ".join(
        capsys.readouterr().err.split()
    )
    after = rows(store)
    assert [image for image in before if before[image] != after[image]] == [changed]


def test_an_image_without_a_dialogue_or_taken_out_is_not_embedded(store: Store) -> None:
    ids = store.read(store.current("images"), ["image_id"])["image_id"].to_pylist()
    publish_dialogues(store, "fewer", store.read(store.current("dialogues")).slice(1))
    hide(store, [ids[4]])
    index(store.uri, CONFIG)
    assert list(rows(store)) == [image for image in ids if image not in (ids[0], ids[4])]
    assert store.read(store.current("rejects/index"))["key"].to_pylist() == [ids[0]]


def test_an_evaluation_asks_with_every_caption_of_the_split_and_shows_every_image(store: Store) -> None:
    queries, images = embed_split(store, EvaluateConfig(model="random", rows_per_part=7))
    captions = store.read(store.current("captions"))
    assert queries["caption_id"].to_pylist() == captions["caption_id"].to_pylist()
    assert images["image_id"].to_pylist() == store.read(store.current("images"))["image_id"].to_pylist()
    index(store.uri, CONFIG)
    found = dict(zip(images["image_id"].to_pylist(), images["local"].to_pylist(), strict=True))
    for image, local in rows(store).items():
        np.testing.assert_allclose(found[image], local, atol=2e-3)  # fp32 and fp16
