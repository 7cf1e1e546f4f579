"""`ceca gc`: what nothing names goes, what something names stays, and so does everything that is not recognised."""

from __future__ import annotations

import hashlib

import pytest

from ceca.data.garbage import find_garbage, remove_garbage
from ceca.data.lease import LeaseError, holding
from ceca.data.store import Part, Receipt, Store, StoreError
from ceca.errors import UserError
from jobs.gc import gc
from tests.ceca.data.dataset import IDS, contents, filled_with, publish, state, write


def ingest(store: Store, version: str) -> None:
    tables = ("captions", "attributes", "images")
    publish(store, "ingest", version, {table: write(store, table, version, IDS[:6], IDS[6:]) for table in tables})


def index(store: Store, version: str, images: str, parts: list[Part] | None = None) -> list[Part]:
    parts = [*(parts or []), *write(store, "gallery", version, IDS[:3])]
    made_from = {"images": images, "model": "d" * 16, "gallery": "before"}
    publish(store, "index", version, {"gallery": parts}, made_from=made_from)
    return parts


def model(store: Store, name: str, digest: str, made_from: dict[str, str]) -> None:
    for file in ("config.json", "training.json", "model.safetensors"):
        store.write_bytes(digest.encode(), "models", name, digest, file)
    store.write_json({"digest": digest, "made_from": made_from, "version": "v"}, "models", name, "manifest.json")


def removed(store: Store, whole: bool = True, **options: float) -> set[str]:
    """Versions that go, after a check that the rest is whole and that nothing else goes."""
    before = contents(store)
    found = find_garbage(store, **options)  # type: ignore[arg-type]
    assert contents(store) == before
    remove_garbage(store, found)
    after = contents(store)
    assert before.keys() - after.keys() == {name for garbage in found for name in garbage.objects}
    assert sum(garbage.bytes for garbage in found) == sum(len(before[name]) for name in before.keys() - after.keys())
    assert all(after[name] == before[name] for name in after)
    if whole:
        state(store)  # every manifest's parts are there
    assert find_garbage(store, **options) == []  # type: ignore[arg-type]
    return {garbage.what for garbage in found}


def test_of_twenty_runs_the_current_one_stays():
    store = filled_with()
    for run in range(20):
        ingest(store, f"i{run:02d}")
    gone = removed(store)
    tables = ("captions", "attributes", "images", "rejects/ingest")
    assert gone == {f"{table} i{run:02d}" for table in tables for run in range(19)}
    assert store.current("images").version == "i19"
    assert store.captions(store.current("images")).version == "i19"


def test_what_galleries_models_and_evaluations_were_made_from_stays():
    store = filled_with()
    for version in ("i1", "i2", "i3", "i4", "i5"):
        ingest(store, version)
    parts = index(store, "g1", "i1")
    index(store, "g2", "i2", parts)
    model(store, "old", "a" * 16, {"images": "i3", "captions": "i3"})
    store.write_json({"model_digest": "b" * 16, "made_from": {"images": "i4"}}, "evaluations", "b" * 16, "test.json")
    gone = removed(store)
    assert {name for name in gone if "rejects" not in name} == {
        *(f"{table} i1" for table in ("captions", "attributes", "images")),
        "gallery g1",  # but not its parts, which g2 has taken over
    }
    assert [part.path[:2] for part in store.current("gallery").parts] == ["g1", "g2"]


def test_models_that_were_replaced_go_unless_something_names_them():
    store = filled_with()
    for digest in "abcdef":
        model(store, "ceca", digest * 16, {})
    index(store, "g1", "i1")
    store.write_json({"model_digest": "b" * 16}, "evaluations", "b" * 16, "test.json")
    store.write_bytes(b"", "models", "ceca", "c" * 16, "notes.txt")  # somebody's
    store.write_bytes(b"", "models", "ceca", "run-v", "checkpoint")
    store.write_bytes(b"", "models", "another", "a" * 16, "config.json")  # not published
    assert removed(store) == {"models/ceca " + "a" * 16, "models/ceca " + "e" * 16}


def test_the_newest_and_the_young_stay(monkeypatch):
    store = filled_with()
    created = iter(f"2024-05-{day:02d}T00:00:00Z" for day in range(1, 9) for _ in range(1))
    monkeypatch.setattr("ceca.data.store.time.strftime", lambda *_: next(created))
    for version in ("i1", "i2", "i3", "i4"):
        publish(store, "ingest", version, {"images": write(store, "images", version, IDS)})
    monkeypatch.undo()
    assert find_garbage(store, older_than=1_000_000) == []
    assert {garbage.what for garbage in find_garbage(store, older_than=10)} >= {"images i1", "images i2", "images i3"}
    assert removed(store, keep=3) == {"images i1", "rejects/ingest i1"}
    assert removed(store, keep=0) == {f"{table} {v}" for table in ("images", "rejects/ingest") for v in ("i2", "i3")}


