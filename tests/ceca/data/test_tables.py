"""Rows of the shared tables as records: their places, their summaries, and pairs with captions."""

from __future__ import annotations

import pytest

from ceca.data.store import Manifest, Reject, Store, StoreError
from ceca.data.tables import PAIRS, ImageRow, add_summaries, list_images, make_pairs
from tests.ceca.data.dataset import IDS, filled_with, publish, write


@pytest.fixture
def store() -> Store:
    """Images and captions in two parts, and dialogues about the first three images."""
    store = filled_with()
    tables = {table: write(store, table, "i1", IDS[:2], IDS[2:5]) for table in ("captions", "images")}
    images = publish(store, "ingest", "i1", tables)
    parts = write(store, "dialogues", "d1", IDS[:3])
    publish(store, "dialogue", "d1", {"dialogues": parts}, made_from={"images": images.version})
    return store


def place(row: ImageRow) -> tuple[str, int, int]:
    return row.image_id, row.part, row.row


def test_images_are_listed_in_order_with_their_places(store: Store):
    images = store.current("images")
    rows = list_images(store, images)
    assert [place(row) for row in rows] == [
        (IDS[0], 0, 0),
        (IDS[1], 0, 1),
        (IDS[2], 1, 0),
        (IDS[3], 1, 1),
        (IDS[4], 1, 2),
    ]
    assert rows[3] == ImageRow(IDS[3], identity=1, split="test", part=1, row=1, source_path="3.jpg", summary="")
    assert store.take(images, [(rows[3].part, rows[3].row)], ["image_id"])["image_id"].to_pylist() == [IDS[3]]
    assert list_images(store, images, "test") == rows
    assert list_images(store, images, "train") == []


def test_images_get_their_summaries_and_images_without_one_are_rejects(store: Store):
    images = store.current("images")
    rows, rejects = add_summaries(store, list_images(store, images), images, store.current("dialogues"))
    assert [(row.image_id, row.summary) for row in rows] == [
        (image, f"it is word0{n}") for n, image in enumerate(IDS[:3])
    ]
    detail = "{}.jpg has no summary; see the rejects of the stage dialogue"
    assert rejects == [Reject(IDS[n], "no_dialogue", detail.format(n)) for n in (3, 4)]


def test_dialogues_about_other_images_are_refused(store: Store):
    other = publish(store, "ingest", "i2", {"images": write(store, "images", "i2", IDS[:5])})
    with pytest.raises(StoreError, match="made from images i1, but i2 are current; run the stage `dialogue` again"):
        add_summaries(store, list_images(store, other), other, store.current("dialogues"))


def test_pairs_name_the_place_of_their_image_and_leave_other_images_out(store: Store):
    captions: Manifest = store.current("captions")
    first, _, third, *_ = list_images(store, store.current("images"))
    pairs = make_pairs(store, [third, first], captions)
    assert pairs.schema == PAIRS
    assert pairs.to_pylist() == [
        {"part": part, "row": 0, "identity": identity, "caption": f"a caption of {word}", "summary": ""}
        for part, identity, word in ((0, 0, "word00"), (0, 0, "word00"), (1, 1, "word02"), (1, 1, "word02"))
    ]
