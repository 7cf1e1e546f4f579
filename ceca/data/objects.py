"""Objects below one dataset URI: read, written, listed and removed by their names.

Every error of a filesystem becomes a `StoreError`, which says what was attempted and what to do.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from fsspec.implementations.local import LocalFileSystem

from ceca.data.filesystems import (
    StoreError,
    behind_proxy,
    below,
    comes_from_s3,
    filesystem,
    remove_exactly,
    write_whole,
)
from ceca.data.names import MANIFEST
from ceca.data.replacing import Check, Make, read_newest, replace, unchecked


class Objects:
    """The objects below one dataset URI."""

    def __init__(self, uri: str):
        self.fs, self.root = filesystem(uri)
        # Workers of a job may run in another folder, where a relative path would be another place.
        place = self.root or "/"
        self.uri = (f"file://{place}" if "://" in uri else place) if isinstance(self.fs, LocalFileSystem) else uri

    def path(self, *names: str) -> str:
        """Path of an object in the filesystem; errors as in `below`."""
        return below(self.root, *names)

    def place(self, *names: str) -> str:
        """URI of an object, for messages and other programs."""
        return "/".join([self.uri.rstrip("/"), *names])

    def read_bytes(self, *names: str) -> bytes:
        """Content of an object.

        Raises:
            FileNotFoundError: the object does not exist.
            StoreError: the store cannot be reached, or it refuses.
        """
        with self._explained("read", *names):
            return self.fs.cat_file(self.path(*names))

    def write_bytes(self, content: bytes, *names: str) -> None:
        """Write an object atomically: a reader sees the whole object, or the one before.

        Object stores write atomically; a local file is written under another name and then renamed.

        Raises:
            StoreError: the store cannot be reached, or it refuses.
        """
        with self._explained("write", *names):
            write_whole(self.fs, self.path(*names), content)

    def replace(self, make: Make, *names: str, check: Check = unchecked) -> None:
        """Write an object that other processes write too; whoever was overtaken writes nothing (`replacing`).

        Args:
            make: gives the new content for the content that is there.
            names: its path below the dataset.
            check: raises an error if this process may not write any more, such as `Lease.check`.

        Raises:
            StoreError: as in `write_bytes`, or others write all the time. Others as of `check`.
        """
        with self._explained("write", *names):
            replace(self.fs, self.path(*names), make, check)

    def write_json(self, content: Any, *names: str) -> None:
        """Write an object as JSON; atomic, and with errors, as `write_bytes`."""
        self.write_bytes(as_json(content), *names)

    def read_json(self, *names: str) -> Any | None:
        """Content of a JSON object; None if the object does not exist. Of a manifest, which is replaced, the newest.

        Raises:
            StoreError: the store cannot be reached, or the object is not valid JSON.
        """
        try:
            if names[-1].endswith(MANIFEST):
                with self._explained("read", *names):
                    content = read_newest(self.fs, self.path(*names))
            else:
                content = self.read_bytes(*names)
        except FileNotFoundError:
            return None
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{self.place(*names)} is not valid JSON ({error}); remove it and run its stage") from None
        if found is None:  # it is there, and nobody should take it for missing
            raise StoreError(f"{self.place(*names)} holds nothing but null; remove it and run its stage")
        return found

    def read_record(self, *names: str, kind: str, fields: Mapping[str, Any]) -> dict[str, Any] | None:
        """Content of a JSON object that must be a record; None if the object does not exist.

        Args:
            names: its path below the dataset.
            kind: what it should be, for the error.
            fields: fields that it must have, and the type of each.

        Raises:
            StoreError: it is not such a record; the message names the object. Others as in `read_json`.
        """
        record = self.read_json(*names)
        if record is None:
            return None
        wrong = [name for name, kept in fields.items() if not isinstance(_get(record, name), kept)]
        if wrong:
            raise StoreError(
                f"{self.place(*names)} is not {kind}, for lack of {', '.join(wrong)}: found {json.dumps(record):.80}; "
                "remove it"
            )
        whole: dict[str, Any] = record
        return whole

    def names(self, *names: str) -> list[str]:
        """Sorted names of the objects in a folder, without unfinished ones; empty if the folder does not exist."""
        folder = self.path(*names)
        with self._explained("list", *names):
            if not self.fs.exists(folder):
                return []
            listed = sorted(Path(path).name for path in self.fs.ls(folder, detail=False))
        return [name for name in listed if not name.endswith(".tmp")]

    def walk(self, *names: str) -> list[str]:
        """Sorted paths, below the dataset, of all objects below a folder, also of unfinished ones."""
        with self._explained("list", *names):
            paths = self.fs.find(self.path(*names))
        return sorted(path[len(self.root) + 1 :] for path in paths)

    def sizes(self, *names: str) -> dict[str, int]:
        """Path, below the dataset, and size in bytes of all objects below a folder."""
        with self._explained("list", *names):
            found = self.fs.find(self.path(*names), detail=True)
        return {path[len(self.root) + 1 :]: described["size"] for path, described in sorted(found.items())}

    @contextlib.contextmanager
    def open(self, *names: str) -> Iterator[Any]:
        """Open an object to read ranges of it; errors as in `read_bytes`."""
        path = self.path(*names)
        # Arrow reads its own file without Python's lock: threads read several, and each in a third of the time.
        local = isinstance(self.fs, LocalFileSystem)
        with self._explained("read", *names), pa.OSFile(path) if local else self.fs.open(path, "rb") as file:
            yield file

    def remove(self, *names: str) -> None:
        """Remove a folder or object, if it exists."""
        with self._explained("remove", *names):
            remove_exactly(self.fs, self.path(*names))

    def _explained(self, verb: str, *names: str) -> _Explained:
        return _Explained(f"cannot {verb} {self.place(*names)}")


def as_json(content: Any) -> bytes:
    """Encode the content of a JSON object, the same bytes for the same content."""
    return json.dumps(content, indent=1, sort_keys=True).encode()


def _get(record: Any, name: str) -> Any:
    return record.get(name) if isinstance(record, dict) else None


class _Explained:
    """Turns the errors of filesystems into a StoreError that says what was attempted and what to do."""

    def __init__(self, attempt: str):
        self.attempt = attempt

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> Literal[False]:
        if error is None or isinstance(error, StoreError):
            return False
        if isinstance(error, FileNotFoundError):
            if "cannot write" not in self.attempt:
                return False  # readers handle a missing object
            advice = "check that the bucket or folder exists"
        elif isinstance(error, PermissionError):
            # S3 answers the first request with a plain 403, also if this machine's clock is wrong.
            advice = (
                "check the permissions; for s3://, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                f"and that the clock of this machine is right{behind_proxy()}"
            )
        elif isinstance(error, OSError) and error.errno == 28:
            advice = "the disk is full: free some space and start the same command again, finished work is kept"
        elif isinstance(error, OSError | pa.ArrowException) or comes_from_s3(error):
            advice = f"check the place and, for s3://, AWS_ENDPOINT_URL and the other AWS_* variables{behind_proxy()}"
        else:
            return False
        raise StoreError(f"{self.attempt}: {type(error).__name__}: {error}; {advice}") from error
