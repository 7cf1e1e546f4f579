"""Removing names exact names: characters that are patterns elsewhere are letters here, and neighbours stay."""

from __future__ import annotations

import pytest

from ceca.data.filesystems import as_pyarrow, remove_exactly
from ceca.data.store import Store

# A name, and a neighbour that it would match as a pattern.
NAMES = [("run[1]", "run1"), ("run*", "run-other"), ("run?", "run2"), ("run[!a]", "runb"), ("a b+c%20", "a b+c ")]


@pytest.fixture(params=["local", "s3"])
def place(request, tmp_path) -> str:
    if request.param == "local":
        return str(tmp_path)
    request.getfixturevalue("s3_environment")
    return f"s3://bucket/exact-{request.node.name.partition('[')[0]}"


@pytest.mark.parametrize(("name", "neighbour"), NAMES)
def test_a_dataset_removes_what_is_its_own_and_nothing_else(place, name, neighbour):
    store, other = Store(f"{place}/{name}"), Store(f"{place}/{neighbour}")
    for each in (store, other):
        each.write_json({"a": 1}, "table", "version", "part.json")
        each.write_json({"a": 1}, "table[x]", "kept.json")
    store.remove("table")
    assert store.walk() == ["table[x]/kept.json"]
    assert other.walk() == ["table/version/part.json", "table[x]/kept.json"]
    store.remove("table[x]", "kept.json")
    assert store.walk() == []
    store.remove("table")  # it is gone already
    assert len(other.walk()) == 2


@pytest.mark.parametrize(("name", "neighbour"), NAMES)
def test_checkpoints_of_ray_train_are_removed_by_exact_names(place, name, neighbour):
    store, other = Store(f"{place}/{name}"), Store(f"{place}/{neighbour}")
    for each in (store, other):
        each.write_json({}, "checkpoint", "rank", "state.json")
    as_pyarrow(store.fs).delete_dir(store.path("checkpoint"))
    assert store.walk() == []
    assert other.walk() == ["checkpoint/rank/state.json"]


def test_what_begins_with_the_same_letters_is_something_else(place):
    store = Store(place)
    for name in ("run", "run1", "run-2"):
        store.write_json({}, name, "a.json")
    remove_exactly(store.fs, store.path("run"))
    assert store.walk() == ["run-2/a.json", "run1/a.json"]
