"""Removing names exact names: characters that are patterns elsewhere are letters here, and neighbours stay."""

from __future__ import annotations

import pytest

from ceca.data.filesystems import as_pyarrow, remove_exactly
from ceca.data.store import Store, StoreError
from ceca.environment import find_proxy, is_loopback

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


# --- proxies ----------------------------------------------------------------------------------------------

NOBODY = "http://me:secret@127.0.0.1:9"  # nothing listens there


def test_an_s3_server_on_this_machine_is_asked_past_the_proxy(s3_environment, monkeypatch):
    monkeypatch.setenv("http_proxy", NOBODY)
    monkeypatch.delenv("no_proxy", raising=False)
    store = Store("s3://bucket/past-the-proxy")
    store.write_json({"a": 1}, "part.json")
    assert store.read_json("part.json") == {"a": 1}


def test_an_error_of_another_s3_server_names_the_proxy(monkeypatch):
    monkeypatch.setenv("http_proxy", NOBODY)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://storage.example:9000")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with pytest.raises(StoreError, match=r"the proxy http://\*\*\*@127\.0\.0\.1:9 of \$http_proxy"):
        Store("s3://bucket/behind-the-proxy").read_json("part.json")


@pytest.mark.parametrize(
    ("url", "here"),
    [
        ("http://localhost:8000/v1", True),
        ("http://LOCALHOST.", True),
        ("http://models.localhost/v1", True),
        ("https://127.3.2.1", True),
        ("http://[::1]:9000", True),
        ("http://[::ffff:127.0.0.1]:9000", True),
        ("http://me:secret@127.0.0.1", True),
        ("http://0.0.0.0:8000", True),
        ("http://127.0.0.1.example.org", False),
        ("http://localhost@example.org", False),
        ("http://10.0.0.1", False),
        ("127.0.0.1:9000", False),
        ("http://[::1", False),
        ("", False),
    ],
)
def test_addresses_of_this_machine(url, here):
    assert is_loopback(url) == here


def test_the_proxy_of_a_url_is_named_without_its_password(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert find_proxy("http://models.example") is None
    monkeypatch.setenv("HTTPS_PROXY", "http://me:secret@proxy.example:3128")
    assert find_proxy("https://models.example/v1") == ("HTTPS_PROXY", "http://***@proxy.example:3128")
    assert find_proxy("http://models.example") is None
    monkeypatch.setenv("all_proxy", "proxy.example:3128")
    assert find_proxy("http://models.example") == ("all_proxy", "proxy.example:3128")
    monkeypatch.setenv("no_proxy", ".example")
    assert find_proxy("http://models.example:8000/v1") is None
