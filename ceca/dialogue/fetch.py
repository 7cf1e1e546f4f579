"""Weights from an object store: each node fetches a model once."""

from __future__ import annotations

import hashlib
import json
import shutil

from filelock import FileLock
from fsspec.implementations.local import LocalFileSystem

from ceca.data.store import filesystem
from ceca.dialogue.conversation import EngineError
from ceca.environment import cache_folder


def fetch_model(model: str) -> str:
    """The local folder of a model given by URI; a name of the hub or a local path comes back as it is.

    The folder's name is a digest of the files' names, sizes and tags on the store, so changed weights are fetched
    anew, and workers of one node wait for the first instead of fetching again.

    Raises:
        EngineError: there is no such folder, or the disk is full.
    """
    if "://" not in model:
        return model
    fs, path = filesystem(model)
    if isinstance(fs, LocalFileSystem):
        return path
    try:
        files = fs.find(path, detail=True)
    except (OSError, ValueError) as error:
        raise EngineError(f"cannot list the model {model}: {error}; check the URI and the AWS_* variables") from error
    if not files:
        raise EngineError(f"no model at {model}: a folder with config.json and weights is expected there")
    described = sorted((name, found["size"], str(found.get("ETag", ""))) for name, found in files.items())
    digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
    cache = cache_folder("models")
    folder = cache / digest
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{digest}.lock"):
        if not folder.exists():
            aside = cache / f"{digest}.part"
            shutil.rmtree(aside, ignore_errors=True)  # of a fetch that was killed
            try:
                for name in files:
                    target = aside / name.removeprefix(path).lstrip("/")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    fs.get_file(name, str(target))
            except OSError as error:
                shutil.rmtree(aside, ignore_errors=True)
                raise EngineError(
                    f"cannot fetch {model} to {cache}: {error}; CECA_CACHE names another place"
                ) from error
            aside.rename(folder)  # whole or not there
    return str(folder)
