"""Embeddings in mapped files are those of the table."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from ceca.config import EvaluateConfig
from ceca.data.store import Store, StoreError
from ceca.evaluation.evaluation import embedded_sides
from ceca.evaluation.mapped import read_mapped
from tests.ceca.data.dataset import IDS, filled_with, publish, write


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A gallery in two parts; its files are mapped below `tmp_path`."""
    monkeypatch.setenv("CECA_CACHE", str(tmp_path))
    store = filled_with()
    publish(store, "index", "g1", {"gallery": write(store, "gallery", "g1", IDS[:3], IDS[3:8])})
    return store


def test_a_mapped_table_is_the_table(store: Store) -> None:
    gallery = store.current("gallery")
    mapped, read = read_mapped(store, gallery), store.read(gallery)
    assert mapped.to_pylist() == read.to_pylist()
    assert mapped.schema.names == read.schema.names
    assert mapped["global"].num_chunks == 1


def test_sides_of_an_evaluation_use_the_mapped_memory_and_no_file_stays(store: Store, tmp_path: Path) -> None:
    gallery = read_mapped(store, store.current("gallery"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns of memory that must not be written
        texts, images = embedded_sides(EvaluateConfig(), store.read(store.current("gallery")), gallery)
    for name, here, there in zip(("global", "local"), images.pair, texts.pair, strict=True):
        assert here.data_ptr() == gallery[name].chunk(0).flatten().buffers()[1].address
        assert torch.equal(here, there)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_empty_table_is_an_error(store: Store) -> None:
    with pytest.raises(StoreError, match="empty"):
        read_mapped(store, publish(store, "index", "g2", {"gallery": []}))
