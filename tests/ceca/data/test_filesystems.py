"""Removing names exact names: characters that are patterns elsewhere are letters here, and neighbours stay."""

from __future__ import annotations

import os
import pwd

import pytest

from ceca.data.filesystems import as_pyarrow, remove_exactly
from ceca.data.store import Store, StoreError
from ceca.environment import find_proxy, on_this_machine

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


# --- places -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri", ["~/people", "~/people/", "file://~/people", "people", "./people", "file:{home}/people"]
)
def test_a_folder_is_the_same_for_workers_that_run_elsewhere(monkeypatch, tmp_path, uri):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    store = Store(uri.format(home=tmp_path))
    store.write_json({"a": 1}, "part.json")
    monkeypatch.chdir("/")
    assert Store(store.uri).read_json("part.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["people"]


def test_a_folder_of_another_user_is_found_by_name():
    user = pwd.getpwuid(os.getuid())
    assert Store(f"~{user.pw_name}/people").uri == f"{user.pw_dir}/people"


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("~nobody-of-this-name/people", "no home folder ~nobody-of-this-name"),
        ("file://people/data", "begins with a slash"),
        ("file:people", "begins with a slash"),
        ("file://", "begins with a slash"),
        ("nothing://people", "nothing"),
        ("", "no dataset URI"),
    ],
)
def test_a_place_that_cannot_be_used_is_one_line(monkeypatch, tmp_path, uri, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match=says):
        Store(uri)
    assert not list(tmp_path.iterdir())


def test_a_folder_may_have_a_name_that_begins_with_a_tilde(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert Store("./~").uri == f"{tmp_path}/~"


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
@pytest.mark.parametrize(
    "value", ["localhost:9000", "127.0.0.1", "ftp://store:21", "http://", "http://store:port", "http://a b", "//store"]
)
def test_an_address_of_no_s3_server_is_one_line_with_the_variable(monkeypatch, variable, value):
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    monkeypatch.setenv(variable, value)
    with pytest.raises(StoreError, match=f"{variable}='{value}' is no address of a server"):
        Store("s3://bucket/people")


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AWS_DEFAULT_REGION", "us west"),
        ("AWS_PROFILE", "nobody"),
        ("AWS_MAX_ATTEMPTS", "many"),
        ("AWS_RETRY_MODE", "x"),
    ],
)
def test_other_variables_of_s3_that_mean_nothing_are_one_line(s3_environment, monkeypatch, variable, value):
    monkeypatch.setenv(variable, value)
    store = Store(f"s3://bucket/{variable}")
    store.fs.clear_instance_cache()  # as in a new process
    with pytest.raises(StoreError, match=r"other AWS_\* variables"):
        Store(store.uri).read_json("part.json")
    store.fs.clear_instance_cache()


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
    assert on_this_machine(url) == here


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
