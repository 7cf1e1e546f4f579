"""What a catalogue keeps of an edition's rows, and what it reads again for the next edition."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ceca.data.changes import hide, write_added
from ceca.data.keys import Positions, numbers, spelled
from ceca.data.schema import TIME
from ceca.data.store import Receipt, Store
from ceca.search.catalogue import Catalogue, Recent
from ceca.search.columns import Columns, open_columns
from ceca.search.edition import Edition
from ceca.search.sources import StoredPart, list_sources
from tests.ceca.data.dataset import IDS, table_of, word, write


@pytest.fixture
def edition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Edition:
    """Ten images in two parts of each table, without the last two."""
    monkeypatch.setenv("CECA_CACHE", str(tmp_path / "cache"))
    store = Store(str(tmp_path / "data"))
    for table in ("images", "dialogues", "gallery"):
        receipts = [Receipt({table: part}) for part in write(store, table, "v", IDS[:6], IDS[6:10])]
        store.publish(table, "v", (table,), receipts, made_from={}, config={})
    return Edition(store.uri, "m", "d", 2, "v", "v", "v", added=(), removed=())


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The parts whose small columns were read: table and number."""
    seen: list[tuple[str, int]] = []
    describe = StoredPart.describe
    monkeypatch.setattr(
        StoredPart,
        "describe",
        lambda self, names: seen.append((self.manifest.table, self.number)) or describe(self, names),
    )
    return seen


def test_an_index_finds_the_first_row_of_an_id_and_nothing_else():
    index = Positions(np.array([5, 2**64 - 1, 3, 5], np.uint64), first=True)
    assert index.find(np.array([5, 4, 3, 2**64 - 1, 0], np.uint64)).tolist() == [0, -1, 2, 1, -1]
    assert index.of("0000000000000003") == 2
    assert index.of("0000000000000006") is None
    assert Positions(np.empty(0, np.uint64), first=True).find(np.array([1], np.uint64)).tolist() == [-1]


def test_every_image_has_its_own_words_and_facets(edition: Edition):
    catalogue = Catalogue(edition)
    assert len(catalogue) == 10
    assert catalogue.summaries(IDS[9::-1]) == [f"it is {word(image)}" for image in IDS[9::-1]]
    (told,) = catalogue.told([IDS[7]])
    assert told is not None
    assert told.turns == [("what?", word(IDS[7]))]
    assert catalogue.summary(IDS[11]) is None
    assert IDS[11] not in catalogue
    assert catalogue.source_paths([IDS[8], IDS[11], IDS[0]]) == ["8.jpg", None, "0.jpg"]
    place = catalogue.positions([IDS[3]])[0]
    columns = catalogue.facets.columns
    assert [columns[name][place].as_py() for name in ("identity", "split", "camera", "hat")] == [
        "1",
        "test",
        word(IDS[3]),
        word(IDS[3]),
    ]


def test_a_removed_image_is_in_no_facet_and_an_added_one_is_in_all(edition: Edition):
    store = edition.store
    hide(store, [IDS[3]])
    name = write_added(store, "d", table_of("added", [IDS[10]]))
    catalogue = Catalogue(dataclasses.replace(edition, removed=tuple(store.names("removed")), added=(name,)))
    assert IDS[3] not in catalogue
    assert word(IDS[3]) not in catalogue.facets.values("camera")
    assert word(IDS[10]) in catalogue.facets.values("camera")
    assert catalogue.summary(IDS[10]) == f"it is {word(IDS[10])}"
    picture = catalogue.picture(IDS[10])
    assert picture is not None
    assert picture.content == f"bytes of {word(IDS[10])}".encode() * 9


def test_the_next_edition_reads_only_what_is_new(edition: Edition, read: list[tuple[str, int]]):
    before = Catalogue(edition)
    before.summaries(IDS[:10])
    assert sorted(read) == [(table, part) for table in ("dialogues", "gallery", "images") for part in (0, 1)]
    read.clear()
    name = write_added(edition.store, "d", table_of("added", [IDS[10]]))
    after = Catalogue(dataclasses.replace(edition, added=(name,)), before)
    assert read == []
    assert len(after) == 11
    fresh = Catalogue(after.edition)
    for facet, column in fresh.facets.columns.items():
        assert after.facets.columns[facet].to_pylist() == column.to_pylist()
    assert after.summaries(IDS[:11]) == fresh.summaries(IDS[:11])


