"""The store on disk and on S3: publication is atomic, versions are kept, damage and other schemas are errors."""

from __future__ import annotations

import dataclasses
import errno
import pickle
import time
import uuid
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ceca.data.parts import ROW_GROUP, decode, encode
from ceca.data.schema import SCHEMA_VERSION
from ceca.data.store import (
    Manifest,
    Part,
    Receipt,
    Reject,
    Store,
    StoreError,
    filesystem,
    in_order,
    version_of,
)


@pytest.fixture(params=["path", "file", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    """An empty dataset, by each kind of URI."""
    if request.param == "s3":
        request.getfixturevalue("s3_environment")
        return Store(f"s3://bucket/{uuid.uuid4().hex}")
    return Store(str(tmp_path / "data") if request.param == "path" else f"file://{tmp_path}/data")


def publish(store: Store, version: str, *parts: list[int], **options) -> Manifest:
    receipts = []
    for unit, numbers in enumerate(parts):
        rows = pa.table({"number": pa.array(numbers, pa.int64()), "text": [f"row {n}" for n in numbers]})
        receipts.append(Receipt({"things": store.write_part("things", version, unit, rows)}))
        store.write_receipt("make", version, unit, receipts[-1])
    return store.publish(
        "make", version, ["things"], receipts, made_from={"source": "abc"}, config={"x": 1}, **options
    )["things"]


def test_a_published_table_is_read_back_in_order(store: Store):
    published = publish(store, "v1", [1, 2, 3], [4, 5])
    manifest = store.current("things")
    assert manifest == published
    assert (manifest.rows, manifest.made_from, manifest.config) == (5, {"source": "abc"}, {"x": 1})
    assert store.read(manifest)["number"].to_pylist() == [1, 2, 3, 4, 5]
    assert store.read(manifest, ["text"]).column_names == ["text"]
    assert store.read_part(manifest, 1)["number"].to_pylist() == [4, 5]


def test_readers_see_the_old_version_until_the_new_one_is_published(store: Store):
    publish(store, "v1", [1])
    rows = pa.table({"number": [2], "text": ["new"]})
    receipt = Receipt({"things": store.write_part("things", "v2", 0, rows)})
    assert store.current("things").version == "v1"
    store.publish("make", "v2", ["things"], [receipt], made_from={}, config={})
    assert store.read(store.current("things"))["number"].to_pylist() == [2]
    assert store.read(store.manifest("things", "v1"))["number"].to_pylist() == [1]


def test_a_finished_unit_leaves_a_receipt_until_its_table_is_published(store: Store):
    assert store.receipts("make", "v1") == {}
    part = store.write_part("things", "v1", 3, pa.table({"number": [1]}))
    receipt = Receipt({"things": part}, (Reject("a.jpg", "not_an_image", "7 bytes"),), {"tokens": 5})
    store.write_receipt("make", "v1", 3, receipt)
    assert store.receipts("make", "v1") == {3: receipt}
    assert store.receipts("make", "v2") == {}
    publish(store, "v1", [1])
    assert store.receipts("make", "v1") == {}


def test_rejects_are_published_with_their_stage_and_counted(store: Store):
    publish(store, "v1", [1], rejects=[Reject("a.jpg", "missing_file", "not there"), Reject("b", "missing_file", "no")])
    manifest = store.current("rejects/make")
    assert manifest.notes["rejects"] == {"missing_file": 2}
    assert store.read(manifest).to_pylist()[0] == {
        "stage": "make",
        "key": "a.jpg",
        "reason": "missing_file",
        "detail": "not there",
    }


def test_columns_are_decoded_in_the_order_asked_and_a_missing_one_is_an_error():
    content = pa.BufferReader(encode(pa.table({"a": [1, 2], "b": ["x", "y"]})))
    assert decode(content, ["b", "a"]).to_pydict() == {"b": ["x", "y"], "a": [1, 2]}
    with pytest.raises(pa.ArrowInvalid, match="no column c"):
        decode(content, ["a", "c"])


def test_a_damaged_part_is_refused(store: Store):
    manifest = publish(store, "v1", [1, 2, 3])
    content = bytearray(store.read_bytes("things", manifest.parts[0].path))
    content[10] ^= 255
    store.write_bytes(bytes(content), "things", manifest.parts[0].path)
    with pytest.raises(StoreError, match=r"part-00000-[0-9a-f]{8}\.parquet is damaged.*--redo"):
        store.read_part(manifest, 0)


def test_a_missing_part_is_told_apart_however_it_is_read(store: Store):
    manifest = publish(store, "v1", [1])
    store.remove("things", manifest.parts[0].path)
    for read in (
        lambda: store.read_part(manifest, 0),
        lambda: store.read(manifest),
        lambda: store.read_columns(manifest, 0, ["number"]),
        lambda: store.take(manifest, [(0, 0)]),
    ):
        with pytest.raises(StoreError, match="named by its manifest but missing") as error:
            read()
        assert isinstance(error.value, FileNotFoundError)  # a service opens its tables again
        again = pickle.loads(pickle.dumps(error.value))
        assert str(again) == str(error.value)


def test_another_schema_version_is_refused(store: Store):
    manifest = publish(store, "v1", [1])
    store.write_json({**dataclasses.asdict(manifest), "schema_version": SCHEMA_VERSION + 1}, "things", "manifest.json")
    with pytest.raises(StoreError, match=f"has schema version {SCHEMA_VERSION + 1}, this program reads"):
        store.current("things")


def test_a_manifest_that_is_not_json_is_told(store: Store):
    store.write_bytes(b"{half", "things", "manifest.json")
    with pytest.raises(StoreError, match=r"things/manifest\.json is not valid JSON"):
        store.current("things")


@pytest.mark.parametrize("path", ["../secret", "v/../../secret", "..", "a/.."])
def test_a_manifest_names_nothing_outside_its_dataset(tmp_path: Path, path: str):
    (tmp_path / "secret").write_text("not part of the dataset")
    store = Store(str(tmp_path / "data"))
    manifest = Manifest("table", "v", 1, (Part(path, 1, 1, "0" * 64),), {}, {}, {}, "")
    for attempt in (
        lambda: store.read_part(manifest, 0),
        lambda: store.read_columns(manifest, 0),
        lambda: store.manifest("table", path),
        lambda: store.write_bytes(b"", "table", path),
        lambda: store.remove("table", path),
        lambda: store.names("table", path),
    ):
        with pytest.raises(StoreError, match="leads out of the dataset"):
            attempt()
    assert (tmp_path / "secret").exists()


def test_a_missing_table_names_the_stage_that_makes_it(store: Store):
    assert store.manifest("captions") is None
    with pytest.raises(StoreError, match=r"no table 'captions'.*run the stage `ingest` first"):
        store.current("captions", "ingest")


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 3 * ROW_GROUP), min_size=1, max_size=3),
    data=st.data(),
)
def test_take_gives_the_rows_asked_for_in_the_order_asked(tmp_path_factory, sizes: list[int], data: st.DataObject):
    store = Store(str(tmp_path_factory.mktemp("take")))
    starts = [sum(sizes[:part]) for part in range(len(sizes))]
    manifest = publish(store, "v1", *(list(range(s, s + n)) for s, n in zip(starts, sizes, strict=True)))
    places = st.integers(0, len(sizes) - 1).flatmap(lambda p: st.tuples(st.just(p), st.integers(0, sizes[p] - 1)))
    rows = data.draw(st.lists(places, min_size=1, max_size=20))
    numbers = store.take(manifest, rows, ["number"])["number"].to_pylist()
    assert numbers == [starts[part] + row for part, row in rows]


