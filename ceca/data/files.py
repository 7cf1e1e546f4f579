"""Files of this machine that keep what was read from a store."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from ceca.data.filesystems import StoreError

CACHED_DAYS = 30  # a file of another dataset that was not opened for this long is removed


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """Write a file of this machine as a whole: another process sees nothing or all of it."""
    aside = path.parent / f"{uuid.uuid4().hex}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            yield file
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def sweep(folder: Path, current: set[str]) -> None:
    """Remove files from this machine that no search needs. A process that has one mapped keeps its content.

    Args:
        folder: files of one dataset. The ones that are not current are removed at once, because they may hold images
            that were erased. Those of other datasets are removed when they were not opened for `CACHED_DAYS`.
        current: digests, which begin the names of the files to keep.
    """
    for file in folder.parent.glob("*/*"):
        if file.parent.is_symlink():  # it leads to files that are no shards
            continue
        try:
            age = time.time() - file.lstat().st_mtime
            outdated = file.parent == folder and file.name.partition(".")[0] not in current
            abandoned = file.suffix == ".tmp" and age > 3600  # its writer was killed
            if abandoned or (file.suffix in (".npy", ".npz") and (outdated or age > CACHED_DAYS * 86_400)):
                file.unlink(missing_ok=True)
        except FileNotFoundError:  # another process was faster
            continue
        except OSError as error:
            raise StoreError(f"cannot remove {file} ({error}); set CECA_CACHE to a folder of your own") from error