def test_nothing_that_is_not_recognised_goes(filled):
    store = filled_with(filled)
    foreign = {
        "images/i1/notes.txt": b"somebody's",
        "images/i1/part-00000.parquet.bak": b"",
        "mine/part-00000.parquet": b"",
        "mine/i1/part-00000.parquet": b"",  # a folder without a table
        "sub/images/manifest.json": filled["images/manifest.json"],  # another dataset, below this one
        "sub/images/i1/manifest.json": filled["images/i1/manifest.json"],
        "sub/images/i1/part-00000.parquet": b"",
        "manifest.json": b"{}",
    }
    for name, content in foreign.items():
        store.write_bytes(content, name)
    gone = removed(store, whole=False)  # of another dataset there are manifests alone
    assert {"images i1", "dialogues d1", "gallery g1"} <= gone
    left = contents(store)
    assert all(left[name] == content for name, content in foreign.items())
    kept = ("removed/", "added/", "arrivals/", "failed/", ".work/", "evaluations/", "models/")
    assert {name for name in filled if name.startswith(kept)} <= left.keys()


def test_parts_of_unfinished_work_stay_and_parts_that_nobody_names_go(filled):
    store = filled_with(filled)
    (received,) = store.receipts("index", "g3").values()
    gone = removed(store)
    assert "gallery g3: parts that no manifest names" in gone
    assert store.walk("gallery", "g3") == [f"gallery/{received.parts['gallery'].path}"]


@pytest.mark.parametrize("content", [b"[]", b"{", b'{"table": "images", "version": "i1", "parts": 3}'])
@pytest.mark.parametrize("name", ["images/i1/manifest.json", "images/manifest.json", ".work/index/g3/00001.json"])
def test_what_cannot_be_read_stops_it_before_anything_goes(filled, name, content):
    store = filled_with(filled)
    store.write_bytes(content, name)
    with pytest.raises(StoreError, match=name):
        gc(store.uri, apply=True)
    assert contents(store).keys() == {*filled, name}


def test_the_command_says_what_would_go_and_removes_it_on_demand(filled, capsys):
    store = filled_with(filled)
    found = gc(store.uri)
    said = " ".join(capsys.readouterr().err.split())
    size = sum(garbage.bytes for garbage in found)
    assert f"would remove {sum(len(garbage.objects) for garbage in found)} objects, {size:,} bytes; --apply" in said
    assert "images i1" in said
    assert contents(store) == filled
    assert gc(store.uri, apply=True) == found
    assert gc(store.uri) == []
    assert "nothing to remove" in capsys.readouterr().err
    with pytest.raises(UserError, match="numbers from 0; found -1 and 0"):
        gc(store.uri, keep=-1)


def test_nothing_goes_while_a_stage_works_and_a_lost_lease_stops_it(filled):
    store = filled_with(filled)
    with holding(store, "index-1", "a job", on_lost=pytest.fail):
        with pytest.raises(UserError, match=r"gc waits until index-1 ends, which is held by a job since .* again"):
            gc(store.uri, apply=True)
        assert gc(store.uri)

    def lost() -> None:
        raise LeaseError("lost gc")

    before = contents(store)
    with pytest.raises(LeaseError):
        remove_garbage(store, find_garbage(store), lost)
    assert contents(store) == before


def test_a_link_out_of_the_dataset_is_not_followed(tmp_path):
    store, other = Store(str(tmp_path / "data")), Store(str(tmp_path / "other"))
    for dataset in (store, other):
        for version in ("i1", "i2"):
            publish(dataset, "ingest", version, {"images": write(dataset, "images", version, IDS)})
    here = tmp_path / "data" / "captions"
    here.symlink_to(tmp_path / "other" / "images")
    (tmp_path / "data" / "images" / "i9").symlink_to(tmp_path / "other" / "images" / "i1")
    before = contents(other)
    gc(store.uri, apply=True)
    assert contents(other) == before
    assert not (tmp_path / "data" / "images" / "i1").exists()
    assert store.read(store.current("images")).num_rows == len(IDS)


def test_a_version_that_was_removed_is_made_again_by_its_stage(tmp_path):
    store = Store(str(tmp_path))
    for version in ("i1", "i2"):
        publish(store, "ingest", version, {"images": write(store, "images", version, IDS)})
    remove_garbage(store, find_garbage(store))
    assert store.manifest("images", "i1") is None
    again = publish(store, "ingest", "i1", {"images": write(store, "images", "i1", IDS)})
    assert store.read_part(again, 0).num_rows == len(IDS)
    assert hashlib.sha256(store.read_bytes("images", again.parts[0].path)).hexdigest() == again.parts[0].sha256
    assert store.receipts("ingest", "i1") == {}
    assert Receipt({}).parts == {}


def test_a_place_without_a_dataset_is_an_error_and_not_clean(tmp_path):
    (tmp_path / "file").write_text("no dataset")
    for place in (tmp_path / "nowhere", tmp_path / "file", tmp_path):
        with pytest.raises(StoreError, match=r"no table 'images' in|Not a directory"):
            gc(str(place))
