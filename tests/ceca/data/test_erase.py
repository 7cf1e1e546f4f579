"""Erasing: no byte of an image is left in any version of any table, and all other rows are."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ceca.data import schema
from ceca.data.changes import hide, pending_erasures, removed_images, write_added
from ceca.data.erase import erase, finish
from ceca.data.store import Receipt, Reject, Store, StoreError
from tests.ceca.data.dataset import (
    GONE,
    IDS,
    SCHEMAS,
    assert_erased,
    contents,
    decoded,
    filled_with,
    only,
    publish,
    state,
    table_of,
    without,
    word,
    write,
)


def test_nothing_of_the_images_is_left_and_everything_else_is(filled):
    store = filled_with(filled)
    before = state(store)
    name = hide(store, GONE, erase=True)
    assert pending_erasures(store) == [name]
    steps: list[tuple[str, int]] = []
    erased = finish(store, name, watch=lambda *step: steps.append(step))

    assert_erased(store, GONE)
    assert state(store) == without(before, GONE)
    assert store.current("gallery").version == "g2"
    assert [part.path[:13] for part in store.current("gallery").parts] == [
        "g1/part-00000",
        "g2/part-00000",
        "g2/part-00001",
    ]
    assert decoded(store.read_bytes("images", store.current("images").parts[0].path)).schema == schema.IMAGES
    assert pending_erasures(store) == []
    assert removed_images(store) == set(GONE)
    assert erased == {
        "added/digest": 2,
        "arrivals": 1,
        "attributes": 8,
        "captions": 16,
        "dialogues": 4,
        "evaluations/digest/test.queries.parquet": 8,
        "evaluations/digest/test/images": 4,
        "evaluations/digest/test/queries": 8,
        "failed": 1,
        "gallery": 6,
        "images": 8,
        "rejects/dialogue": 1,
        "rejects/ingest": 4,
    }
    assert all(len({total for what, total in steps if what == doing}) == 1 for doing, _ in steps)
    assert all(sum(what == doing for what, _ in steps) == total for doing, total in steps)


def test_what_holds_none_of_the_images_is_not_touched(filled):
    store = filled_with(filled)
    erase(store, GONE)
    after = contents(store)
    (left,) = only(filled, "gallery/g3/part-00002")
    untouched = ["models/m/digest/curve.parquet", left, f"arrivals/{IDS[6]}.json"]
    assert [after[name] for name in untouched] == [filled[name] for name in untouched]
    assert erase(store, GONE) == {}
    assert contents(store) == after
    assert erase(store, []) == {}
    assert erase(store, ["0" * 16, IDS[0][:8]]) == {}
    assert contents(store) == after


def test_unfinished_work_begins_anew_only_where_its_list_of_images_changes(filled):
    store = filled_with(filled)
    write_added(store, "digest", table_of("added", [IDS[9]]).set_column(0, SCHEMAS["added"].field(0), [["new"]]))
    assert erase(store, ["new"]) == {"added/digest": 1}
    assert store.receipts("index", "g3")
    erase(store, [IDS[0]])
    assert not store.receipts("index", "g3")


def test_a_reject_in_a_receipt_alone_is_erased_too():
    store = filled_with()
    store.write_receipt("ingest", "v", 0, Receipt({}, (Reject("5.jpg", "not_an_image", word(IDS[5])),)))
    erase(store, [IDS[6]])
    assert store.receipts("ingest", "v")
    erase(store, [IDS[5]])
    assert store.walk() == []


def test_a_part_is_erased_from_more_than_once_and_keeps_its_number(filled):
    store = filled_with(filled)
    for image in GONE:
        erase(store, [image])
    once = filled_with(filled)
    erase(once, GONE)
    assert state(store) == state(once)
    assert {name: content for name, content in contents(store).items() if "part-" in name} == {
        name: content for name, content in contents(once).items() if "part-" in name
    }


@settings(max_examples=25, deadline=None)
@given(
    units=st.lists(st.lists(st.sampled_from(IDS), max_size=4, unique=True), min_size=1, max_size=5),
    versions=st.lists(st.sets(st.integers(0, 4)), max_size=3),
    gone=st.sets(st.sampled_from(IDS), max_size=6),
)
def test_any_versions_of_any_parts_keep_exactly_the_other_rows(units, versions, gone):
    store = filled_with()
    parts = write(store, "gallery", "parts", *(unit for unit in units if unit))
    for number, shared in enumerate(versions):
        publish(store, "index", f"v{number}", {"gallery": [parts[n] for n in sorted(shared) if n < len(parts)]})
    before = state(store)
    erase(store, gone)
    assert_erased(store, gone)
    assert state(store) == without(before, gone)


def test_on_s3(s3_environment, filled):
    store = filled_with(only(filled, "gallery/g", "gallery/manifest", "added", "arrivals", ".work"), "s3://bucket/")
    before = state(store)
    erase(store, GONE)
    assert_erased(store, GONE)
    assert state(store) == without(before, GONE)


def test_a_damaged_object_stops_it_before_it_says_that_all_is_erased(filled):
    for damage in (lambda content: content[:-9], lambda content: content.replace(b"bytes of", b"BYTES OF")):
        store = filled_with(filled)
        place = ("images", store.current("images").parts[0].path)
        store.write_bytes(damage(store.read_bytes(*place)), *place)
        name = hide(store, GONE, erase=True)
        with pytest.raises(StoreError, match=r"part-00000-[0-9a-f]{8}\.parquet.*(ArrowInvalid|is damaged)"):
            finish(store, name)
        assert pending_erasures(store) == [name]
    with pytest.raises(StoreError, match="no removal"):
        finish(store, "nothing")


def test_an_erasure_below_a_name_that_looks_like_a_pattern_touches_no_neighbour(filled, s3_environment):
    some = only(filled, "gallery/g1", "gallery/manifest", "added", "arrivals")
    stores = [
        Store(f"s3://bucket/{name}") for name in ("erased[1]", "erased1")
    ]  # the first, as a pattern, is the second
    for store in stores:
        for name, content in some.items():
            store.write_bytes(content, name)
    before = contents(stores[1])
    erase(stores[0], GONE)
    assert_erased(stores[0], GONE)
    assert contents(stores[1]) == before
