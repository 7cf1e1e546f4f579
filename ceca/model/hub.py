"""Models on the Hugging Face hub, by the names `hf://owner/name` and `hf://owner/name@revision`.

A repository is a model's folder as `ceca.model.weights` publishes it, so it is loaded like any other. Beside it lie the
CLIP part as open_clip reads it, and a model card.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path

from ceca.data.store import StoreError

HUB = "hf://"
ENDPOINT: str | None = None  # another hub than the client library's own; for tests


def on_hub(name: str) -> bool:
    """Whether a model's name is one of the hub."""
    return name.startswith(HUB)


@functools.cache
def fetch(name: str) -> str:
    """Download a model's folder into the client library's cache, once per process, and return its path.

    Without a connection to the hub, the newest copy in the cache counts.

    Args:
        name: `hf://owner/name`, with `@revision` if it is not the newest.

    Raises:
        StoreError: there is no such model, or it cannot be reached.
    """
    import huggingface_hub

    repository, _, revision = name.removeprefix(HUB).partition("@")
    if repository.count("/") != 1:
        raise StoreError(f"{name} is no name of a model on the hub: write {HUB}owner/name or {HUB}owner/name@revision")
    try:
        return huggingface_hub.snapshot_download(
            repository, revision=revision or None, ignore_patterns=["open_clip*", "*.png"], endpoint=ENDPOINT
        )
    except _failures() as error:
        raise StoreError(f"{name} cannot be fetched: {' '.join(str(error).split())}") from None


def upload(folder: Path, repository: str, *, private: bool) -> str:
    """Upload a folder as one commit, and return the repository's URL. The token is the client library's own.

    Args:
        folder: the folder.
        repository: `owner/name`; made if it does not exist.
        private: whether a new repository is private.

    Raises:
        StoreError: the hub refuses, or cannot be reached.
    """
    import huggingface_hub

    hub = huggingface_hub.HfApi(endpoint=ENDPOINT)
    try:
        made = hub.create_repo(repository, private=private, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="A model of CECA")
    except _failures() as error:
        raise StoreError(f"{repository} cannot be uploaded: {' '.join(str(error).split())}") from None
    return str(made)


def _failures() -> tuple[type[Exception], ...]:
    """Errors of the client library, and of the HTTP library that it uses (httpx or httpx2)."""
    from huggingface_hub import get_session
    from huggingface_hub.errors import HFValidationError

    http = importlib.import_module(type(get_session()).__module__.partition(".")[0])
    return OSError, HFValidationError, http.HTTPError
