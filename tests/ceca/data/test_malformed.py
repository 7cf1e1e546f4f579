"""Objects that are not what their place says: one error that names the object, never a traceback of another kind."""

from __future__ import annotations

import json

import pytest

from ceca.data.changes import added_objects, hide, pending_erasures, read_arrival, removed_images, waiting_images
from ceca.data.lease import Holders
from ceca.data.store import Store, StoreError
from ceca.model.registry import find_model

WRONG = ["{}", "[]", "null", "3", '"text"', '{"images": 3, "schema_version": 2}', "{", "", "[" * 100_000]
WRONG += ['{"images": [{}]}', '{"images": [null]}']


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path))


@pytest.mark.parametrize("content", WRONG, ids=range(len(WRONG)))
@pytest.mark.parametrize(
    ("place", "read"),
    [
        ("removed/0123456789ab.json", removed_images),
        ("removed/0123456789ab.json", pending_erasures),
        ("arrivals/0123456789abcdef-00.json", lambda store: read_arrival(store, "0123456789abcdef-00.json")),
        (".leases/train-ceca/claim.json", lambda store: Holders(store).of()),
        ("images/manifest.json", lambda store: store.manifest("images")),
        ("models/ceca/manifest.json", lambda store: find_model(store, "ceca")),
        (".work/ingest/0123456789ab/00000.json", lambda store: store.receipts("ingest", "0123456789ab")),
    ],
)
def test_an_object_that_is_something_else_is_named(store, place, read, content):
    store.write_bytes(content.encode(), place)
    with pytest.raises(StoreError) as error:
        read(store)
    assert place in str(error.value)
    assert "\n" not in str(error.value)


def manifest(**changes: object) -> bytes:
    part = {"path": "v/part-00000.parquet", "rows": 1, "bytes": 1, "sha256": "0"}
    whole = {"table": "images", "version": "v", "rows": 1, "parts": [part], "made_from": {}, "config": {}, "notes": {}}
    whole |= {"created": "now", "schema_version": 2, **changes}
    return json.dumps({key: value for key, value in whole.items() if value is not None}).encode()


@pytest.mark.parametrize(
    "changes",
    [
        *({"parts": None}, {"rows": None}, {"another": 1}, {"parts": 3}, {"parts": [{}]}, {"parts": ["x"]}),
        *({"made_from": []}, {"made_from": {"images": 3}}, {"version": 3}, {"table": 7}, {"rows": -1}, {"notes": "x"}),
        {"parts": [{"path": 3, "rows": 1, "bytes": 1, "sha256": "0"}]},
    ],
)
def test_a_manifest_with_missing_or_further_keys_is_named(store, changes):
    store.write_bytes(manifest(), "images", "manifest.json")
    assert store.manifest("images") is not None
    store.write_bytes(manifest(**changes), "images", "manifest.json")
    with pytest.raises(StoreError, match=r"images/manifest\.json is not a manifest"):
        store.manifest("images")


@pytest.mark.parametrize("name", ["notes.txt", "xyz.parquet", "0123456789abcdeg.parquet", ".DS_Store"])
def test_a_foreign_object_among_added_images_is_named(store, name):
    store.write_bytes(b"", "added", "digest", "0123456789abcdef.parquet")
    assert added_objects(store, "digest") == ("0123456789abcdef.parquet",)
    store.write_bytes(b"", "added", "digest", name)
    with pytest.raises(StoreError, match=name):
        added_objects(store, "digest")


def test_whole_records_are_read(store):
    name = hide(store, ["a" * 16], erase=True)
    assert removed_images(store) == {"a" * 16}
    assert pending_erasures(store) == [name]
    assert waiting_images(store) == []
