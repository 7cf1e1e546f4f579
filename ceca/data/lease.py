"""A lease in the store: of all who want to work under one name, one does, and the others learn who holds it.

    .leases/<name>/<claim>.json      who, since when, and a beat that the holder raises while it works

An object store need offer no more than that a listing shows what was written before. Whoever wants the name writes a
claim and only then looks for others: of two who ask at once at least one sees the other, and whoever sees another
withdraws. No clock is compared: a claim whose beat somebody has seen unchanged for `silent_s`, by their own clock, is
a dead process's; of a process of the same machine that is seen at once. A holder gives the name up after half of that
without a beat of its own, whatever keeps it from it: the store, or its own sleep.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ceca.data.names import LEASES
from ceca.data.store import Store
from ceca.environment import lease_silent_s
from ceca.errors import UserError

BEATS = 12  # a holder's signs of life in the time after which silence counts as death


def _place() -> str:
    """Where a process's number means this process: the machine since it was started, and the container on it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        return ""


def _has_died(claim: dict[str, Any]) -> bool:
    if not claim["place"] or claim["place"] != _place():
        return False  # nobody can tell from here
    try:
        os.kill(claim["process"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's, who lives
        pass
    return False


class LeaseError(UserError):
    """The name is another's."""


class Holders:
    """Who holds names in a store and lives, by what is seen of their beats from one look to the next."""

    def __init__(self, store: Store):
        self.store = store
        self.seen: dict[tuple[str, str], tuple[int, float]] = {}  # of each claim the beat, and when it was first seen

    def of(self, names: Iterable[str] | None = None) -> dict[str, str]:
        """Of these names, or of all, those that are held: by whom, and since when.

        Who has died counts on its own machine no more, and elsewhere until this has looked for its `silent_s`.
        """
        held = {}
        for name in self.store.names(LEASES) if names is None else names:
            for claim in self.store.names(LEASES, name):
                found = self.store.read_json(LEASES, name, claim)
                if found is None:
                    continue
                beat, first = self.seen.get((name, claim), (None, 0.0))
                if beat != found["beat"]:
                    first = time.monotonic()
                    self.seen[name, claim] = found["beat"], first
                if time.monotonic() - first < found["silent_s"] and not _has_died(found):
                    held[name] = f"{found['who']} since {found['since']}"
        return held


class Lease:
    """A name that this process holds. `lost` becomes true when it may be another's."""

    def __init__(self, store: Store, name: str, who: str, on_lost: Callable[[], None], silent_s: float, beat_s: float):
        self.store, self.name, self.who, self.on_lost = store, name, who, on_lost
        self.silent_s, self.beat_s = silent_s, beat_s
        self.claim, self.since = f"{uuid.uuid4().hex}.json", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.beats, self.lost = 0, False
        self.last = 0.0  # when the last beat that arrived was begun
        self.ended = threading.Event()
        # Two, for a beat may hang in the store, and that is to be noticed.
        self.threads = [
            threading.Thread(target=work, name=f"lease {name}", daemon=True) for work in (self._beat, self._watch)
        ]

    def acquire(self, say: Callable[[str], None]) -> None:
        """Take the name, at the latest after `silent_s` where the process that held it has died.

        Raises:
            LeaseError: somebody holds it and lives; says who, and since when.
        """
        seen: dict[tuple[str, int], float] = {}  # claims and beats, and when they were first seen
        told = False
        while True:
            self._write("asking")
            now = time.monotonic()
            others = self._others()
            for claim, found in others.items():
                first = seen.setdefault((claim, found["beat"]), now)
                if found["state"] == "holding" and any(key[0] == claim and key[1] != found["beat"] for key in seen):
                    raise LeaseError(
                        f"{self.name} is held by {found['who']} since {found['since']}: it works on the same thing; "
                        "wait until it ends, or end it"
                    )
                if now - first >= found["silent_s"] or _has_died(found):
                    self.store.remove(LEASES, self.name, claim)
            if not self._others():
                self._write("holding")
                if not self._others() and not self._late():  # else it was asleep in between, and not seen to live
                    break
            self._withdraw()
            alive = [found for found in others.values() if not _has_died(found)]
            if alive and not told:
                found = alive[0]
                say(f"{found['who']} held {self.name}; looking for up to {found['silent_s']:.0f} s whether it lives")
                told = True
            time.sleep(random.uniform(0.2, 1.0) * min(1.0, self.silent_s / 5))
        for thread in self.threads:
            thread.start()

    def release(self) -> None:
        """Whatever has happened: end the threads, take the claim back."""
        self.ended.set()
        with contextlib.suppress(Exception):  # else it falls silent
            self._withdraw()

    def _others(self) -> dict[str, dict[str, Any]]:
        names = [name for name in self.store.names(LEASES, self.name) if name != self.claim]
        found = {name: self.store.read_json(LEASES, self.name, name) for name in names}
        return {name: claim for name, claim in found.items() if claim is not None}

    def _write(self, state: str) -> None:
        begun = time.monotonic()
        self.beats += 1
        content = {"who": self.who, "since": self.since, "state": state, "beat": self.beats, "silent_s": self.silent_s}
        content |= {"place": _place(), "process": os.getpid()}
        self.store.write_json(content, LEASES, self.name, self.claim)
        self.last = begun

    def _withdraw(self) -> None:
        self.store.remove(LEASES, self.name, self.claim)

    def _late(self) -> bool:
        return time.monotonic() - self.last > self.silent_s / 2

    def _beat(self) -> None:
        while not self.ended.wait(self.beat_s) and not self.lost:
            with contextlib.suppress(Exception):  # the store is away: perhaps not for long
                if self.store.read_json(LEASES, self.name, self.claim) is None:
                    self._lose()
                elif not self._late():  # what was given up is not taken back
                    self._write("holding")
        if self.ended.is_set():
            with contextlib.suppress(Exception):  # a beat that was on its way when it was taken back
                self._withdraw()

    def _watch(self) -> None:
        while not self.ended.wait(self.beat_s / 2) and not self.lost:
            if self._late():
                self._lose()

    def _lose(self) -> None:
        if not self.lost and not self.ended.is_set():
            self.lost = True
            self.on_lost()


@contextlib.contextmanager
def holding(
    store: Store,
    name: str,
    who: str,
    *,
    on_lost: Callable[[], None],
    say: Callable[[str], None] = print,
    silent_s: float | None = None,
    beat_s: float | None = None,
) -> Iterator[Lease]:
    """Hold a name while the context lasts.

    Args:
        who: as others are told. on_lost: called from a thread when the name may be another's; the work must end.
        say: what takes so long, where somebody died who held it.

    Raises:
        LeaseError: somebody else holds it, or it was lost meanwhile.
    """
    silent_s = lease_silent_s() if silent_s is None else silent_s
    lease = Lease(store, name, who, on_lost, silent_s, silent_s / BEATS if beat_s is None else beat_s)
    lost = f"lost {name}: the store did not hear of this process for {silent_s / 2:.0f} s, or its claim was removed"
    try:
        lease.acquire(say)
        yield lease
    except BaseException:  # also what `on_lost` has raised in the main thread
        if lease.lost:
            raise LeaseError(lost) from None
        raise
    finally:
        lease.release()
    if lease.lost:
        raise LeaseError(lost)
