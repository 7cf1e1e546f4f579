"""Replacing an object that several processes write: whoever was overtaken does not write over newer content.

A process that was stopped goes on where it was, although another holds its name by now. A look at the lease before the
write does not help: the process may be stopped between the look and the write, and a request may be late. What helps
depends on the filesystem, and is found out once:

    a local folder             the content is compared and renamed under a lock of the folder; memory:// likewise
    S3 with conditional writes the server compares (If-Match, If-None-Match)
    anything else              turns, since `rclone serve s3` and some network filesystems do neither

Turns lie beside the object:

    .turns/00000007-<digest>.asked    somebody wants to write the content with this digest
    .turns/00000007-<digest>.json     the content; from now on it replaces those of lower numbers

A writer asks first, looks at its lease second, takes its turn third and writes the object last. A process that takes
over in between gets a higher number. Readers take the newest turn where the object holds the content of an older one.
An object whose content belongs to no turn was written by another program, and counts as it is. Turns put holders of a
lease in order; of two writers without a lease that write at the same moment, one may be lost.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from ceca.data.filesystems import StoreError, write_whole, written_aside
from ceca.data.names import TURNS

Make = Callable[[bytes | None], bytes | None]  # content, None if there is none → new content; None leaves the object
Check = Callable[[], None]  # raises an error if this process may not write any more

ATTEMPTS = 100  # each of them lost to another writer
LOCKED_S = 60.0  # a holder of the lock needs milliseconds
TURN = re.compile(r"(?P<number>\d{8})-(?P<digest>[0-9a-f]{16})\.(?P<state>asked|json)")
REFUSED = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}  # by S3: another content is there
UNKNOWN = {"NotImplemented", "501", "InvalidArgument", "InvalidRequest", "400"}  # by S3: it has no such condition


def unchecked() -> None:
    """Always allow the write: nobody else writes."""


def replace(fs: fsspec.AbstractFileSystem, path: str, make: Make, check: Check = unchecked) -> None:
    """Replace the content of an object by what is made of it. Every change by others in between is seen.

    Args:
        fs: the filesystem.
        path: the object.
        make: gives the new content; called again if the content has changed meanwhile.
        check: called before each attempt to write, after the content was read.

    Raises:
        StoreError: others write all the time, or one of them holds the folder's lock and does not go on.
    """
    way = _way(fs, path)
    for _ in range(ATTEMPTS):
        if way(fs, path, make, check):
            return
    raise StoreError(f"{path} is written by other processes all the time; end them and start again")


def read_newest(fs: fsspec.AbstractFileSystem, path: str) -> bytes:
    """Content of an object that `replace` writes.

    Raises:
        FileNotFoundError: there is none.
    """
    content: bytes = fs.cat_file(path)
    if _CONDITIONAL.get(_server(fs, path)):
        return content
    turns = _turns(fs, path)
    newest = max((turn for turn in turns if turn.state == "json"), default=None)
    of_content = max((turn.number for turn in turns if turn.digest == _digest(content)), default=None)
    if newest is None or of_content is None or of_content >= newest.number:
        return content
    late: bytes = fs.cat_file(newest.place(path))
    return late


def _way(fs: fsspec.AbstractFileSystem, path: str) -> Callable[[fsspec.AbstractFileSystem, str, Make, Check], bool]:
    if isinstance(fs, MemoryFileSystem):
        return _set
    if isinstance(fs, LocalFileSystem):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with contextlib.suppress(OSError), _locked(path):
            return _rename
        return _take_turn
    return _write_if_same if "s3" in fs.protocol and _has_conditions(fs, path) else _take_turn


def _read(fs: fsspec.AbstractFileSystem, path: str) -> bytes | None:
    try:
        return read_newest(fs, path)
    except FileNotFoundError:
        return None


# --- a local folder, and memory ---------------------------------------------------------------------------

_MEMORY = threading.Lock()


def _set(fs: fsspec.AbstractFileSystem, path: str, make: Make, check: Check) -> bool:
    before = _read(fs, path)
    content = make(before)
    if content is None or content == before:
        return True
    check()
    with _MEMORY:
        if _read(fs, path) != before:
            return False
        write_whole(fs, path, content)
    return True


def _rename(fs: fsspec.AbstractFileSystem, path: str, make: Make, check: Check) -> bool:
    before = _read(fs, path)
    content = make(before)
    if content is None or content == before:
        return True
    check()
    with written_aside(path, content) as aside, _locked(path):
        if _read(fs, path) != before:
            return False
        os.replace(aside, path)
    return True


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Hold the lock of an object's folder; the system frees it when the process ends.

    Raises:
        OSError: the filesystem has no locks of folders.
        StoreError: another process has held it for `LOCKED_S` seconds.
    """
    folder = os.open(os.path.dirname(path), os.O_RDONLY)
    try:
        give_up = time.monotonic() + LOCKED_S
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise StoreError(
                        f"{path} is being written by another process, which has not gone on for {LOCKED_S:.0f} s; "
                        "end that process (it may be stopped) and start again"
                    ) from None
                time.sleep(0.01)
        yield
    finally:
        os.close(folder)


