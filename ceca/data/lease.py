"""A lease in the store: one process at a time works under a name, and the others learn who holds it.

    .leases/<name>/<claim>.json      the holder, the start time, and a beat that the holder raises while it works

The store only needs to list every object that was written before the listing. A process that wants the name writes a
claim first and looks for other claims second. If two processes ask at once, at least one of them sees the other, and a
process that sees another withdraws.

No clocks are compared. A process is dead when another has seen its beat unchanged for `silent_s` seconds by its own
clock; a process of the same machine is checked directly. Whoever goes on without a dead process removes its claim
first. A holder that cannot raise its beat for half of that time gives the name up, whether the store is away or the
holder was asleep. A holder that was asleep may go on for a moment before it notices; `Lease.check` tells it.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ceca.data.names import LEASES
from ceca.data.store import Store, StoreError
from ceca.environment import lease_silent_s, ray_job_id
from ceca.errors import UserError

BEATS = 12  # beats of a holder within `silent_s`


class LeaseError(UserError):
    """Another process holds the name."""


def this_process(role: str = "") -> str:
    """Describe this process to others that want a name it holds.

    Args:
        role: what the process is, e.g. "the service"; by default the id of its Ray job, or "a command".
    """
    return f"{role or ray_job_id() or 'a command'} (process {os.getpid()} on {socket.gethostname()})"


def _place() -> str:
    """Where a process id is unique: this boot of the machine and its container; empty outside Linux."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


class Claim(NamedTuple):
    """Content of a claim."""

    who: str
    since: str  # UTC
    state: str  # `asking` or `holding`
    beat: int
    silent_s: float
    place: str  # see `_place`
    process: int  # process id, valid at `place`

    def __str__(self) -> str:
        return f"{self.who} since {self.since}"

    def process_ended(self) -> bool:
        """Whether the process has ended; always false where this machine cannot tell."""
        if not self.place or self.place != _place():
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # a living process of another user
            pass
        return False


CLAIM = {
    **dict.fromkeys(("who", "since", "state", "place"), str),
    **dict.fromkeys(("beat", "process"), int),
    "silent_s": (int, float),
}


def _read_claims(store: Store, name: str, but: str = "") -> dict[str, Claim]:
    """The claims to a name except the object `but`: object name → content."""
    objects = [claim for claim in store.names(LEASES, name) if claim != but]
    records = {claim: store.read_record(LEASES, name, claim, kind="a claim", fields=CLAIM) for claim in objects}
    return {claim: _parse(record) for claim, record in records.items() if record is not None}


def _parse(record: dict[str, Any]) -> Claim:
    return Claim(**{field: record[field] for field in Claim._fields})


class Observed(NamedTuple):
    """What one look at a claim showed."""

    moved: bool  # the beat has changed since the look before
    dead: bool  # the beat has stayed the same for `silent_s`, or the process is known to have ended