def test_a_part_that_was_written_again_is_read_again_and_its_words_are_forgotten(
    edition: Edition, tmp_path: Path, read: list[tuple[str, int]]
):
    before = Catalogue(edition)
    before.summary(IDS[0])
    store = edition.store
    old = edition.told()
    assert old is not None
    (part,) = write(store, "dialogues", "v", IDS[1:6])
    store.make_current([dataclasses.replace(old, parts=(part, old.parts[1]), rows=9)])
    store.remove("dialogues", old.parts[0].path)
    with pytest.raises(FileNotFoundError):
        before.told([IDS[1]])
    read.clear()
    after = Catalogue(edition, before)
    assert read == [("dialogues", 0)]
    assert after.summaries(IDS[:2]) == [None, f"it is {word(IDS[1])}"]
    assert word(IDS[0]) not in after.facets.values("hat")
    files = list((tmp_path / "cache" / "columns").glob("*/*"))
    assert len(files) == 3
    (dialogues,) = (file.read_bytes() for file in files if file.parent.name.endswith("dialogues"))
    assert word(IDS[0]).encode() not in dialogues
    assert word(IDS[1]).encode() in dialogues


def test_the_next_process_of_a_machine_reads_no_part(edition: Edition, read: list[tuple[str, int]]):
    before = Catalogue(edition)
    read.clear()
    after = Catalogue(edition)
    assert read == []
    for facet, column in before.facets.columns.items():
        assert after.facets.columns[facet].to_pylist() == column.to_pylist()
    assert after.summaries(IDS) == before.summaries(IDS)


def test_times_are_kept_by_this_machine_and_for_the_next_edition(edition: Edition, read: list[tuple[str, int]]):
    store, first = edition.store, datetime(2026, 1, 31, 12, tzinfo=UTC)
    times = [None, *(first + timedelta(days=day) for day in range(5))]
    timed = table_of("images", IDS[:6]).append_column(TIME, pa.array(times, TIME.type))
    parts = [store.write_part("images", "t", 0, timed), *write(store, "images", "u", IDS[6:10])]
    store.publish("images", "t", ("images",), [Receipt({"images": part}) for part in parts], made_from={}, config={})
    edition = dataclasses.replace(edition, images="t")
    added = table_of("added", [IDS[10]])
    place = added.schema.get_field_index("time")
    new = added.set_column(place, TIME, pa.array([first], TIME.type))
    later = dataclasses.replace(edition, added=tuple(write_added(store, "d", table) for table in (added, new)))
    before = Catalogue(edition)
    read.clear()
    for catalogue in (before, Catalogue(edition), Catalogue(later, before), Catalogue(later)):
        assert catalogue.facets.values("time") == ["2026-01-31T12:00:00Z", "2026-02-04T12:00:00Z"]
        found = catalogue.facets.where({"time": ["2026-01-31T12..2026-02-02"]})
        expected = {*IDS[1:4]}
        assert {spelled(catalogue.ids)[row] for row in np.flatnonzero(found)} == expected
    assert read == []


def test_files_of_an_earlier_version_without_times_are_not_used(edition: Edition, read: list[tuple[str, int]]):
    images = list_sources(edition, "images")
    open_columns(edition, "images", images, ("camera",))
    read.clear()
    open_columns(edition, "images", images, ("camera", "time"))
    assert len(read) == 2


def test_a_damaged_file_of_this_machine_is_made_again(edition: Edition, tmp_path: Path, read: list[tuple[str, int]]):
    Catalogue(edition)
    for file in (tmp_path / "cache" / "columns").glob("*/*"):
        file.write_bytes(file.read_bytes()[:100])
    read.clear()
    assert Catalogue(edition).facets.values("split") == ["test"]
    assert len(read) == 6


def test_columns_of_no_objects_are_empty():
    columns = Columns([], ("camera",))
    assert columns.index.find(numbers(IDS[:2])).tolist() == [-1, -1]


def test_of_a_repeated_attribute_the_first_value_counts(edition: Edition):
    table = table_of("dialogues", IDS[:2])
    maps = pa.array([[("hat", "cap"), ("bag", None), ("hat", "none")], []], table.schema.field("attributes").type)
    table = table.set_column(table.schema.get_field_index("attributes"), table.schema.field("attributes"), maps)
    part = edition.store.write_part("dialogues", "w", 0, table)
    edition.store.publish("dialogues", "w", ("dialogues",), [Receipt({"dialogues": part})], made_from={}, config={})
    catalogue = Catalogue(dataclasses.replace(edition, dialogues="w"))
    assert catalogue.facets.values("hat") == ["cap"]
    assert "bag" not in catalogue.facets.columns


def test_what_was_not_used_for_longest_goes_first():
    recent: Recent[str] = Recent(10)
    recent.keep("a", "A", 4)
    recent.keep("b", "B", 4)
    assert recent.get("a") == "A"
    recent.keep("c", "C", 4)
    assert (recent.get("a"), recent.get("b"), recent.get("c")) == ("A", None, "C")
    recent.keep("large", "L", 100)  # larger than the limit, and kept alone
    assert (recent.get("c"), recent.get("large")) == (None, "L")
