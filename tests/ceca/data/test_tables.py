"""Rows of the shared tables, as columns and as records: their places, their summaries, and pairs with captions."""

from __future__ import annotations

import numpy as np
import pytest

from ceca.data.changes import hide
from ceca.data.keys import numbers, spelled
from ceca.data.store import Reject, Store, StoreError
from ceca.data.tables import ImageRow, find_captions, find_dialogues, find_images, list_images, read_keys, read_texts
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


def test_images_are_found_in_order_with_their_places(store: Store):
    images = store.current("images")
    found = find_images(store, images)
    assert spelled(found.keys) == IDS[:5]
    assert images.places(found.rows) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2)]
    assert images.places(found.rows[[4, 0]]) == [(1, 2), (0, 0)]
    assert found.identities.tolist() == [0, 0, 1, 1, 2]
    assert (len(find_images(store, images, "test")), len(find_images(store, images, "train"))) == (5, 0)


def test_records_of_images_say_what_the_tables_say(store: Store):
    images = store.current("images")
    rows = list_images(store, find_images(store, images))
    assert rows[3] == ImageRow(IDS[3], identity=1, split="test", part=1, row=1, source_path="3.jpg", summary="")
    assert store.take(images, [(rows[3].part, rows[3].row)], ["image_id"])["image_id"].to_pylist() == [IDS[3]]
    described, _ = find_dialogues(store, find_images(store, images), store.current("dialogues"))
    assert [row.summary for row in list_images(store, described)] == [f"it is word0{n}" for n in range(3)]
    assert list_images(store, described.take(slice(0))) == []


def test_images_without_a_dialogue_are_rejects(store: Store):
    images = store.current("images")
    found, rejects = find_dialogues(store, find_images(store, images), store.current("dialogues"))
    assert (spelled(found.keys), found.told.tolist()) == (IDS[:3], [0, 1, 2])
    detail = "{}.jpg has no summary; see the rejects of the stage dialogue"
    assert rejects == [Reject(IDS[n], "no_dialogue", detail.format(n)) for n in (3, 4)]


def test_dialogues_about_other_images_are_refused(store: Store):
    other = publish(store, "ingest", "i2", {"images": write(store, "images", "i2", IDS[:5])})
    with pytest.raises(StoreError, match="made from images i1, but i2 are current; run the stage `dialogue` again"):
        find_dialogues(store, find_images(store, other), store.current("dialogues"))


def test_dialogues_in_another_order_are_found_as_well(store: Store):
    backwards = {"dialogues": write(store, "dialogues", "d2", IDS[4:1:-1], IDS[1::-1])}
    dialogues = publish(store, "dialogue", "d2", backwards, made_from={"images": "i1"})
    found, rejects = find_dialogues(store, find_images(store, store.current("images")), dialogues)
    assert found.told.tolist() == [4, 3, 2, 1, 0]
    assert not rejects


def test_captions_are_paired_with_their_image_and_those_of_other_images_are_left_out(store: Store):
    pairs = find_captions(
        store, find_images(store, store.current("images")).take(slice(1, 3)), store.current("captions")
    )
    assert pairs.rows.tolist() == [2, 3, 4, 5]
    assert pairs.image.tolist() == [0, 0, 1, 1]
    assert pairs.identities.tolist() == pairs.said_of.tolist() == [0, 0, 1, 1]
    assert pairs.take(np.array([3, 0])).rows.tolist() == [5, 2]


def test_texts_are_read_part_by_part_and_other_parts_are_not_opened(store: Store, monkeypatch: pytest.MonkeyPatch):
    captions = store.current("captions")
    assert list(read_texts(store, captions, np.array([0, 3, 4, 9]), "text")) == [
        ["a caption of word00", "a caption of word01"],
        ["a caption of word02", "a caption of word04"],
    ]
    opened = []
    read = Store.read_columns
    monkeypatch.setattr(
        Store, "read_columns", lambda *given, **options: opened.append(given[2]) or read(*given, **options)
    )
    assert list(read_texts(store, captions, np.array([9]), "text")) == [["a caption of word04"]]
    assert list(read_texts(store, captions, np.zeros(0, int), "text")) == []
    assert opened == [1]


def test_some_of_the_images_are_taken_with_all_their_columns(store: Store):
    described, _ = find_dialogues(store, find_images(store, store.current("images")), store.current("dialogues"))
    taken = described.take(described.keys != numbers([IDS[1]]))
    assert (spelled(taken.keys), taken.rows.tolist(), taken.told.tolist()) == ([IDS[0], IDS[2]], [0, 2], [0, 2])


def test_erased_images_are_not_found(store: Store):
    hide(store, [IDS[2]], erase=True)
    found = find_images(store, store.current("images"))
    assert (spelled(found.keys), found.rows.tolist()) == ([*IDS[:2], *IDS[3:5]], [0, 1, 3, 4])


def test_a_table_with_ids_of_another_form_is_an_error_that_names_it(store: Store):
    table = store.read(store.current("dialogues")).slice(0, 1)
    foreign = table.set_column(0, table.schema.field(0), [["person-7"]])
    part = store.write_part("dialogues", "foreign", 0, foreign)
    dialogues = publish(store, "dialogue", "foreign", {"dialogues": [part]}, made_from={"images": "i1"})
    with pytest.raises(StoreError, match="dialogues: keys of images have 16 hex digits"):
        read_keys(store, dialogues)
