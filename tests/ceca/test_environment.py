"""Environment variables: what each one means, what counts as not set, and which values are refused."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ceca.environment import (
    RAY_JOB_CONFIG,
    VARIABLES,
    cache_folder,
    cannot_join,
    hand_token_to_ray,
    lease_silent_s,
    ray_address,
    ray_folder,
    ray_job_id,
    socket_folder,
    started_here,
    temporary_folder,
    usable_gpus,
)
from ceca.errors import UserError

REPOSITORY = Path(__file__).parents[2]


def mode(folder: Path) -> int:
    return folder.stat().st_mode & 0o777


@pytest.fixture
def shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder in which everybody may write."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    folder.chmod(0o1777)
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


OWN = f"ceca-{os.getuid()}"


def test_the_cache_is_the_folder_that_the_variable_names(monkeypatch, tmp_path):
    monkeypatch.setenv("CECA_CACHE", str(tmp_path / "cache"))
    assert cache_folder("shards", "abc") == tmp_path / "cache" / "shards" / "abc"
    assert cache_folder() == tmp_path / "cache"
    assert mode(tmp_path / "cache") == 0o700


@pytest.mark.parametrize("value", [None, ""])
def test_a_cache_variable_that_is_empty_counts_as_not_set(monkeypatch, tmp_path, value):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CECA_CACHE", raising=False)
    if value is not None:
        monkeypatch.setenv("CECA_CACHE", value)
    assert cache_folder("models") == tmp_path / ".cache" / "ceca" / "models"


@pytest.mark.parametrize("home", ["", "/proc/none", "/dev/null"])
def test_without_a_home_folder_the_cache_is_a_folder_of_this_user_below_the_temporary_one(monkeypatch, shared, home):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CECA_CACHE", raising=False)
    if home:
        monkeypatch.setenv("HOME", home)
    else:
        monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder("models") == shared / OWN / "models"
    assert mode(shared / OWN) == 0o700


def test_a_cache_that_others_can_write_holds_a_folder_of_each_user(monkeypatch, shared):
    monkeypatch.setenv("CECA_CACHE", str(shared))
    assert cache_folder("shards") == shared / OWN / "shards"
    assert mode(shared / OWN) == 0o700


@pytest.mark.parametrize("value", ["/proc/none/cache", "/dev/null"])
def test_a_cache_that_cannot_be_made_is_one_line_with_the_variable(monkeypatch, value):
    monkeypatch.setenv("CECA_CACHE", value)
    with pytest.raises(UserError, match=f"CECA_CACHE='{value}' cannot be used"):
        cache_folder("shards")


@pytest.mark.parametrize("kind", ["link", "open", "file", "another's"])
def test_a_temporary_folder_that_somebody_else_has_made_is_refused(shared, tmp_path, kind):
    own, elsewhere = shared / OWN, tmp_path / "elsewhere"
    elsewhere.mkdir()
    if kind == "link":
        own.symlink_to(elsewhere)
    elif kind == "file":
        own.touch()
    else:
        own.mkdir()
        own.chmod(0o777 if kind == "open" else 0o700)
    if kind == "another's":
        if os.getuid():
            pytest.skip("only root can give a folder away")
        os.chown(own, 12345, 12345)
    with pytest.raises(UserError, match=r"is not a folder of this user alone.*TMPDIR"):
        temporary_folder("checkpoints")
    assert not list(elsewhere.iterdir())


def test_a_temporary_folder_is_this_users_alone(shared):
    (shared / OWN).mkdir(mode=0o755)  # by an earlier version
    assert temporary_folder("a", "b") == shared / OWN / "a" / "b"
    assert mode(shared / OWN) == 0o700


def test_sockets_lie_in_a_short_folder_however_long_the_temporary_one_is(monkeypatch, tmp_path):
    long = tmp_path / ("x" * 95)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    for folder in (socket_folder("vllm"), Path(ray_folder())):
        assert folder.parent == Path("/tmp", OWN)
        assert len(str(folder)) <= 40
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with pytest.raises(UserError, match=r"RAY_TMPDIR=.*too long"):
        ray_folder()
    monkeypatch.setenv("RAY_TMPDIR", "/proc/none")
    with pytest.raises(UserError, match="RAY_TMPDIR='/proc/none' cannot be used"):
        ray_folder()


@pytest.mark.parametrize("home", ["{tmp}", "/proc/none", "/dev/null"])
def test_ray_gets_a_token_where_it_cannot_keep_one(monkeypatch, tmp_path, home):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("HOME", home.format(tmp=tmp_path))
    hand_token_to_ray()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == (0 if home == "{tmp}" else 64)


# --- the address of a cluster -----------------------------------------------------------------------------

SETTINGS = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # the frame with which a server of HTTP/2 begins


@pytest.fixture
def server() -> Iterator[Callable[[bytes], str]]:
    """Starts a server that says one thing to whoever connects; returns its address."""
    with contextlib.ExitStack() as stack:

        def start(words: bytes) -> str:
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def serve() -> None:
                with contextlib.suppress(OSError):
                    while True:
                        connection, _ = listening.accept()
                        with connection:
                            connection.sendall(words)
                            connection.recv(100)

            threading.Thread(target=serve, daemon=True).start()
            return f"127.0.0.1:{listening.getsockname()[1]}"

        yield start


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:9", "127.0.0.1:9.*refused"),
        ("nowhere.invalid:6379", "nowhere.invalid"),
        ("http://127.0.0.1:8265", "is a URL.*ray job submit"),
        ("https://head:8265", "is a URL"),
        ("ray://head:10001", "is a URL"),
        ("head", "expected HOST:PORT"),
        ("127.0.0.1:", "expected HOST:PORT"),
        ("127.0.0.1:port", "expected HOST:PORT"),
        ("127.0.0.1:99999", "expected HOST:PORT"),
        (":6379", "expected HOST:PORT"),
        ("x" * 300 + ":6379", "xxx.*correct it"),
        ("auto", "no cluster that you began"),
    ],
)
def test_an_address_without_a_cluster_is_one_line_in_seconds(monkeypatch, tmp_path, address, says):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    begun = time.monotonic()
    with pytest.raises(UserError, match=f"RAY_ADDRESS=.*{says}"):
        ray_address()
    assert time.monotonic() - begun < 10


@pytest.mark.parametrize("value", [None, "", " ", "local"])
def test_without_an_address_a_command_starts_ray_itself(monkeypatch, value):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if value is not None:
        monkeypatch.setenv("RAY_ADDRESS", value)
    assert ray_address() == ""


def test_a_cluster_is_told_from_other_programs(monkeypatch, server):
    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    cluster = server(SETTINGS)
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    assert ray_address() == cluster
    for words in (b"HTTP/1.1 400 Bad Request\r\n\r\n", b""):
        monkeypatch.setenv("RAY_ADDRESS", server(words))
        with pytest.raises(UserError, match=r"another program listens there|reset"):
            ray_address()


def test_a_cluster_that_wants_a_token_says_so():
    error = ConnectionError("Failed to connect to Ray cluster at head:6379")
    error.__cause__ = RuntimeError("…\nray.exceptions.AuthenticationError: RPC error: InvalidAuthToken: …")
    assert "RAY_AUTH_TOKEN_PATH" in str(cannot_join("head:6379", error))
    assert str(cannot_join("h:1", RuntimeError("Version\nmismatch"))).endswith("RAY_ADDRESS=h:1: Version mismatch")


def test_a_cluster_that_another_user_names_is_not_joined(monkeypatch, server, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert started_here() == ""
    file = tmp_path / "ray" / "ray_current_cluster"
    file.parent.mkdir()
    address = server(SETTINGS)
    file.write_text(f"{address}\n")
    assert started_here() == address
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert ray_address() == address
    if os.getuid() == 0:
        os.chown(file, 12345, 12345)
        assert started_here() == ""


@pytest.mark.parametrize(("value", "seconds"), [(None, 60.0), ("", 60.0), ("90", 90.0), ("0.5", 0.5)])
def test_a_holder_counts_as_dead_after_a_minute_or_the_seconds_given(monkeypatch, value, seconds):
    monkeypatch.delenv("CECA_LEASE_SILENT_S", raising=False)
    if value is not None:
        monkeypatch.setenv("CECA_LEASE_SILENT_S", value)
    assert lease_silent_s() == seconds


@pytest.mark.parametrize("value", ["a minute", "0", "-1", "inf", "nan", " "])
def test_seconds_that_cannot_be_used_are_an_error_that_names_the_variable(monkeypatch, value):
    monkeypatch.setenv("CECA_LEASE_SILENT_S", value)
    says = f"CECA_LEASE_SILENT_S must be a positive number of seconds, found {value!r}"
    with pytest.raises(UserError, match=re.escape(says)):
        lease_silent_s()


@pytest.mark.parametrize(("value", "usable"), [(None, (2, 0.5)), ("", (2, 0.5)), ("1", (0, 0))])
def test_gpus_that_are_only_declared_are_not_computed_on(monkeypatch, value, usable):
    monkeypatch.delenv("CECA_DECLARED_GPUS", raising=False)
    if value is not None:
        monkeypatch.setenv("CECA_DECLARED_GPUS", value)
    assert (usable_gpus(2), usable_gpus(0.5)) == usable


@pytest.mark.parametrize(
    ("config", "job"),
    [
        (None, ""),
        ({}, ""),
        ({"metadata": {"owner": "me"}}, ""),
        ({"metadata": {"job_submission_id": "raysubmit_1"}, "runtime_env": {}}, "raysubmit_1"),
    ],
)
def test_a_process_knows_the_ray_job_that_started_it(monkeypatch, config, job):
    monkeypatch.delenv(RAY_JOB_CONFIG, raising=False)
    if config is not None:
        monkeypatch.setenv(RAY_JOB_CONFIG, json.dumps(config))
    assert ray_job_id() == job


def test_every_variable_of_this_project_is_described():
    used = {
        name
        for package in ("ceca", "jobs", "serve", "cluster")
        for file in (REPOSITORY / package).rglob("*.py")
        for name in re.findall(r"\bCECA_[A-Z_]+\b", file.read_text())
    }
    assert used == set(VARIABLES)


def test_no_other_module_reads_the_variables_of_this_project():
    for package in ("ceca", "jobs", "serve", "cluster"):
        for file in (REPOSITORY / package).rglob("*.py"):
            if file != REPOSITORY / "ceca" / "environment.py":
                reads = re.findall(r"(?:environ(?:\.get)?|getenv)[\[(]\s*[\"']CECA_\w+", file.read_text())
                assert not reads, file