def test_the_same_description_has_the_same_version_whatever_its_order():
    assert version_of({"a": 1, "b": [2, 3]}) == version_of({"b": [2, 3], "a": 1})
    assert version_of({"a": 1}) != version_of({"a": 2})


def test_a_writer_that_dies_leaves_the_old_object(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    store = Store(str(tmp_path))
    store.write_bytes(b"old", "object")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StoreError, match=r"cannot write .*object.*the disk is full"):
        store.write_bytes(b"new", "object")
    assert store.read_bytes("object") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["object"]


def test_uris_that_cannot_be_used_say_what_can():
    with pytest.raises(StoreError, match="pass --data"):
        filesystem("")
    with pytest.raises(StoreError, match=r"use a folder, file://… or s3://bucket/prefix"):
        filesystem("gopher://there/data")


def test_a_wrong_key_says_which_variables_to_check(s3_environment, monkeypatch: pytest.MonkeyPatch):
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    try:
        with pytest.raises(StoreError, match="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
            Store("s3://bucket/data").manifest("images")
    finally:
        s3fs.S3FileSystem.clear_instance_cache()


def test_a_bucket_that_is_not_there_is_one_error(s3_environment):
    with pytest.raises(StoreError, match="cannot write s3://nowhere/data/object"):
        Store("s3://nowhere/data").write_bytes(b"x", "object")


@pytest.mark.parametrize("together", [1, 3, 7])
def test_calls_that_wait_give_their_results_in_order_and_few_of_them_wait_to_be_taken(together):
    called = []

    def call(number: int) -> int:
        time.sleep(0.002 * (number % 3))
        called.append(number)
        return -number

    results = in_order(call, range(200), together)
    assert next(results) == 0
    assert len(called) < max(60, 28 * together)  # not all 200 at once
    assert list(results) == [-number for number in range(1, 200)]
    assert sorted(called) == list(range(200))


def test_an_error_of_a_call_that_waits_ends_the_others():
    called = []

    def call(number: int) -> int:
        called.append(number)
        if number == 5:
            raise StoreError("gone")
        return number

    with pytest.raises(StoreError, match="gone"):
        list(in_order(call, range(1000)))
    assert len(called) < 100


def test_small_parts_of_this_machine_are_read_together_and_those_of_a_store_are_not(tmp_path, s3_environment):
    here, far = Store(str(tmp_path)), Store("s3://bucket/people")
    small = Manifest("t", "v", 1000, (Part("a", 100, 1, ""),) * 10, {}, {}, {}, "")
    large = dataclasses.replace(small, rows=50_000)
    assert (here.together(small), here.together(large), far.together(small)) == (20, 1, 1)
    assert here.together(dataclasses.replace(small, rows=0, parts=())) == 1


def test_columns_of_parts_come_in_the_order_that_was_asked_for(store: Store):
    published = publish(store, "v1", [1, 2], [3])
    parts = list(store.read_each(published, ["text", "number"]))
    assert [part.schema.names for part in parts] == [["text", "number"]] * 2
    assert [part["number"].to_pylist() for part in parts] == [[1, 2], [3]]
    with pytest.raises(StoreError, match="no column colour"):
        list(store.read_each(published, ["colour"]))
