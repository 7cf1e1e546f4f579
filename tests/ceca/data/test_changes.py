"""Records of changes of single images."""

from __future__ import annotations

from ceca.data.changes import hide, pending_erasures, removed_images
from ceca.data.erase import finish
from tests.ceca.data.dataset import IDS, filled_with


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
