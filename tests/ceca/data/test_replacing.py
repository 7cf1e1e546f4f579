"""Publishing under a name that another process has taken over: the older table is never over the newer one, and none is
damaged, whatever the store can do."""

from __future__ import annotations

import itertools
import json
import os
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from ceca.data import replacing
from ceca.data.lease import LeaseError
from ceca.data.store import Receipt, Store, StoreError
from cluster.object_store import S3Server
from tests.drills.faults import before


@pytest.fixture(scope="module")
def conditional_s3(s3: S3Server, s3_environment: None) -> Iterator[str]:
    """Endpoint of an S3 server with conditional writes."""
    with before(s3.endpoint) as (endpoint, faults):
        faults.conditions = True
        yield endpoint


def use(way: str, request: pytest.FixtureRequest, patch: pytest.MonkeyPatch, folder: Path) -> Store:
    """An empty dataset where objects are replaced in this way."""
    if way in ("conditional", "turns on s3"):
        request.getfixturevalue("s3_environment")
        if way == "conditional":
            patch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("conditional_s3"))
        return Store(f"s3://bucket/{uuid.uuid4().hex}")
    if way == "turns":
        patch.setattr("fcntl.flock", no_locks)
    return Store(f"memory://{uuid.uuid4().hex}" if way == "memory" else str(folder))


def no_locks(*_: object) -> None:
    raise OSError("no locks here")


