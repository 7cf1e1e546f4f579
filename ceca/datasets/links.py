"""Links of the filesystem: a dataset stays in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from ceca.datasets.records import DatasetError


def is_inside(file: Path, folder: Path) -> bool:
    """Whether a file that is no link lies in a folder; a copy in Hugging Face's cache has its files beside it.

    Args:
        file: the file, resolved.
        folder: the folder of the dataset.
    """
    home = folder.resolve()
    places = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    return any(file.is_relative_to(place) for place in places)


def require_inside(fs: Any, root: str, name: str) -> None:
    """Check that a file of a local dataset is no link to a file outside, whose text errors would show.

    Raises:
        DatasetError: it is one.
    """
    if not isinstance(fs, LocalFileSystem):
        return
    file = Path(root, name)
    try:
        resolved = file.resolve(strict=True)
    except (OSError, RuntimeError):  # reading it says why
        return
    if not is_inside(resolved, Path(root)):
        raise DatasetError(f"{file} is a link to {resolved}, out of its folder; copy the file, or pass it as --source")
