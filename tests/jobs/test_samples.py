"""The samples of a training run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ceca.config import TrainConfig
from ceca.data.tables import PAIRS
from ceca.errors import UserError
from ceca.settings import ConfigError, from_mapping
from jobs.training.samples import tokenize_pairs

CAPTIONS = ["a man in red", "a woman in blue", "a child"]


def pairs(captions: list[str]) -> pa.Table:
    count = len(captions)
    rows = {"part": [0] * count, "row": list(range(count)), "identity": list(range(count)), "summary": [""] * count}
    return pa.table({**rows, "caption": captions}).select(PAIRS.names).cast(PAIRS)


def with_noise(file: Path) -> TrainConfig:
    return from_mapping(TrainConfig, {"noise_file": str(file)})


def test_pairs_take_the_captions_that_a_published_index_file_gives_them(tmp_path: Path) -> None:
    np.save(tmp_path / "0.5.npy", [1, 0, 2])
    noisy = tokenize_pairs(pairs(CAPTIONS), with_noise(tmp_path / "0.5.npy"))
    clean = tokenize_pairs(pairs(CAPTIONS), TrainConfig())
    assert np.array_equal(noisy.caption, clean.caption[[1, 0, 2]])
    assert np.array_equal(noisy.identity, clean.identity)
    assert not np.array_equal(noisy.caption, clean.caption)


def test_an_index_file_that_does_not_fit_is_an_error_that_names_it(tmp_path: Path) -> None:
    np.save(tmp_path / "other.npy", np.arange(7))
    with pytest.raises(UserError, match=r"other\.npy: it has 7 numbers and this split 3 pairs"):
        tokenize_pairs(pairs(CAPTIONS), with_noise(tmp_path / "other.npy"))
    with pytest.raises(UserError, match=r"no file of noisy correspondence at .*none\.npy"):
        tokenize_pairs(pairs(CAPTIONS), with_noise(tmp_path / "none.npy"))


def test_noise_is_made_or_read_not_both() -> None:
    with pytest.raises(ConfigError, match="choose one of them"):
        from_mapping(TrainConfig, {"noise_file": "0.5.npy", "caption_noise": 0.5})
