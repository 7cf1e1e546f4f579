"""Every section of the benchmark of growth finds what it measures."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.made import make_dataset
from benchmarks.scale import FEW, SECTIONS
from ceca.data.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_dataset(str(tmp_path_factory.mktemp("made")), 300, widths=FEW)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("dialogue", "3 units"),
        ("index", "1 units"),
        ("evaluate", "2 units"),
        ("train", "600 pairs"),
        ("tokens", "texts/s"),
        ("receipts", "3 receipts, 0 parts missing"),
        ("ingress", "300 images"),
        ("replica", "300 rows"),
    ],
)
def test_a_section_measures_its_work(store: Store, tmp_path: Path, monkeypatch, section: str, said: str) -> None:
    monkeypatch.setenv("CECA_CACHE", str(tmp_path))
    assert said in SECTIONS[section](store)()
