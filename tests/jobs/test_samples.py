"""The samples of a training run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ceca.config import TrainConfig
from ceca.data.store import Store
from ceca.data.tables import Pairs
from ceca.errors import UserError
from ceca.model.tokens import tokenize_numpy
from ceca.settings import ConfigError, from_mapping
from jobs.training.samples import tokenize_pairs, training_pairs
from jobs.training.sets import input_tables
from tests.ceca.data.dataset import IDS, filled_with, publish, table_of, write

SPLIT = {"model": {"summary_weight": 0.3}, "split": "test", "global_batch": 2, "last_batch": "keep"}


@pytest.fixture
def store() -> Store:
    """Three images of two parts with two captions each, and a summary of each image in another order."""
    store = filled_with()
    tables = {table: write(store, table, "i1", IDS[:2], IDS[2:3]) for table in ("captions", "images")}
    publish(store, "ingest", "i1", tables)
    told = {"dialogues": write(store, "dialogues", "d1", [IDS[2]], [IDS[1], IDS[0]])}
    publish(store, "dialogue", "d1", told, made_from={"images": "i1"})
    return store


def pairs(store: Store) -> Pairs:
    config = from_mapping(TrainConfig, SPLIT)
    return training_pairs(store, config, input_tables(store, config))


def said(store: Store, *words: int) -> np.ndarray:
    return tokenize_numpy([f"a caption of word{word:02d}" for word in words])


def with_noise(file: Path) -> TrainConfig:
    return from_mapping(TrainConfig, {"noise_file": str(file)})


def test_pairs_take_the_captions_that_a_published_index_file_gives_them(store: Store, tmp_path: Path) -> None:
    np.save(tmp_path / "0.5.npy", [2, 1, 0, 3, 5, 4])
    noisy = tokenize_pairs(store, pairs(store), with_noise(tmp_path / "0.5.npy"))
    clean = tokenize_pairs(store, pairs(store), TrainConfig())
    everything = np.arange(6)
    assert np.array_equal(clean.caption[everything], said(store, 0, 0, 1, 1, 2, 2))
    assert np.array_equal(noisy.caption[everything], clean.caption[np.array([2, 1, 0, 3, 5, 4])])
    assert np.array_equal(noisy.identity, clean.identity)


def test_a_pair_has_its_image_its_person_and_the_summary_of_its_image(store: Store) -> None:
    samples = tokenize_pairs(store, pairs(store), TrainConfig())
    assert (
        list(zip(samples.part.tolist(), samples.row.tolist(), strict=True))
        == [(0, 0)] * 2 + [(0, 1)] * 2 + [(1, 0)] * 2
    )
    assert samples.identity.tolist() == [0, 0, 0, 0, 1, 1]
    told = tokenize_numpy([f"it is word{word:02d}" for word in (0, 0, 1, 1, 2, 2)])
    assert np.array_equal(samples.summary[np.arange(6)], told)
    assert len(samples.summary.tokens) == 3  # each summary once, however many captions its image has
    assert samples.summary.mean_length() == np.count_nonzero(told, axis=1).mean()


def test_without_summaries_every_pair_has_an_empty_one(store: Store) -> None:
    config = from_mapping(TrainConfig, {**SPLIT, "model": {"summary_weight": 0}, "losses": {"terms": ["infonce"]}})
    found = training_pairs(store, config, input_tables(store, config))
    samples = tokenize_pairs(store, found, config)
    assert np.array_equal(samples.summary[np.arange(6)], np.repeat(tokenize_numpy([""]), 6, axis=0))


def test_texts_beyond_the_models_context_are_cut_and_their_share_is_told(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    told = table_of("dialogues", IDS[:3])
    summaries = pa.array(["short", "a " * 100, "a " * 200])
    told = told.set_column(told.schema.get_field_index("summary"), told.schema.field("summary"), summaries)
    parts = {"dialogues": [store.write_part("dialogues", "d2", 0, told)]}
    publish(store, "dialogue", "d2", parts, made_from={"images": "i1"})
    for context, cut in ((77, 2 / 3), (168, 1 / 3)):
        config = from_mapping(TrainConfig, {**SPLIT, "model": {"context": context}})
        samples = tokenize_pairs(store, pairs(store), config)
        lengths = np.count_nonzero(samples.summary.tokens, axis=1).tolist()
        assert lengths == [3, min(102, context), min(202, context)]
        assert (samples.caption.cut, samples.summary.cut) == (0, cut)
        printed = " ".join(capsys.readouterr().err.split())
        assert f"longer than the model's {context} tokens, and cut: 0.0% of captions, {cut:.1%} of summ" in printed


def test_an_index_file_that_does_not_fit_is_an_error_that_names_it(store: Store, tmp_path: Path) -> None:
    np.save(tmp_path / "other.npy", np.arange(7))
    with pytest.raises(UserError, match=r"other\.npy: it has 7 numbers and this split 6 pairs"):
        tokenize_pairs(store, pairs(store), with_noise(tmp_path / "other.npy"))
    with pytest.raises(UserError, match=r"no file of noisy correspondence at .*none\.npy"):
        tokenize_pairs(store, pairs(store), with_noise(tmp_path / "none.npy"))


def test_noise_is_made_or_read_not_both() -> None:
    with pytest.raises(ConfigError, match="choose one of them"):
        from_mapping(TrainConfig, {"noise_file": "0.5.npy", "caption_noise": 0.5})
