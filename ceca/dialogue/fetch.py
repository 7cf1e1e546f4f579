"""Download of model weights from an object store, once per node."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem

from ceca.data.store import filesystem
from ceca.dialogue.conversation import EngineError
from ceca.environment import cache_folder


def fetch_model(model: str) -> str:
    """Return the local folder of a model, downloading it first if its URI is remote.

    The folder is named by a digest of the names, sizes and tags of the remote files, so changed weights are downloaded
    again. Workers on one node wait for the first download instead of repeating it.

    Args:
        model: URI of a folder, local path, or name on the hub. A path or name is returned, `~` replaced.

    Raises:
        EngineError: the folder does not exist, or the download failed.
    """
    if "://" not in model:
        return os.path.expanduser(model)
    fs, path = filesystem(model)
    if isinstance(fs, LocalFileSystem):
        return path
    try:
        files = fs.find(path, detail=True)
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot list the model {model}: {error}; check the URI and the AWS_* variables") from error
    if not files:
        raise EngineError(f"no model at {model}: expected a folder with config.json and weights")
    described = sorted((name, info["size"], str(info.get("ETag", ""))) for name, info in files.items())
    digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
    cache = cache_folder("models")
    folder = cache / digest
    with FileLock(cache / f"{digest}.lock"):
        if not folder.exists():
            try:
                _download(fs, path, files, folder)
            except OSError as error:
                raise EngineError(
                    f"cannot download {model} to {cache}: {error}; CECA_CACHE can name another folder"
                ) from error
    return str(folder)


def _download(fs: Any, path: str, files: Iterable[str], folder: Path) -> None:
    """Download the files below a path into a new folder. The folder appears only when it is complete."""
    partial = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed download
    try:
        for name in files:
            target = partial / name.removeprefix(path).lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            fs.get_file(name, str(target))
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    partial.rename(folder)
