"""Captions and attributes of one run of ingest are never read beside images of another."""

from __future__ import annotations

import pytest

from ceca.config import TrainConfig
from ceca.data.store import Receipt, Store, StoreError
from ceca.dialogue.attributes import PERSON, read_vocabulary
from jobs.training.sets import input_tables
from tests.ceca.data.dataset import IDS, filled_with, publish, table_of, write

TABLES = ("captions", "attributes", "images")


def ingest(store: Store, version: str, tables: tuple[str, ...] = TABLES) -> None:
    parts = {table: write(store, table, version, IDS[: int(version[1:])]) for table in tables}
    publish(store, "ingest", version, parts)


def make_current(store: Store, table: str, version: str) -> None:
    """As another process does that publishes at the same time."""
    store.write_bytes(store.read_bytes(table, version, "manifest.json"), table, "manifest.json")


@pytest.fixture
def store() -> Store:
    store = filled_with()
    ingest(store, "i4")
    ingest(store, "i8")
    return store


@pytest.mark.parametrize("others", [("captions",), ("attributes",), ("captions", "attributes"), ("images",)])
def test_after_overlapping_runs_or_a_kill_between_two_tables_those_of_one_run_are_read(store, others):
    for table in others:
        make_current(store, table, "i4")
    images = store.current("images")
    assert store.captions(images).version == images.version
    attributes = store.belonging("attributes", images)
    assert attributes is not None
    assert attributes.version == images.version
    publish(store, "dialogue", "d1", {"dialogues": write(store, "dialogues", "d1", IDS[:4])})
    tables = input_tables(store, TrainConfig(name="x"))
    assert (tables["images"], tables["captions"]) == (images, store.manifest("captions", images.version))


def test_captions_that_say_whose_they_are_belong_to_those_images(store):
    ingest(store, "i6", ("images",))
    parts = write(store, "captions", "c1", IDS[:6])
    publish(store, "words", "c1", {"captions": parts}, made_from={"images": "i6"})
    assert store.captions(store.current("images")).version == "c1"
    images = store.manifest("images", "i4")
    assert images is not None
    assert store.captions(images).version == "i4"


def test_images_without_captions_of_their_run_are_an_error_and_not_another_runs(store):
    ingest(store, "i6", ("images",))
    with pytest.raises(StoreError, match=r"no captions belong to images i6 in .*; run the stage `ingest` again"):
        store.captions(store.current("images"))
    assert store.belonging("attributes", store.current("images")) is None


def test_the_vocabulary_is_that_of_the_images_attributes(store):
    part = store.write_part("attributes", "i9", 0, table_of("attributes", IDS[:9]))
    images = store.write_part("images", "i9", 0, table_of("images", IDS[:9]))
    receipts = [Receipt({"attributes": part, "images": images})]
    notes = {"vocabulary": {"hat": ["cap"]}}
    store.publish("ingest", "i9", ("attributes", "images"), receipts, made_from={}, config={}, notes=notes)
    assert read_vocabulary(store) == {"hat": ("cap",)}
    ingest(store, "i6", ("images",))  # of people who were not drawn; the attributes stay current
    assert read_vocabulary(store) == PERSON
