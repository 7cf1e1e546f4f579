"""What an evaluation computes of two embedded sides, against values that are known."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F

from ceca.config import EvaluateConfig
from ceca.evaluation.evaluation import (
    Embedded,
    best_images,
    chance,
    choose_queries,
    embedded_sides,
    per_query_table,
    result_name,
    summarise,
)
from ceca.evaluation.names import METRICS
from ceca.metrics import PER_QUERY
from ceca.model.ceca import fused_similarity


def embedded(rows: int, seed: int) -> Embedded:
    source = torch.Generator().manual_seed(seed)
    pair = tuple(F.normalize(torch.randn(rows, width, generator=source), dim=1) for width in (4, 6))
    return Embedded(pair, np.arange(rows) % 5)


def table(side: Embedded) -> pa.Table:
    columns = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(part.numpy().reshape(-1)), part.shape[1])
        for name, part in zip(("global", "local"), side.pair, strict=True)
    }
    return pa.table({**columns, "identity": side.identities})


def test_the_sides_are_the_tables_and_neighbours_change_the_images_alone():
    queries, gallery = embedded(6, 0), embedded(9, 1)
    texts, images = embedded_sides(EvaluateConfig(), table(queries), table(gallery))
    for side, expected in ((texts, queries), (images, gallery)):
        assert all(torch.equal(part, given) for part, given in zip(side.pair, expected.pair, strict=True))
        assert side.identities.tolist() == expected.identities.tolist()
    near_texts, near_images = embedded_sides(EvaluateConfig(neighbours=2), table(queries), table(gallery))
    assert torch.equal(near_texts.pair[0], texts.pair[0])
    assert not torch.allclose(near_images.pair[0], images.pair[0])


def test_the_best_images_are_those_of_the_similarity_for_all_queries_and_for_some():
    texts, images = embedded(6, 0), embedded(9, 1)
    expected = fused_similarity(texts.pair, images.pair, 0.3).argsort(dim=1, descending=True).numpy()
    assert np.array_equal(best_images(texts, images, 0.3, 4).positions, expected[:, :4])
    assert np.array_equal(best_images(texts, images, 0.3, 20, slice(2, 5)).positions, expected[2:5])


def test_queries_that_one_model_alone_answers_are_chosen_first():
    first, second = np.zeros(50, bool), np.zeros(50, bool)
    first[7] = second[31] = True
    first[12] = second[12] = True
    for seed in range(5):
        assert {7, 31} <= set(choose_queries((first, second), 4, seed))
        assert choose_queries((first, second), 4, seed) == sorted(choose_queries((first, second), 4, seed))
    assert choose_queries((first, first), 3, 0) != choose_queries((first, first), 3, 1)


def test_chance_is_the_share_of_the_gallery_that_is_right():
    found = chance(np.arange(1000) % 50, np.arange(5000) % 50)
    assert found["rank1"] == pytest.approx(2, abs=1.5)
    assert set(found) == set(METRICS)


def test_every_query_has_a_row_with_its_text_and_the_means_are_of_these_rows():
    texts, images = embedded(6, 0), embedded(9, 1)
    figures = {"fused": np.random.default_rng(0).random((6, len(PER_QUERY)))}
    queries = pa.table({"caption_id": [f"c{n}" for n in range(6)], "identity": texts.identities})
    captions = pa.table({"caption_id": [f"c{n}" for n in range(5)], "text": [f"text {n}" for n in range(5)]})
    rows = pq.read_table(io.BytesIO(per_query_table(queries, captions, figures))).to_pydict()
    assert rows["text"] == [*(f"text {n}" for n in range(5)), None]
    assert rows["fused_rank1"] == pytest.approx(figures["fused"][:, 0])
    means = summarise(figures, texts, images)
    assert set(means) == {"fused", "chance"}
    assert means["fused"]["rank1"] == pytest.approx(100 * np.mean(rows["fused_rank1"]))


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({}, "test"),
        ({"split": "val", "neighbours": 3}, "val-3-neighbours"),
        ({"neighbours": 3, "rerank": 50}, "test-3-neighbours-50-reranked"),
    ],
)
def test_another_way_of_ranking_has_files_of_its_own(settings, name):
    assert result_name(EvaluateConfig(**settings)) == name
