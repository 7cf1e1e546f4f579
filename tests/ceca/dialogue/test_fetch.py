"""Download of weights: once per node, complete or not at all, and again after a change."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import pytest

from ceca.data.store import Store
from ceca.dialogue.conversation import EngineError
from ceca.dialogue.fetch import fetch_model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CECA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def published(s3_environment) -> Store:
    """Folder of a model on S3."""
    store = Store(f"s3://bucket/{uuid.uuid4().hex}")
    store.write_bytes(b'{"a": 1}', "config.json")
    store.write_bytes(b"weights", "parts", "model-1.safetensors")
    return store


def test_a_name_or_local_folder_is_returned_unchanged(cache: Path, tmp_path: Path):
    assert fetch_model("Qwen/Qwen2-VL-7B-Instruct") == "Qwen/Qwen2-VL-7B-Instruct"
    assert fetch_model(str(tmp_path)) == str(tmp_path)
    assert fetch_model(f"file://{tmp_path}") == str(tmp_path)
    assert not cache.exists()


def test_every_file_of_a_uri_is_downloaded_once(cache: Path, published: Store):
    folder = Path(fetch_model(published.uri))
    assert (folder / "config.json").read_bytes() == b'{"a": 1}'
    assert (folder / "parts" / "model-1.safetensors").read_bytes() == b"weights"
    written = (folder / "config.json").stat().st_mtime_ns
    assert fetch_model(published.uri) == str(folder)
    assert (folder / "config.json").stat().st_mtime_ns == written


def test_changed_weights_get_another_folder(cache: Path, published: Store):
    first = fetch_model(published.uri)
    published.write_bytes(b"other weights", "parts", "model-1.safetensors")
    second = fetch_model(published.uri)
    assert second != first
    assert Path(second, "parts", "model-1.safetensors").read_bytes() == b"other weights"


def test_the_rest_of_a_killed_download_is_not_used(cache: Path, published: Store):
    folder = Path(fetch_model(published.uri))
    partial = folder.with_name(f"{folder.name}.part")
    os.rename(folder, partial)
    (partial / "config.json").unlink()
    assert (Path(fetch_model(published.uri)) / "config.json").exists()
    assert not partial.exists()


def test_a_uri_without_a_model_is_an_error(cache: Path, s3_environment):
    with pytest.raises(EngineError, match="no model at s3://bucket/nothing"):
        fetch_model("s3://bucket/nothing")
