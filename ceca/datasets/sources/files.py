"""Pictures that are files: those of the dataset are read, and every other kind is a reject."""

from __future__ import annotations

import dataclasses
import os
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from ceca.data.store import Reject, StoreError
from ceca.datasets.links import is_inside
from ceca.datasets.rows import Row

READERS = 16  # an object store answers many requests at once


@dataclasses.dataclass(frozen=True)
class Files:
    """Picture files below a folder.

    Attributes:
        fs: the filesystem.
        root: the folder; nothing outside is read.
        folders: folders below it in which a path may be, in the order in which they are tried.
        endings: what may follow a path, in the order in which they are tried.
    """

    fs: Any
    root: str
    folders: Sequence[str] = ("",)
    endings: Sequence[str] = ("",)

    def read(self, paths: Sequence[str]) -> list[bytes | Reject]:
        """The bytes of files, or why there are none.

        Raises:
            StoreError: the filesystem cannot be reached.
        """
        with ThreadPoolExecutor(READERS) as readers:
            return list(readers.map(self._read, paths))

    def _read(self, path: str) -> bytes | Reject:
        problem: Reject | None = None
        for folder in self.folders:
            for ending in self.endings:
                # Some file systems spell an accented letter as one character, others as two.
                for spelling in dict.fromkeys((path, *(unicodedata.normalize(form, path) for form in ("NFC", "NFD")))):
                    content = self._read_file(path, self._below(folder), f"{spelling}{ending}")
                    if not isinstance(content, Reject) or content.reason != "missing_file":
                        return content
                    problem = problem or content
        assert problem is not None
        return problem

    def _below(self, folder: str) -> str:
        return f"{self.root}/{folder}" if folder else self.root

    def _read_file(self, path: str, folder: str, name: str) -> bytes | Reject:
        place = f"{folder}/{name}"
        if isinstance(self.fs, LocalFileSystem):
            problem = find_file_problem(Path(place), Path(folder))
            if problem is not None:
                return Reject(path, *problem)
        try:
            content: bytes = self.fs.cat_file(place)
            return content
        except (FileNotFoundError, IsADirectoryError):
            return Reject(path, "missing_file", f"no {place}")
        except OSError as error:
            raise StoreError(f"cannot read {place}: {error}") from error


def find_file_problem(file: Path, folder: Path) -> tuple[str, str] | None:
    """Why a local file is not read, as a reject's reason and detail; None if it can be.

    Args:
        file: the file.
        folder: the folder of the dataset's images, outside which nothing is read.
    """
    try:
        resolved = file.resolve(strict=True)
        if not is_inside(resolved, folder):
            return "outside_the_dataset", f"{file} leads to {resolved}; a dataset's images stay in {folder}"
        if not resolved.is_file():
            return "missing_file", f"{file} is no file"
        with resolved.open("rb"):
            return None
    except (FileNotFoundError, NotADirectoryError):
        return "missing_file", f"no {file}"
    except (OSError, RuntimeError, ValueError) as error:  # not allowed, a circle of links, a name that is too long
        return "unreadable_file", f"{file}: {error}"


def list_files(fs: Any, root: str) -> Iterator[tuple[str, int]]:
    """Path below a folder and size of every file in it, folder by folder and sorted; hidden ones are left out."""
    if isinstance(fs, LocalFileSystem):
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                path = os.path.join(folder, name)
                if not name.startswith("."):
                    yield os.path.relpath(path, root), os.lstat(path).st_size
        return
    for folder, folders, files in fs.walk(root, detail=True):
        for name in [name for name in folders if name.startswith(".")]:
            folders.pop(name)
        for name, about in sorted(files.items()):
            if name and not name.startswith("."):
                yield f"{folder}/{name}"[len(root) + 1 :], about["size"]


def folder_rows(fs: Any, root: str) -> Iterator[Row]:
    """A row per file of a folder. The size tells a file from a later one of the same name."""
    for path, size in list_files(fs, root):
        yield Row({"image": PurePosixPath(path).as_posix()}, path, [size])
