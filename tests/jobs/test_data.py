"""The batches of a training worker."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ceca.config import TrainConfig
from ceca.settings import from_mapping
from ceca.training.order import Batches, Portion
from jobs.training.data import (
    LoadSamples,
    Texts,
    TrainingSet,
    cut_batches,
    empty_batch,
    passes,
    samples_to_load,
    worker_places,
)

SMALL: dict[str, Any] = {"model": {"image_height": 2, "image_width": 1}, "seed": 3}


@settings(max_examples=25)
@given(sizes=st.lists(st.integers(0, 7), max_size=12), pieces=st.lists(st.integers(1, 9), min_size=1))
def test_a_stream_is_cut_into_batches_of_any_size(sizes: list[int], pieces: list[int]) -> None:
    empty = empty_batch(from_mapping(TrainConfig, SMALL))
    total = sum(sizes)

    def stream() -> Iterator[dict[str, np.ndarray]]:
        start = 0
        while start < total:
            rows = np.arange(start, min(total, start + pieces[start % len(pieces)]))
            start = int(rows[-1]) + 1
            yield {name: np.resize(rows, (len(rows), *values.shape[1:])) for name, values in empty.items()}

    found = list(cut_batches(stream(), sizes, empty))
    assert [len(batch["image"]) for batch in found] == sizes
    assert [row for batch in found for row in batch["identity"].tolist()] == list(range(total))


@pytest.mark.parametrize("division", ["none", "consensus"])
@pytest.mark.parametrize("workers", [1, 3])
def test_workers_load_an_epochs_order_twice_where_it_is_divided_first(
    monkeypatch: Any, division: str, workers: int
) -> None:
    """Eleven pairs in batches of four, the last of three: the same places in both passes, other ones in each epoch."""
    said = Texts(np.ones((1, 77), np.uint16), np.zeros(11, int))
    samples = TrainingSet(
        np.zeros(11, int), np.arange(11), np.arange(11), np.zeros(11, bool), said, said, (Portion(11, 11),)
    )
    config = from_mapping(TrainConfig, {**SMALL, "global_batch": 4, "last_batch": "keep", "division": division})
    monkeypatch.setattr("ray.get", lambda reference: reference)
    found: list[list[int]] = [[] for _ in range(2 * passes(config))]
    for rank in range(workers):
        load = LoadSamples(config, rank, workers, samples, {}, 0)  # type: ignore[arg-type]
        places = worker_places(Batches.of(11, config), rank, workers)
        for number in range(len(found) * len(places)):
            found[number // len(places)].append(load._pair(number)[0])
    assert all(sorted(visited) == list(range(11)) for visited in found)
    if division == "consensus":
        assert found[0] == found[1] != found[2] == found[3]
    else:
        assert found[0] != found[1]


@given(
    pairs=st.integers(5, 40),
    batch=st.integers(3, 9),
    workers=st.integers(1, 3),
    keep=st.booleans(),
    division=st.booleans(),
    data=st.data(),
)
@settings(max_examples=40)
def test_a_run_that_resumes_loads_what_an_uninterrupted_one_loads_from_there_on(
    pairs: int, batch: int, workers: int, keep: bool, division: bool, data: st.DataObject
) -> None:
    """After n steps: the rest of the epoch, and before each later epoch its division."""
    words = {"last_batch": "keep" if keep else "drop", "division": "consensus" if division else "none"}
    config = from_mapping(TrainConfig, {**SMALL, "global_batch": min(batch, pairs), "epochs": 3, **words})
    batches = Batches.of(pairs, config)
    step = data.draw(st.integers(0, 3 * len(batches) - 1))
    whole = samples_to_load(config, batches, 0, workers, 0)
    rest = samples_to_load(config, batches, 0, workers, step)
    assert whole.first == 0
    assert rest.first + sum(rest.sizes) == sum(whole.sizes)
    assert rest.sizes == whole.sizes[len(whole.sizes) - len(rest.sizes) :]
    epoch, inside = divmod(step, len(batches))
    passed = (epoch * 2 + (1 if inside else 0)) * len(batches) + inside if division else step
    assert len(whole.sizes) - len(rest.sizes) == passed
