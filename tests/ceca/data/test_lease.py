"""A lease: one holder at a time, a second process learns who it is, and a dead holder loses the name."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ceca.data.lease import LEASES, Beats, Claim, Holders, LeaseError, Observed, holding, this_process
from ceca.data.store import Store

FAST = {"silent_s": 1.0, "beat_s": 0.1}


def never() -> None:
    pytest.fail("lost")


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path))


def claims(store: Store, name: str) -> list[str]:
    return store.names(LEASES, name)


def test_who_comes_second_is_told_who_works_and_since_when(store):
    with holding(store, "train-a", "the first", on_lost=never, **FAST) as first:
        with (
            pytest.raises(LeaseError, match=f"train-a is held by the first since {first.since}"),
            holding(store, "train-a", "the second", on_lost=never, **FAST),
        ):
            pytest.fail("both")
        with holding(store, "train-b", "the second", on_lost=never, **FAST):  # another name is free
            assert len(claims(store, "train-a")) == 1
    assert claims(store, "train-a") == []
    with holding(store, "train-a", "the second", on_lost=never, **FAST):
        pass


def test_of_many_who_ask_at_once_never_two_hold_it(store):
    inside, most = 0, 0
    lock = threading.Lock()

    def work(number: int) -> bool:
        nonlocal inside, most
        try:
            with holding(store, "name", f"number {number}", on_lost=never, **FAST):
                with lock:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.3)
                with lock:
                    inside -= 1
        except LeaseError:
            return False
        return True

    with ThreadPoolExecutor(6) as workers:
        held = list(workers.map(work, range(6)))
    assert any(held)
    assert most == 1


def test_a_dead_holders_name_is_free_after_its_silence(store):
    dead = {"who": "the dead", "since": "then", "state": "holding", "beat": 7, "silent_s": 1.0}
    store.write_json({**dead, "place": "elsewhere", "process": 1}, LEASES, "name", "old.json")
    said = []
    begun = time.monotonic()
    with holding(store, "name", "the next", on_lost=never, say=said.append, **FAST):
        assert 1.0 <= time.monotonic() - begun < 5.0
        assert "old.json" not in claims(store, "name")
    assert said == ["the dead held name; looking for up to 1 s whether it lives"]


def test_a_claim_is_dead_when_its_beat_has_not_changed_for_its_silence():
    beats, claim = Beats(), Claim("a job", "then", "holding", 7, silent_s=10.0, place="elsewhere", process=1)
    assert beats.observe("name", "claim", claim, now=100.0) == Observed(moved=False, dead=False)
    assert beats.observe("name", "claim", claim, now=109.9) == Observed(moved=False, dead=False)
    assert beats.observe("name", "claim", claim, now=110.0) == Observed(moved=False, dead=True)
    assert beats.observe("name", "claim", claim._replace(beat=8), now=111.0) == Observed(moved=True, dead=False)
    assert beats.observe("name", "claim", claim._replace(beat=8), now=120.9) == Observed(moved=False, dead=False)
    assert beats.observe("another", "claim", claim, now=120.9) == Observed(moved=False, dead=False)


def test_holders_are_listed_until_their_beat_has_stopped_for_their_silence(store):
    dead = Claim("the dead", "then", "holding", 7, silent_s=0.5, place="elsewhere", process=1)
    store.write_json(dead._asdict(), LEASES, "old", "claim.json")
    holders = Holders(store)
    with holding(store, "name", "a job", on_lost=never, **FAST) as lease:
        both = {"name": f"a job since {lease.since}", "old": "the dead since then"}
        assert holders.of() == both
        assert holders.of(["old", "nobody's"]) == {"old": "the dead since then"}
        time.sleep(0.6)
        assert holders.of() == {"name": both["name"]}
    assert holders.of() == {}


def test_a_process_is_described_by_its_role_or_ray_job(monkeypatch):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    place = f"(process {os.getpid()} on {socket.gethostname()})"
    assert this_process() == f"a command {place}"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "raysubmit_1"}}))
    assert this_process() == f"raysubmit_1 {place}"
    assert this_process("the service") == f"the service {place}"


def test_a_holder_whose_claim_was_taken_away_ends(store):
    lost = threading.Event()
    with (  # noqa: PT012
        pytest.raises(LeaseError, match="lost name"),
        holding(store, "name", "the first", on_lost=lost.set, **FAST) as lease,
    ):
        store.remove(LEASES, "name", lease.claim)
        assert lost.wait(5)
        raise KeyboardInterrupt  # as it is told where it works


def test_a_store_that_is_away_for_a_moment_loses_nothing_and_for_long_the_name(store, monkeypatch):
    from ceca.data.store import StoreError

    lost, write = threading.Event(), store.write_json
    with (  # noqa: PT012
        pytest.raises(LeaseError, match="lost name"),
        holding(store, "name", "the first", on_lost=lost.set, **FAST) as lease,
    ):

        def refuse(*_: object) -> None:
            raise StoreError("503")

        monkeypatch.setattr(store, "write_json", refuse)
        time.sleep(0.2)
        monkeypatch.setattr(store, "write_json", write)
        time.sleep(0.4)
        assert not lease.lost
        monkeypatch.setattr(store, "write_json", refuse)
        assert lost.wait(5)
    assert claims(store, "name") == []


def test_a_holder_whose_beat_hangs_in_the_store_ends_before_another_may_begin(store, monkeypatch):
    lost, read, asleep = threading.Event(), store.read_json, threading.Event()

    def hang(*names: str) -> object:
        asleep.wait(3.0)
        return read(*names)

    with pytest.raises(LeaseError), holding(store, "name", "the first", on_lost=lost.set, **FAST):  # noqa: PT012
        begun = time.monotonic()
        monkeypatch.setattr(store, "read_json", hang)
        assert lost.wait(5)
        assert time.monotonic() - begun < FAST["silent_s"]
        asleep.set()


def test_who_gives_up_asking_leaves_no_claim(store, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "names", interrupt)
    with pytest.raises(KeyboardInterrupt), holding(store, "name", "the first", on_lost=never, **FAST):
        pytest.fail("held")
    monkeypatch.undo()
    assert claims(store, "name") == []


def test_a_process_of_this_machine_that_was_killed_holds_nothing(store):
    program = f"""
import time
from ceca.data.lease import holding
from ceca.data.store import Store
with holding(Store({store.uri!r}), "name", "the killed", on_lost=print):
    print("holds", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "holds\n"
        process.kill()
    begun = time.monotonic()
    with holding(store, "name", "the next", on_lost=never):  # though others would wait a minute
        assert time.monotonic() - begun < 5