class Beats:
    """The beats of claims from one look to the next: the one place that decides which claims are dead."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, str], tuple[int, float]] = {}  # (name, claim) → last beat, when it was first seen

    def observe(self, name: str, claim: str, content: Claim, now: float) -> Observed:
        """Compare a claim's beat with the look before.

        Args:
            name: the name that is claimed.
            claim: name of the claim's object.
            content: the claim as it was just read.
            now: time of this look by `time.monotonic`, in seconds.
        """
        beat, first = self.seen.get((name, claim), (None, now))
        moved = beat is not None and beat != content.beat
        if beat != content.beat:
            first = now
            self.seen[name, claim] = content.beat, first
        return Observed(moved, dead=now - first >= content.silent_s or content.process_ended())


class Holders:
    """The living holders of the names in a store, judged by their beats from one call of `of` to the next."""

    def __init__(self, store: Store):
        self.store, self.beats = store, Beats()

    def of(self, names: Iterable[str] | None = None) -> dict[str, str]:
        """Held names (all, or those given) → holder and start time.

        A dead holder is left out at once on its own machine, elsewhere once its beat has not changed for `silent_s`.
        Its claim is removed, so that it knows if it was only asleep.
        """
        held = {}
        for name in self.store.names(LEASES) if names is None else names:
            for claim, content in _read_claims(self.store, name).items():
                if self.beats.observe(name, claim, content, time.monotonic()).dead:
                    self.store.remove(LEASES, name, claim)
                else:
                    held[name] = str(content)
        return held


class Lease:
    """A name that this process holds. `lost` becomes true when another process may hold it."""

    def __init__(self, store: Store, name: str, who: str, on_lost: Callable[[], None], silent_s: float, beat_s: float):
        self.store, self.name, self.who, self.on_lost = store, name, who, on_lost
        self.silent_s, self.beat_s = silent_s, beat_s
        self.claim, self.since = f"{uuid.uuid4().hex}.json", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.beats, self.held, self.lost = 0, False, False
        self.last = 0.0  # start of the last write that reached the store
        self.ended = threading.Event()
        # Two threads: a beat may hang in the store, and the second thread notices that.
        self.threads = [
            threading.Thread(target=work, name=f"lease {name}", daemon=True) for work in (self._beat, self._watch)
        ]

    def acquire(self, say: Callable[[str], None]) -> None:
        """Take the name. After a holder that died this takes up to its `silent_s`.

        Args:
            say: prints why it takes long, once.

        Raises:
            LeaseError: a living process holds the name; the message says who, and since when.
        """
        beats, said = Beats(), False
        while True:
            self._write("asking")
            now = time.monotonic()
            others = self._others()
            for claim, content in others.items():
                observed = beats.observe(self.name, claim, content, now)
                if content.state == "holding" and observed.moved:
                    raise LeaseError(
                        f"{self.name} is held by {content}: it works on the same thing; wait until it ends, or end it"
                    )
                if observed.dead:
                    self.store.remove(LEASES, self.name, claim)
            if not self._others():
                self._write("holding")
                # A process that slept since its first write may have been taken for dead.
                if not self._others() and not self._late():
                    self.held = True
                    break
            self._withdraw()
            maybe_alive = [content for content in others.values() if not content.process_ended()]
            if maybe_alive and not said:
                other = maybe_alive[0]
                say(f"{other.who} held {self.name}; looking for up to {other.silent_s:.0f} s whether it lives")
                said = True
            time.sleep(random.uniform(0.2, 1.0) * min(1.0, self.silent_s / 5))
        for thread in self.threads:
            thread.start()

    def check(self) -> None:
        """Look whether this process still holds the name, before a step that must not be taken otherwise.

        Raises:
            LeaseError: another process may hold it.
        """
        if self.lost or self._late() or self.store.read_json(LEASES, self.name, self.claim) is None:
            self.lost = True
            raise LeaseError(
                f"lost {self.name}: the store did not hear of this process for {self.silent_s / 2:g} s, or its claim "
                "was removed; another process may have gone on with it"
            )

    def release(self) -> None:
        """End the threads and remove the claim, whatever has happened before."""
        self.ended.set()
        with contextlib.suppress(Exception):  # a claim that stays counts as dead after `silent_s`
            self._withdraw()

    def _others(self) -> dict[str, Claim]:
        return _read_claims(self.store, self.name, but=self.claim)

    def _write(self, state: str) -> None:
        begun = time.monotonic()
        self.beats += 1
        content = Claim(self.who, self.since, state, self.beats, self.silent_s, _place(), os.getpid())
        self.store.write_json(content._asdict(), LEASES, self.name, self.claim)
        self.last = begun

    def _withdraw(self) -> None:
        self.store.remove(LEASES, self.name, self.claim)

    def _late(self) -> bool:
        return time.monotonic() - self.last > self.silent_s / 2

    def _beat(self) -> None:
        while not self.ended.wait(self.beat_s) and not self.lost:
            with contextlib.suppress(Exception):  # the store is away, perhaps for a moment only
                if self.store.read_json(LEASES, self.name, self.claim) is None:
                    self._lose()
                elif not self._late():  # a name that was given up is not taken back
                    self._write("holding")
        if self.ended.is_set():
            with contextlib.suppress(Exception):  # a beat that was under way may have written the claim again
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
        store: the dataset.
        name: the name to hold.
        who: this process, as other processes print it (`this_process`).
        on_lost: called from a thread when another process may hold the name; the work must then end.
        say: prints why it takes long when a former holder may have died.
        silent_s: seconds without a beat after which this process counts as dead; by default `CECA_LEASE_SILENT_S`.
        beat_s: seconds between beats; by default silent_s / BEATS.

    Raises:
        LeaseError: another process holds the name, or the name was lost while the context lasted.
    """
    silent_s = lease_silent_s() if silent_s is None else silent_s
    lease = Lease(store, name, who, on_lost, silent_s, silent_s / BEATS if beat_s is None else beat_s)
    try:
        lease.acquire(say)
        yield lease
    except LeaseError:
        raise
    except BaseException:  # also what `on_lost` raises in the main thread, and what follows from a loss
        if lease.held:
            with contextlib.suppress(StoreError):
                lease.check()
        raise
    finally:
        lease.release()
    if lease.lost:
        lease.check()
