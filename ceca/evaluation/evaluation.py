"""Retrieval metrics of embedded queries over an embedded gallery, in one process.

jobs/evaluations/ embeds the two sides and ranks them on a cluster; the rest of an evaluation is here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ceca.config import OMEGA, EvaluateConfig
from ceca.data.store import version_of
from ceca.metrics import PER_QUERY, STRIP, Matches, RetrievalMetrics, rank_strip, slices
from ceca.model.ceca import fused_similarity
from ceca.search.agreement import agree_with_neighbours
from ceca.search.shards import matrix
from ceca.settings import to_mapping


@dataclasses.dataclass(frozen=True)
class Embedded:
    """One side of a comparison: normalised (global [N, D], local [N, E]) embeddings and identities [N]."""

    pair: tuple[torch.Tensor, torch.Tensor]
    identities: np.ndarray


def embedded_sides(config: EvaluateConfig, queries: pa.Table, gallery: pa.Table) -> tuple[Embedded, Embedded]:
    """The two sides that an evaluation compares: texts and images.

    With `config.neighbours` the images' embeddings are averaged with those of their nearest images.
    """
    texts, images = (
        Embedded(
            (_embeddings(table, "global"), _embeddings(table, "local")),
            table["identity"].to_numpy(),
        )
        for table in (queries, gallery)
    )
    if config.neighbours:
        omega = OMEGA["validation"] if config.omega is None else config.omega
        pair = agree_with_neighbours(images.pair, config.neighbours, omega)
        images = dataclasses.replace(images, pair=pair)
    return texts, images


def _embeddings(table: pa.Table, column: str) -> torch.Tensor:
    """Embeddings [N, D] of a table; where they lie, if they lie in one piece (`read_mapped`)."""
    if table[column].num_chunks != 1:
        return torch.from_numpy(matrix(table, column))
    rows: torch.Tensor = torch.from_dlpack(table[column].chunk(0).flatten())
    return rows.reshape(table.num_rows, -1)


def result_name(config: EvaluateConfig) -> str:
    """Name of an evaluation's files below evaluations/<digest>/."""
    options = {"neighbours": config.neighbours, "reranked": config.rerank}
    if config.rerank_engine is not None:  # a file for each engine and its settings
        settings = to_mapping(getattr(config, config.rerank_engine), results_only=True)
        options[f"by-{config.rerank_engine}-{version_of(settings, config.rerank_margin)}"] = config.rerank_images
    return "-".join([config.split, *(f"{count}-{option}" for option, count in options.items() if count)])


def summarise(figures: Mapping[str, np.ndarray], queries: Embedded, gallery: Embedded) -> dict[str, dict[str, float]]:
    """Metrics by similarity, and by chance.

    Args:
        figures: similarity → [Q, 8], columns `PER_QUERY`.
        queries: the side that asks.
        gallery: the side that is ranked.
    """
    rows = {similarity: RetrievalMetrics.of(per_query).as_dict() for similarity, per_query in figures.items()}
    return {**rows, "chance": chance(queries.identities, gallery.identities)}


def texts_of(queries: pa.Table, captions: pa.Table) -> list[str | None]:
    """The text of each query, from the columns caption_id and text of the captions; None for a caption that is gone."""
    texts = dict(zip(captions["caption_id"].to_pylist(), captions["text"].to_pylist(), strict=True))
    return [texts.get(caption) for caption in queries["caption_id"].to_pylist()]


def per_query_table(queries: pa.Table, captions: pa.Table, figures: Mapping[str, np.ndarray]) -> bytes:
    """A Parquet file with a row per caption: its text, and the figures of `PER_QUERY` by each similarity.

    Args:
        queries: columns caption_id and identity, in the order of the figures.
        captions: columns caption_id and text.
        figures: similarity → [Q, 8], columns `PER_QUERY`.
    """
    columns = {
        "caption_id": queries["caption_id"],
        "identity": queries["identity"],
        "text": pa.array(texts_of(queries, captions), pa.string()),
    }
    for similarity, per_query in figures.items():
        for name, values in zip(PER_QUERY, per_query.T, strict=True):
            columns[f"{similarity}_{name}"] = pa.array(values, pa.float64())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def chance(query_identities: np.ndarray, gallery_identities: np.ndarray, most: int = 1000) -> dict[str, float]:
    """Metrics of a random order of the gallery.

    Estimated with a fixed seed from at most `most` queries, spread evenly over all.
    """
    source = np.random.default_rng(0)
    chosen = query_identities[np.linspace(0, len(query_identities) - 1, min(most, len(query_identities))).astype(int)]
    matches = Matches(chosen, gallery_identities)
    size = len(gallery_identities)
    parts = [
        rank_strip(source.random((rows.stop - rows.start, size), np.float32), matches, rows)
        for rows in slices(len(chosen), max(1, STRIP // size))
    ]
    return RetrievalMetrics.of(np.concatenate(parts)).as_dict()


class Nearest(NamedTuple):
    """The most similar images of some queries, best first: positions in the gallery and similarities, [q, k] each."""

    positions: np.ndarray
    similarity: np.ndarray


def best_images(texts: Embedded, images: Embedded, omega: float, top_k: int, queries: slice = slice(None)) -> Nearest:
    """The most similar images of some queries (default: all)."""
    start, stop, _ = queries.indices(len(texts.identities))
    best = []
    for part in slices(stop - start, max(1, STRIP // len(images.identities))):
        rows = slice(start + part.start, start + part.stop)
        similarity = fused_similarity((texts.pair[0][rows], texts.pair[1][rows]), images.pair, omega)
        best.append(similarity.topk(min(top_k, similarity.shape[1]), dim=1))
    return Nearest(*(np.concatenate([getattr(part, name).numpy() for part in best]) for name in ("indices", "values")))


def choose_queries(right: tuple[np.ndarray, np.ndarray], count: int, seed: int) -> list[int]:
    """Queries at random, first those that exactly one of two models answers right at rank 1.

    Args:
        right: whether each model is right at rank 1, [Q] each.
        count: queries to choose.
        seed: decides the order.

    Returns:
        Positions of the queries, ascending.
    """
    shuffled = np.random.default_rng(seed).permutation(len(right[0]))
    return sorted(shuffled[np.argsort(right[0][shuffled] == right[1][shuffled], kind="stable")][:count].tolist())