# --- S3 with conditional writes ---------------------------------------------------------------------------

_CONDITIONAL: dict[tuple[str, str], bool] = {}  # server and bucket → whether it has conditional writes


def _server(fs: fsspec.AbstractFileSystem, path: str) -> tuple[str, str]:
    return fs._fs_token, path.split("/")[0]


def _write_if_same(fs: fsspec.AbstractFileSystem, path: str, make: Make, check: Check) -> bool:
    try:
        tag = fs.info(path)["ETag"]  # before the content: if that is newer, the write is refused
        before: bytes | None = fs.cat_file(path)
    except FileNotFoundError:
        tag, before = None, None
    content = make(before)
    if content is None or content == before:
        return True
    check()
    return _put(fs, path, content, {"IfMatch": tag} if tag else {"IfNoneMatch": "*"}) or _read(fs, path) == content


def _put(fs: fsspec.AbstractFileSystem, path: str, content: bytes, condition: dict[str, str]) -> bool:
    """Write an object of S3 on a condition. Returns whether it is fulfilled."""
    try:
        fs.pipe_file(path, content, **condition)
    except OSError as error:
        if isinstance(error, FileExistsError) or _code(error) in REFUSED:
            return False
        if "IfMatch" in condition and _code(error) in ("NoSuchKey", "404"):  # removed meanwhile
            return False
        raise
    return True


def _code(error: OSError) -> str:
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _has_conditions(fs: fsspec.AbstractFileSystem, path: str) -> bool:
    """Whether an S3 server refuses a write whose condition is wrong, and takes one whose condition is right."""
    server = _server(fs, path)
    if server not in _CONDITIONAL:
        probe = f"{os.path.dirname(path)}/{TURNS}/probe-{uuid.uuid4().hex}"
        fs.pipe_file(probe, b"1")
        try:
            right = {"IfMatch": fs.info(probe)["ETag"]}
            wrong = ({"IfNoneMatch": "*"}, {"IfMatch": f'"{"0" * 32}"'})
            _CONDITIONAL[server] = not any(_put(fs, probe, b"1", condition) for condition in wrong) and _put(
                fs, probe, b"1", right
            )
        except OSError as error:
            if _code(error) not in UNKNOWN:
                raise
            _CONDITIONAL[server] = False
        finally:
            fs.rm_file(probe)
    return _CONDITIONAL[server]


# --- turns ------------------------------------------------------------------------------------------------


class Turn(NamedTuple):
    """A writer's place in the order of writers."""

    number: int
    digest: str
    state: str  # `asked`, or `json` for one that was taken

    def place(self, path: str) -> str:
        """Path of its record, for an object's path."""
        return f"{os.path.dirname(path)}/{TURNS}/{self.number:08d}-{self.digest}.{self.state}"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _turns(fs: fsspec.AbstractFileSystem, path: str) -> list[Turn]:
    try:
        listed = fs.find(f"{os.path.dirname(path)}/{TURNS}")
    except FileNotFoundError:
        return []
    found = (TURN.fullmatch(name.rpartition("/")[2]) for name in listed)
    return [Turn(int(turn["number"]), turn["digest"], turn["state"]) for turn in found if turn is not None]


def _take_turn(fs: fsspec.AbstractFileSystem, path: str, make: Make, check: Check) -> bool:
    before = _read(fs, path)
    content = make(before)
    if content is None or content == before:
        return True
    asked = Turn(max((turn.number for turn in _turns(fs, path)), default=0) + 1, _digest(content), "asked")
    write_whole(fs, asked.place(path), b"")
    if any(turn.number == asked.number and turn != asked for turn in _turns(fs, path)):  # of two, one sees the other
        time.sleep(random.uniform(0, 0.1))
        return False
    if _read(fs, path) != before:  # taken before this number was asked for; it would be lost
        return False
    check()
    write_whole(fs, asked._replace(state="json").place(path), content)
    write_whole(fs, path, content)
    newest = max(turn for turn in _turns(fs, path) if turn.state == "json")
    if newest.number <= asked.number:
        return True
    write_whole(fs, path, fs.cat_file(newest.place(path)))  # for programs that do not know of turns
    return False
