"""Erasing that is killed, runs twice at a time, or meets images that come back: no other row is lost."""

from __future__ import annotations

import itertools
import os
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
import pyarrow as pa
import pytest

from ceca.data import erase as erasing
from ceca.data.changes import hide, pending_erasures, write_added
from ceca.data.erase import erase, finish
from ceca.data.store import Store, StoreError
from tests.ceca.data.dataset import GONE, IDS, assert_erased, fill, filled_with, only, state, table_of, without, word


class Killed(BaseException):
    """The process ends here."""


def test_killed_at_any_write_it_loses_nothing_and_the_same_call_finishes(filled, monkeypatch):
    kinds = ("images/i2", "images/manifest", "dialogues", "gallery", "added", "arrivals", ".work", "rejects/dialogue")
    some = only(filled, *kinds, "evaluations/digest/test.")
    before = state(filled_with(some))
    expected = without(before, GONE)
    methods = {name: getattr(Store, name) for name in ("write_bytes", "replace", "remove")}

    def die_at(last: int) -> None:
        calls = itertools.count(1)
        for name, method in methods.items():

            def call(self: Store, *arguments: Any, method: Any = method, **named: Any) -> None:
                if next(calls) >= last:
                    raise Killed
                method(self, *arguments, **named)

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