@pytest.fixture(params=["lock", "memory", "turns", "turns on s3", "conditional"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    return use(request.param, request, monkeypatch, tmp_path)


def publish(store: Store, who: str, check: Callable[[], None] = lambda: None) -> None:
    """Version v of a table whose rows say who made them; with it goes a table of rejects."""
    receipt = Receipt({"one": store.write_part("one", "v", 0, pa.table({"who": [who]}))})
    store.write_receipt("make", "v", 0, receipt)
    store.publish("make", "v", ("one",), [receipt], made_from={}, config={"who": who}, check=check)


def makers(store: Store) -> dict[str, str]:
    """Who made the current table and its version, by manifest and by rows."""
    found = {}
    for version in (None, "v"):
        manifest = store.manifest("one", version)
        assert manifest is not None
        (who,) = store.read_part(manifest, 0)["who"].to_pylist()
        assert store.read(manifest)["who"].to_pylist() == [who] == [manifest.config["who"]]
        rejects = store.manifest("rejects/make", version)
        assert rejects is not None
        assert rejects.config["who"] == who
        found[str(version)] = who
    return found


class Overtaken:
    """The first process: at some moment a second one takes over and publishes."""

    def __init__(self, store: Store, *, at_write: int = 0, at_check: int = 0):
        self.store, self.at_write, self.at_check, self.lost = store, at_write, at_check, False
        self.writes, self.checks = itertools.count(1), itertools.count(1)

    def late(self, write: Callable[..., object]) -> Callable[..., object]:
        """A write that reaches the store only after the second process has published."""

        def call(*arguments: object, **named: object) -> object:
            if next(self.writes) == self.at_write:
                self.take_over()
            return write(*arguments, **named)

        return call

    def take_over(self) -> None:
        self.lost = True
        publish(Store(self.store.uri), "second")

    def check(self) -> None:
        if self.lost:
            raise LeaseError("lost")
        if next(self.checks) == self.at_check:
            self.take_over()

    def publish(self) -> None:
        """Publish; a process that was overtaken ends with the error of its lease."""
        try:
            publish(self.store, "first", self.check)
        except (LeaseError, StoreError):  # on disk also because a folder is gone
            assert self.lost
        else:
            assert not self.lost or not self.at_write


# On a folder every write, on S3 some: the drill below stops a process at each.
@pytest.mark.parametrize(("way", "every"), [("turns", 1), ("turns on s3", 5), ("conditional", 3)])
def test_whoever_is_overtaken_at_any_write_publishes_nothing(way, every, request, tmp_path, monkeypatch):
    for at_write in itertools.count(1, every):
        with monkeypatch.context() as patch:
            store = use(way, request, patch, tmp_path / str(at_write))
            first = Overtaken(store, at_write=at_write)
            place, name = (os, "replace") if way == "turns" else (store.fs, "pipe_file")
            patch.setattr(place, name, first.late(getattr(place, name)))
            first.publish()
        if not first.lost:
            break
        assert set(makers(store).values()) == {"second"}, at_write
    assert at_write > 8


def test_whoever_is_overtaken_after_any_look_at_its_lease_publishes_nothing(request, tmp_path, monkeypatch):
    for way in ("lock", "memory", "turns"):
        for at_check in itertools.count(1):
            with monkeypatch.context() as patch:
                store = use(way, request, patch, tmp_path / f"{way} {at_check}")
                first = Overtaken(store, at_check=at_check)
                first.publish()
            if not first.lost:
                break
            assert set(makers(store).values()) == {"second"}, at_check
        assert at_check > 4


def test_a_manifest_that_arrives_late_is_not_read(store: Store, request):
    """As if the store had kept the request of a process that has ended long since."""
    if request.node.callspec.id not in ("turns", "turns on s3"):
        pytest.skip("here the store itself refuses it")
    publish(store, "first")
    late = store.read_bytes("one", "manifest.json")
    publish(store, "second")
    store.write_bytes(late, "one", "manifest.json")
    assert set(makers(store).values()) == {"second"}
    publish(store, "third")
    assert set(makers(store).values()) == {"third"}
    store.remove("one", "manifest.json")  # as messages about a damaged one advise
    assert store.manifest("one") is None


def test_what_another_program_writes_counts_as_it_is(store: Store):
    publish(store, "first")
    record = store.read_json("one", "manifest.json")
    publish(store, "second")
    store.write_json({**record, "created": "by hand"}, "one", "manifest.json")
    manifest = store.manifest("one")
    assert manifest is not None
    assert manifest.created == "by hand"
    publish(store, "third")
    assert set(makers(store).values()) == {"third"}


@pytest.mark.parametrize("store", ["lock", "memory", "conditional"], indirect=True)  # turns need the lease as well
def test_of_many_writers_at_once_each_sees_what_the_others_wrote(store: Store):
    def write(who: int) -> None:
        for nth in range(3):

            def add(now: bytes | None, mine: int = 10 * who + nth) -> bytes:
                return json.dumps([*json.loads(now or b"[]"), mine]).encode()

            Store(store.uri).replace(add, "folder", "manifest.json")

    with ThreadPoolExecutor(3) as writers:
        list(writers.map(write, range(3)))
    assert sorted(store.read_json("folder", "manifest.json")) == [0, 1, 2, 10, 11, 12, 20, 21, 22]


def test_whether_a_server_compares_is_found_out_once(request, tmp_path, monkeypatch):
    for way, compares in (("turns on s3", False), ("conditional", True)):
        with monkeypatch.context() as patch:
            store = use(way, request, patch, tmp_path)
            patch.setattr(replacing, "_CONDITIONAL", {})
            probes = []
            write = store.fs.pipe_file
            patch.setattr(
                store.fs, "pipe_file", lambda path, *a, w=write, p=probes, **k: p.append(path) or w(path, *a, **k)
            )
            publish(store, "first")
            publish(store, "second")
            assert list(replacing._CONDITIONAL.values()) == [compares]
            assert len({path for path in probes if "probe" in path}) == 1
            assert not [name for name in store.walk() if "probe" in name]
            assert any(".turns/" in name for name in store.walk()) != compares


def test_a_part_of_the_same_number_and_other_content_harms_no_table(store: Store):
    publish(store, "first")
    store.write_part("one", "v", 0, pa.table({"who": ["a late process"]}))
    assert set(makers(store).values()) == {"first"}


def test_a_folder_that_is_locked_for_long_is_an_error(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    publish(store, "first")
    monkeypatch.setattr(replacing, "LOCKED_S", 0.1)
    with (
        replacing._locked(store.path("one", "v", "manifest.json")),
        pytest.raises(StoreError, match=r"one/v/manifest\.json is being written by another process.*may be stopped"),
    ):
        publish(store, "second")
    assert store.current("one").config["who"] == "first"


def test_parts_that_are_gone_are_not_published(store: Store):
    publish(store, "first")
    part = store.write_part("one", "w", 0, pa.table({"who": ["nobody"]}))
    store.remove("one", part.path)
    with pytest.raises(StoreError, match=r"1 parts of one are gone, such as .*w/part-00000-.*the same command again"):
        store.publish("make", "w", ("one",), [Receipt({"one": part})], made_from={}, config={})
    assert set(makers(store).values()) == {"first"}
    assert store.manifest("one", "w") is None


@pytest.mark.parametrize("earlier", [True, False])
def test_parts_that_are_removed_between_look_and_write_leave_the_table_before(tmp_path, earlier):
    store = Store(str(tmp_path))
    if earlier:
        publish(store, "first")
    part = store.write_part("one", "w", 0, pa.table({"who": ["nobody"]}))
    checks = itertools.count()

    def check() -> None:
        if next(checks) == 3:  # of the last of four manifests
            store.remove("one", part.path)

    with pytest.raises(StoreError, match="are gone"):
        store.publish("make", "w", ("one",), [Receipt({"one": part})], made_from={}, config={}, check=check)
    assert store.manifest("one", "w") is None
    if earlier:
        assert set(makers(store).values()) == {"first"}
    else:
        assert store.manifest("one") is None
