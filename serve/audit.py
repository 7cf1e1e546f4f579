"""The log of requests: one line of JSON for each request that an ingress replica answers, in a file of its own.

Only the service's user can read the file. The length of a line has a limit, whatever a client sends. Searched words
appear as a hash only. Without keys all clients are alike, and nothing is logged.

    python -m serve.audit [FOLDER]      print the lines of all files of this machine as they come, for a log collector
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
import sys
import time
from collections.abc import Iterator
from io import TextIOWrapper
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ceca.environment import others_write
from ceca.errors import UserError

if TYPE_CHECKING:
    from fastapi import Request

AUDIT = logging.getLogger("ceca.audit")
TEXT_LIMIT, LIST_LIMIT = 200, 200  # characters of a text, and items of a list; a path and a page of hits fit
LINE_LIMIT = 8 * 1024  # bytes
COLLECT_S = 1.0  # between two looks for new lines
FILE_LIMIT, FILES = 100 * 1024 * 1024, 10  # bytes of a replica's file, and number of earlier files that are kept


class PrivateFile(RotatingFileHandler):
    """A file that only this user can read. When it is full, another one begins; the oldest is deleted."""

    def _open(self) -> TextIOWrapper:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        return open(os.open(self.baseFilename, flags, 0o600), "a", encoding="utf-8")


def open_audit(folder: str) -> Path:
    """Begin a file for this process.

    Args:
        folder: where; empty means the default, `~/.local/state/ceca/audit`.

    Raises:
        UserError: the folder cannot be written, or others can change it.
    """
    path = audit_folder(folder) / f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}.jsonl"
    _use(PrivateFile(path, maxBytes=FILE_LIMIT, backupCount=FILES))
    return path


def close_audit() -> None:
    """Log nothing."""
    _use(logging.NullHandler())


def _use(handler: logging.Handler) -> None:
    for earlier in AUDIT.handlers:
        earlier.close()
    AUDIT.handlers = [handler]
    AUDIT.setLevel(logging.INFO)
    AUDIT.propagate = False


def audit_folder(folder: str) -> Path:
    """Make the folder of the log, if it is not there.

    Raises:
        UserError: see `open_audit`.
    """
    try:
        path = Path(folder) if folder else Path.home() / ".local" / "state" / "ceca" / "audit"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode):
            raise UserError(f"the folder of the log of requests, {path}, is a link or a file: set `audit` to a folder")
        if others_write(found):
            raise UserError(f"others can write to {path}, the folder of the log of requests: set `audit` to another")
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(13, "no permission to write")
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        raise UserError(
            f"cannot write the log of requests below {folder or '~/.local/state/ceca/audit'} "
            f"({getattr(error, 'strerror', None) or error}): set `audit` to a folder that the service may write"
        ) from None
    return path


class Collector:
    """Reads the lines that processes write to the files of a folder, each line once.

    A line is complete when its end is there. A file that was full is found again under its new name.

    Args:
        folder: the folder of the log.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.read: dict[int, int] = {}  # inode → bytes

    def lines(self) -> Iterator[str]:
        """Lines that are new since the last call, file by file."""
        found = {}
        for path in sorted(self.folder.glob("*.jsonl*")):
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                file.seek(self.read.get(inode, 0))
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    found[inode] = self.read[inode] = self.read.get(inode, 0) + len(line)
                    yield line.decode().rstrip("\n")
                found[inode] = self.read.get(inode, 0)
        self.read = found  # inodes of files that are gone may be given to others


def note(request: Request, **facts: Any) -> None:
    """Add fields to the line about a request."""
    request.state.facts |= facts


def audit(who: str, action: str, status: int, facts: dict[str, Any]) -> None:
    """Write a line.

    Args:
        who: name of the key.
        action: method and path.
        status: HTTP status of the response; 499 if the client left before it.
        facts: further fields.
    """
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    always = {"time": moment, "who": who[:TEXT_LIMIT], "action": action[:TEXT_LIMIT], "status": status}
    line = json.dumps({**always, **_bounded(facts)})
    AUDIT.info(line if len(line) <= LINE_LIMIT else json.dumps({**always, "cut": len(line)}))


def _bounded(facts: dict[str, Any]) -> dict[str, Any]:
    bounded: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, list):
            bounded[name] = [item[:TEXT_LIMIT] for item in value[:LIST_LIMIT]]
            if len(value) > LIST_LIMIT:
                bounded[f"more_{name}"] = len(value) - LIST_LIMIT
        else:
            bounded[name] = value[:TEXT_LIMIT]
    return bounded


def hashed(query: str | bytes) -> str:
    """16 hex digits of the SHA-256 of a query, for the log."""
    return hashlib.sha256(query if isinstance(query, bytes) else query.encode()).hexdigest()[:16]


def main(folder: str = "") -> None:
    """Print the lines of all files of a folder as they come, for ever.

    Args:
        folder: the folder of the log; empty means the default.
    """
    collector = Collector(audit_folder(folder))
    while True:
        for line in collector.lines():
            print(line)
        sys.stdout.flush()
        time.sleep(COLLECT_S)


if __name__ == "__main__":
    main(*sys.argv[1:2])
