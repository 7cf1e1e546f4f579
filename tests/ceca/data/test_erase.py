"""Erasing: no byte of an image is left in any version of any table, all other rows are, whenever it is killed."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import os
import threading
import time
import uuid
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ceca.data import erase as erasing
from ceca.data import schema
from ceca.data.changes import added_images, hide, mentioned_images, pending_erasures, removed_images, write_added
from ceca.data.erase import erase, finish, undisturbed
from ceca.data.lease import Holders, holding
from ceca.data.schema import image_id
from ceca.data.store import Manifest, Part, Receipt, Reject, Store, StoreError
from ceca.errors import UserError
from jobs.remove import remove
from jobs.runtime.alone import alone

IDS = [image_id(f"{number}.jpg") for number in range(12)]
GONE = (IDS[1], IDS[4], IDS[5], IDS[11])
WORK = ".work"


def word(image: str) -> str:
    """What every text and the bytes of an image hold, and nothing of another image does."""
    return f"word{IDS.index(image):02d}"


def rows_of(table: str, image: str) -> list[dict[str, Any]]:
    number, said = IDS.index(image), word(image)
    embedded = {"global": [number + 0.5] * 2, "local": [number + 0.25] * 2}
    known = {"image_id": image, "identity": number // 2, "split": "test"}
    told = {"turns": [{"question": "what?", "answer": said}], "summary": f"it is {said}", "attributes": [("hat", said)]}
    caption = {"caption_id": f"{image}-0", **known, "text": f"a caption of {said}"}
    seen = {"camera": said, "image": f"bytes of {said}".encode() * 9, "width": 1, "height": 1}
    seen["source_path"] = f"{number}.jpg"
    made = {"model": "m", "prompt_version": "1", "generation_settings": "{}"}
    rows: dict[str, list[dict[str, Any]]] = {
        "images": [{**known, **seen}],
        "captions": [caption, {**caption, "caption_id": f"{image}-1"}],
        "attributes": [
            {"image_id": image, "view": said, "lighting": "day", "occluded": False, "attributes": [("hat", said)]}
        ],
        "dialogues": [
            {"image_id": image, **told, "flags": [], **made}
            | dict.fromkeys(("prompt_tokens", "cached_tokens", "completion_tokens"), 1)
        ],
        "gallery": [{**known, **embedded, "model_digest": "d"}],
        "queries": [{"caption_id": f"{image}-{nth}", "identity": number // 2, **embedded} for nth in range(2)],
        "added": [{**known, **seen, **told, "flags": [], "dialogue_model": "m", **embedded}],
    }
    return rows[table]


SCHEMAS = {
    "images": schema.IMAGES,
    "captions": schema.CAPTIONS,
    "attributes": schema.ATTRIBUTES,
    "dialogues": schema.DIALOGUES,
    "gallery": schema.gallery(2, 2),
    "queries": schema.queries(2, 2),
    "added": schema.added(2, 2),
}


def table_of(table: str, images: Collection[str]) -> pa.Table:
    return pa.Table.from_pylist([row for image in images for row in rows_of(table, image)], SCHEMAS[table])


def write(store: Store, place: str, version: str, *units: Collection[str], first: int = 0) -> list[Part]:
    kind = place.rpartition("/")[2]
    kind = "gallery" if place.startswith("evaluations") and kind == "images" else kind
    return [store.write_part(place, version, n, table_of(kind, unit)) for n, unit in enumerate(units, first)]


def publish(store: Store, stage: str, version: str, parts: dict[str, list[Part]], rejects: Any = ()) -> Manifest:
    receipts = [Receipt({table: part}) for table, written in parts.items() for part in written]
    made = store.publish(stage, version, tuple(parts), receipts, made_from={}, config={}, rejects=rejects)
    return made[tuple(parts)[-1]]


def fill(store: Store) -> None:
    """A dataset with all that can hold something of an image; GONE are in all of it, once alone in a part."""
    thirds = IDS[:4], IDS[4:8], IDS[8:]
    for version, units in (("i1", (IDS[:6], IDS[6:])), ("i2", thirds)):
        rejects = [
            Reject("5.jpg", "duplicated_record", word(IDS[5])),
            Reject(f"{IDS[1]}-1", "empty_caption", word(IDS[1])),
            Reject("6.jpg", "duplicated_record", word(IDS[6])),
        ]
        tables = ("captions", "attributes", "images")
        publish(store, "ingest", version, {table: write(store, table, version, *units) for table in tables}, rejects)
    asked = write(store, "dialogues", "d1", IDS[:4], IDS[4:6])
    publish(store, "dialogue", "d1", {"dialogues": asked}, [Reject(IDS[11], "no_answer", word(IDS[11]))])
    asked += write(store, "dialogues", "d2", IDS[6:])
    publish(store, "dialogue", "d2", {"dialogues": asked})
    embedded = write(store, "gallery", "g1", IDS[:4], IDS[4:6])
    publish(store, "index", "g1", {"gallery": embedded})
    publish(store, "index", "g2", {"gallery": [*embedded, *write(store, "gallery", "g2", IDS[6:9], IDS[9:])]})
    place = "evaluations/digest/test"
    sides = {
        f"{place}/{side}": write(store, f"{place}/{side}", "e1", IDS[:6], IDS[6:]) for side in ("queries", "images")
    }
    publish(store, "evaluate", "e1", sides)
    figures = table_of("captions", IDS).select(["caption_id", "identity", "text"])
    sink = pa.BufferOutputStream()
    pq.write_table(figures, sink)
    store.write_bytes(sink.getvalue().to_pybytes(), f"{place}.queries.parquet")
    for images in ([IDS[0]], [IDS[1]], [IDS[2], IDS[4]]):
        write_added(store, "digest", table_of("added", images))
    for folder, images in (("arrivals", (IDS[5], IDS[6])), ("failed", (IDS[11], IDS[7]))):
        for image in images:
            store.write_json({"image": word(image)}, folder, f"{image}.json")
    # What a killed stage leaves: parts that no manifest names, and receipts.
    (left,) = write(store, "gallery", "g3", IDS[3:6], first=1)
    write(store, "gallery", "g3", IDS[:1], first=2)
    receipt = Receipt({"gallery": left}, (Reject(IDS[11], "not_an_image", word(IDS[11])),))
    store.write_receipt("index", "g3", 1, receipt)
    curve = pa.BufferOutputStream()
    pq.write_table(pa.table({"loss": [1.0]}), curve)
    store.write_bytes(curve.getvalue().to_pybytes(), "models", "m", "digest", "curve.parquet")
    store.write_json({"digest": "digest"}, "models", "m", "manifest.json")


def contents(store: Store) -> dict[str, bytes]:
    return {name: store.read_bytes(name) for name in store.walk()}


def filled_with(objects: dict[str, bytes] | None = None, place: str = "memory://") -> Store:
    store = Store(f"{place}{uuid.uuid4().hex}")
    for name, content in (objects or {}).items():
        store.fs.pipe_file(store.path(name), content)
    return store


def only(objects: dict[str, bytes], *kinds: str) -> dict[str, bytes]:
    return {name: content for name, content in objects.items() if name.startswith(kinds)}


@pytest.fixture(scope="module")
def filled() -> dict[str, bytes]:
    store = filled_with()
    fill(store)
    return contents(store)


@pytest.fixture(autouse=True)
def _nothing_stays_filled_with():
    yield
    fsspec.filesystem("memory").store.clear()


def decoded(content: bytes) -> pa.Table:
    return pq.read_table(pa.BufferReader(content))


@functools.cache
def rows_in(content: bytes) -> list[dict[str, Any]]:
    return decoded(content).to_pylist()


@functools.cache
def text_in(content: bytes) -> bytes:
    """All that a reader of this object could find, encoded or not."""
    return content + (repr(rows_in(content)).encode() if content[:4] == b"PAR1" else b"")


def is_of(row: dict[str, Any], ids: Collection[str]) -> bool:
    texts = json.dumps(row, default=str)
    return any(image in texts or word(image) in texts for image in ids)


def state(store: Store) -> dict[str, list[dict[str, Any]]]:
    """What readers see: the rows of each manifest in order, of each object without one, and of all objects added."""
    objects, found = contents(store), {}
    for name, content in objects.items():
        if name.endswith("manifest.json") and "parts" in (manifest := json.loads(content)):
            rows = []
            for part in manifest["parts"]:
                written = objects[f"{manifest['table']}/{part['path']}"]
                assert (len(written), hashlib.sha256(written).hexdigest()) == (part["bytes"], part["sha256"])
                assert len(rows_in(written)) == part["rows"]
                rows += rows_in(written)
            assert len(rows) == manifest["rows"]
            found[name] = rows
        elif name.endswith(".queries.parquet"):
            found[name] = rows_in(content)
    added = {
        row["image_id"]: row
        for name, content in objects.items()
        if name.startswith("added/")
        for row in rows_in(content)
    }
    found["added"] = [added[image] for image in sorted(added)]
    return found


def without(before: dict[str, list[dict[str, Any]]], ids: Collection[str]) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [row for row in rows if not (is_of(row, ids) or image_id(str(row.get("key"))) in ids)]
        for name, rows in before.items()
    }


def assert_erased(store: Store, ids: Collection[str]) -> None:
    for name, content in contents(store).items():
        if name.startswith("removed/"):
            continue
        text = text_in(content)
        left = [image for image in ids if image.encode() in text or word(image).encode() in text]
        assert not left, name


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
    untouched = ["models/m/digest/curve.parquet", "gallery/g3/part-00002.parquet", f"arrivals/{IDS[6]}.json"]
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


class Killed(BaseException):
    """The process ends here."""


def test_killed_at_any_write_it_loses_nothing_and_the_same_call_finishes(filled, monkeypatch):
    kinds = ("images/i2", "images/manifest", "dialogues", "gallery", "added", "arrivals", ".work", "rejects/dialogue")
    some = only(filled, *kinds, "evaluations/digest/test.")
    before = state(filled_with(some))
    expected = without(before, GONE)
    methods = {name: getattr(Store, name) for name in ("write_bytes", "remove")}

    def die_at(last: int) -> None:
        calls = itertools.count(1)
        for name, method in methods.items():

            def call(self: Store, *arguments: Any, method: Any = method) -> None:
                if next(calls) >= last:
                    raise Killed
                method(self, *arguments)

            monkeypatch.setattr(Store, name, call)

    for last in itertools.count(1):
        store = filled_with(some)
        name = hide(store, GONE, erase=True)
        die_at(last)
        try:
            finish(store, name)
        except Killed:
            finished = False
        else:
            finished = True
        for method in methods.items():
            monkeypatch.setattr(Store, *method)
        for place, rows in state(store).items():  # a reader sees the old or the new, and of what was added some
            assert rows in (before[place], expected[place]) or place == "added"
            assert [row for row in rows if row in expected[place]] == expected[place]
        if finished:
            break
        assert pending_erasures(store) == [name]
        finish(store, name)
        assert_erased(store, GONE)
        assert state(store) == expected
        assert pending_erasures(store) == []
        fsspec.filesystem("memory").store.clear()
    assert last > 30


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


def test_a_manifest_that_another_erasure_wrote_again_is_seen_to(filled, monkeypatch):
    store = filled_with(filled)
    before = state(store)
    old = {
        name: content
        for name, content in filled.items()
        if name in ("images/manifest.json", "gallery/g1/manifest.json")
    }
    remove_object = Store.remove

    def late(self: Store, *names: str) -> None:
        remove_object(self, *names)
        for name in [name for name in old if name.split("/")[0] == "/".join(names).split("/")[0]]:
            store.write_bytes(old.pop(name), name)

    monkeypatch.setattr(Store, "remove", late)
    erase(store, GONE)
    assert not old
    assert state(store) == without(before, GONE)


def test_two_erasures_at_a_time_lose_nothing(filled):
    store = filled_with(filled)
    before = state(store)
    names = [hide(store, [image], erase=True) for image in GONE]
    with ThreadPoolExecutor(len(names)) as processes:
        list(processes.map(lambda name: finish(Store(store.uri), name), names))
    assert pending_erasures(store) == []
    assert_erased(store, GONE)
    assert state(store) == without(before, GONE)


def test_on_disk_what_was_being_written_aside_goes_too(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    fill(store)
    before = state(store)
    asides = [tmp_path / "images" / "i3" / f"part-0.parquet.{uuid.uuid4().hex}.tmp" for _ in range(2)]
    asides[0].parent.mkdir()
    for aside in asides:
        aside.write_bytes(word(GONE[0]).encode())
    os.utime(asides[0], (0, 0))
    monkeypatch.setattr(erasing, "UNTOUCHED", 0.3)
    started = time.monotonic()
    erase(store, GONE)
    assert time.monotonic() - started > 0.2  # the other could have been finished still
    assert_erased(store, GONE)
    assert state(store) == without(before, GONE)


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
        with pytest.raises(StoreError, match=r"part-00000\.parquet.*(ArrowInvalid|is damaged)"):
            finish(store, name)
        assert pending_erasures(store) == [name]
    with pytest.raises(StoreError, match="no removal"):
        finish(store, "nothing")


def test_what_comes_back_while_it_is_erased_is_told(filled, monkeypatch):
    store = filled_with(filled)
    others = iter(IDS[5:])

    def write_back(store: Store, digest: str, rows: pa.Table) -> str:
        return write_added(store, digest, table_of("added", [IDS[1], next(others)]))

    monkeypatch.setattr(erasing, "write_added", write_back)
    with pytest.raises(StoreError, match="comes back"):
        erase(store, [IDS[1], IDS[4]])


def test_what_was_erased_and_came_back_goes_with_the_next_erasure(filled):
    store = filled_with(filled)
    finish(store, hide(store, [IDS[1]], erase=True))
    write_added(store, "digest", table_of("added", [IDS[1]]))
    assert pending_erasures(store) == []
    finish(store, hide(store, [IDS[4]], erase=True))
    assert_erased(store, [IDS[1], IDS[4]])


def test_removals_with_and_without_erasing_are_told_apart():
    store = filled_with()
    shown = hide(store, [IDS[0]])
    assert store.read_json("removed", f"{shown}.json")["erase"] is False
    assert pending_erasures(store) == []
    assert hide(store, [IDS[0]], erase=True) == shown
    assert hide(store, [IDS[0]]) == shown  # said once, it stays so
    other = hide(store, [IDS[2], IDS[1]], erase=True)
    assert pending_erasures(store) == sorted([shown, other])
    finish(store, *pending_erasures(store))
    assert pending_erasures(store) == []
    assert removed_images(store) == set(IDS[:3])
    assert hide(store, [IDS[0]], erase=True) == shown  # it came back with another ingest
    assert pending_erasures(store) == [shown]


def test_the_command_erases_and_finishes_what_was_interrupted(filled, capsys, monkeypatch):
    store = filled_with(filled)
    before = state(store)
    assert remove(store.uri, images=(IDS[7],)) == {IDS[7]}
    assert state(store) == before
    assert remove(store.uri, identities=(2,), erase=True) == {IDS[4], IDS[5]}
    assert state(store) == without(before, {IDS[4], IDS[5]})
    said = " ".join(capsys.readouterr().err.split())
    assert "4 of images" in said
    assert "models trained with the images" in said

    with monkeypatch.context() as killed:
        killed.setattr("jobs.remove._erase", lambda store: None)
        remove(store.uri, images=(IDS[8],), erase=True)
    with pytest.raises(
        UserError, match=r"has no identity 2; nothing is removed; `ceca remove .* --erase` alone finishes"
    ):
        remove(store.uri, identities=(2,))
    assert remove(store.uri, erase=True) == set()
    assert_erased(store, {IDS[4], IDS[5], IDS[8]})
    remove(store.uri, erase=True)
    assert "nothing waits to be erased" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"has no image nobody, image somebody; nothing is removed$"):
        remove(store.uri, images=("nobody", "somebody"), erase=True)
    with pytest.raises(UserError, match="name what to remove"):
        remove(store.uri)


def test_nothing_is_erased_while_a_stage_works_and_no_stage_begins_while_it_is(filled):
    store = filled_with(filled)
    with holding(store, "index-1", "a job", on_lost=pytest.fail):
        with pytest.raises(UserError, match=r"until index-1 ends, which is held by a job since .* are out of search"):
            remove(store.uri, images=(IDS[1],), erase=True)
        assert len(pending_erasures(store)) == 1
    with (
        holding(store, "pipeline-a", "a job", on_lost=pytest.fail),  # whose stages hold names of their own
        undisturbed(store, Holders(store), "who erases"),
    ):
        begun = threading.Event()

        def work() -> None:
            with alone(store, "index-1"):
                begun.set()

        stage = threading.Thread(target=work)
        stage.start()
        assert not begun.wait(1.5)
    assert begun.wait(10)
    stage.join()
    remove(store.uri, erase=True)
    assert pending_erasures(store) == []


def test_the_command_knows_images_that_were_added(filled):
    store = filled_with(filled)
    rows = table_of("added", IDS[:3])
    rows = rows.set_column(0, rows.schema.field(0), [["new-1", "new-2", "new-3"]])
    rows = rows.set_column(1, rows.schema.field(1), [[77, schema.NOBODY, 3]])
    write_added(store, "digest", rows)
    store.write_json({}, "arrivals", "new-4.json")
    assert {image: who for image, who in added_images(store).items() if image.startswith("new")} == {
        "new-1": 77, "new-2": schema.NOBODY, "new-3": 3,
    }  # fmt: skip
    assert "new-4" in mentioned_images(store)
    assert remove(store.uri, identities=(77,), images=("new-2", "new-4")) == {"new-1", "new-2", "new-4"}
    assert remove(store.uri, identities=(3,), erase=True) == {IDS[6], IDS[7], "new-3"}
    with pytest.raises(UserError, match="has no identity -1"):
        remove(store.uri, identities=(schema.NOBODY,))
    assert remove(store.uri, images=tuple(IDS), erase=True) == set(IDS)  # nothing is left of the tables
    assert all(rows == [] for place, rows in state(store).items() if place != "added" and "rejects" not in place)
    assert store.current("images").rows == 0
    assert remove(store.uri, images=("new-1",)) == {"new-1"}
