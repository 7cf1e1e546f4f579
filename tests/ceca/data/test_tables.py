"""Rows of the shared tables, as columns and as records: their places, their summaries, and pairs with captions."""

from __future__ import annotations

import pytest

from ceca.data.changes import hide
from ceca.data.keys import numbers, spelled
from ceca.data.store import Manifest, Reject, Store, StoreError
from ceca.data.tables import (
    PAIRS,
    ImageRow,
    add_summaries,
    find_captions,
    find_dialogues,
    find_images,
    list_images,
    make_pairs,
    read_keys,
)
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
    for look_up in (
        lambda: add_summaries(store, list_images(store, other), other, store.current("dialogues")),
        lambda: find_dialogues(store, find_images(store, other), store.current("dialogues")),
    ):
        with pytest.raises(StoreError, match="made from images i1, but i2 are current; run the stage `dialogue` again"):
            look_up()


def test_pairs_name_the_place_of_their_image_and_leave_other_images_out(store: Store):
    captions: Manifest = store.current("captions")
    first, _, third, *_ = list_images(store, store.current("images"))
    pairs = make_pairs(store, [third, first], captions)
    assert pairs.schema == PAIRS
    assert pairs.to_pylist() == [
        {"part": part, "row": 0, "identity": identity, "caption": f"a caption of {word}", "summary": ""}
        for part, identity, word in ((0, 0, "word00"), (0, 0, "word00"), (1, 1, "word02"), (1, 1, "word02"))
    ]


# --- columns ------------------------------------------------------------------------------------------------


def test_columns_and_records_describe_the_same_images(store: Store):
    images = store.current("images")
    found, listed = find_images(store, images), list_images(store, images)
    assert spelled(found.keys) == [row.image_id for row in listed]
    assert found.identities.tolist() == [row.identity for row in listed]
    assert images.places(found.rows) == [(row.part, row.row) for row in listed]
    assert images.places(found.rows[[4, 0]]) == [(1, 2), (0, 0)]
    assert len(find_images(store, images, "test")) == 5
    assert len(find_images(store, images, "train")) == 0


def test_dialogues_are_found_by_row_and_images_without_one_are_the_same_rejects(store: Store):
    images, dialogues = store.current("images"), store.current("dialogues")
    found, rejects = find_dialogues(store, find_images(store, images), dialogues)
    rows, expected = add_summaries(store, list_images(store, images), images, dialogues)
    told = store.take(dialogues, dialogues.places(found.told), ["summary"])["summary"].to_pylist()
    assert (spelled(found.keys), told) == ([row.image_id for row in rows], [row.summary for row in rows])
    assert rejects == expected


def test_dialogues_in_another_order_are_found_as_well(store: Store):
    backwards = {"dialogues": write(store, "dialogues", "d2", IDS[4:1:-1], IDS[1::-1])}
    dialogues = publish(store, "dialogue", "d2", backwards, made_from={"images": "i1"})
    found, rejects = find_dialogues(store, find_images(store, store.current("images")), dialogues)
    assert found.told.tolist() == [4, 3, 2, 1, 0]
    assert not rejects


def test_captions_are_found_with_their_image(store: Store):
    images, captions = find_images(store, store.current("images")).take(slice(1, 3)), store.current("captions")
    found = find_captions(store, images, captions)
    texts = store.take(captions, captions.places(found.rows), ["text"])["text"].to_pylist()
    assert texts == ["a caption of word01", "a caption of word01", "a caption of word02", "a caption of word02"]
    assert found.image.tolist() == [0, 0, 1, 1]
    assert found.identities.tolist() == [0, 0, 1, 1]


def test_some_of_the_images_are_taken_with_all_their_columns(store: Store):
    described, _ = find_dialogues(store, find_images(store, store.current("images")), store.current("dialogues"))
    taken = described.take(described.keys != numbers([IDS[1]]))
    assert (spelled(taken.keys), taken.rows.tolist(), taken.told.tolist()) == ([IDS[0], IDS[2]], [0, 2], [0, 2])


def test_erased_images_are_not_found(store: Store):
    hide(store, [IDS[2]], erase=True)
    images = store.current("images")
    assert spelled(find_images(store, images).keys) == [row.image_id for row in list_images(store, images)]


def test_a_table_with_ids_of_another_form_is_an_error_that_names_it(store: Store):
    table = store.read(store.current("dialogues")).slice(0, 1)
    foreign = table.set_column(0, table.schema.field(0), [["person-7"]])
    part = store.write_part("dialogues", "foreign", 0, foreign)
    dialogues = publish(store, "dialogue", "foreign", {"dialogues": [part]}, made_from={"images": "i1"})
    with pytest.raises(StoreError, match="dialogues: keys of images have 16 hex digits"):
        read_keys(store, dialogues)
