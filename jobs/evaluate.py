"""Evaluate: retrieval metrics of a model for global, local and fused similarity, as a table and as JSON.

    python jobs/evaluate.py --data s3://bucket/cuhk --model ceca-vitb16 --split test

Embeddings are computed on Ray workers and kept in fp32 below evaluations/, so that another ω costs no model. Queries
are compared with the gallery a strip at a time, on the cluster's CPUs where there are many.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from rich.table import Table as TextTable

from ceca.commandline import parse_arguments
from ceca.config import EvaluateConfig
from ceca.data import schema
from ceca.data.names import EVALUATIONS
from ceca.data.store import Store, StoreError, version_of
from ceca.data.tables import list_images
from ceca.environment import usable_gpus
from ceca.metrics import PER_QUERY, STRIP, Matches, RetrievalMetrics, rank_embeddings, rank_strip, slices
from ceca.model.registry import require_model
from ceca.search.agreement import agree_with_neighbours
from ceca.search.shards import matrix
from ceca.settings import to_mapping
from jobs.runtime.console import Track, console, entry
from jobs.runtime.embed import EmbedWorker, cut, image_item, plan_images
from jobs.runtime.ray_session import connect
from jobs.runtime.units import Plan, run_plan

ALONE = 2**28  # similarities that this process computes without asking the cluster
TASK_ROWS = 512  # queries of one task

METRICS = {
    "rank1": "Rank-1",
    "rank5": "Rank-5",
    "rank10": "Rank-10",
    "mean_average_precision": "mAP",
    "mean_inverse_negative_penalty": "mINP",
    "rsum": "Rsum",
}


SIMILARITIES = ("global", "local", "fused")


def evaluate(data: str, config: EvaluateConfig, *, redo: bool = False) -> dict[str, Any]:
    """Compute, print and store the metrics.

    The result's `metrics` has a row for text→image by each similarity and by chance, `image_to_text` the same for the
    other direction. The figures of every query are in a table beside it.
    """
    store = Store(data)
    queries, gallery = embed_split(store, config, redo=redo)
    texts, images = compared(config, queries, gallery)
    omegas = dict(zip(SIMILARITIES, (0.0, 1.0, config.omega), strict=True))
    ranked = rank(texts, images, sorted(set(omegas.values())), config.rerank)
    reverse = rank(images, texts, sorted(set(omegas.values())))

    def means(found: dict[float, np.ndarray], asked: Embedded, there: Embedded) -> dict[str, dict[str, float]]:
        rows = {name: RetrievalMetrics.of(found[omega]).as_dict() for name, omega in omegas.items()}
        return {**rows, "chance": chance(asked.identities, there.identities)}

    metrics, image_to_text = means(ranked, texts, images), means(reverse, images, texts)
    model = require_model(store, config.model)
    result = {
        "model": config.model,
        "model_digest": model.digest,
        "split": config.split,
        "omega": config.omega,
        "neighbours": config.neighbours,
        "rerank": config.rerank,
        "queries": len(texts.identities),
        "gallery": len(images.identities),
        "metrics": metrics,
        "image_to_text": image_to_text,
        "made_from": model.made_from,
        "config": to_mapping(config),
    }
    name = result_name(config)
    content = per_query_table(
        queries,
        store.read(store.current("captions", "ingest"), ["caption_id", "text"]),
        {similarity: ranked[omega] for similarity, omega in omegas.items()},
    )
    store.write_bytes(content, EVALUATIONS, model.digest, f"{name}.queries.parquet")
    store.write_json(result, EVALUATIONS, model.digest, f"{name}.json")
    size = f"{result['queries']:,} queries, {result['gallery']:,} images"
    print_metrics(f"{config.model} on {config.split}, text to image: {size}", metrics)
    print_metrics(f"{config.model} on {config.split}, image to text", image_to_text)
    console.print(f"evaluate: → {store.place('evaluations', model.digest, f'{name}.json')}")
    return result


def result_name(config: EvaluateConfig) -> str:
    """What an evaluation's files are called below evaluations/<digest>/."""
    ways = {"neighbours": config.neighbours, "reranked": config.rerank}
    return "-".join([config.split, *(f"{count}-{way}" for way, count in ways.items() if count)])


@dataclasses.dataclass(frozen=True)
class Embedded:
    """One side of a comparison: normalised (global [N, D], local [N, E]) embeddings and identities [N]."""

    pair: tuple[torch.Tensor, torch.Tensor]
    identities: np.ndarray


def compared(config: EvaluateConfig, queries: pa.Table, gallery: pa.Table) -> tuple[Embedded, Embedded]:
    """What an evaluation compares: texts and images, their views in agreement where that is configured."""
    texts, images = (
        Embedded(
            (torch.from_numpy(matrix(table, "global")), torch.from_numpy(matrix(table, "local"))),
            table["identity"].to_numpy(),
        )
        for table in (queries, gallery)
    )
    if config.neighbours:
        pair = agree_with_neighbours(images.pair, config.neighbours, config.omega)
        images = dataclasses.replace(images, pair=pair)
    return texts, images


def rank(queries: Embedded, gallery: Embedded, omegas: list[float], rerank_first: int = 0) -> dict[float, np.ndarray]:
    """`rank_embeddings` in this process, or by tasks on the cluster where there is much to compare."""
    matches = Matches(queries.identities, gallery.identities)
    count, size = len(queries.identities), len(gallery.identities)
    if count * size <= ALONE:
        return rank_embeddings(queries.pair, gallery.pair, matches, omegas, rerank_first=rerank_first)
    connect()
    shared = ray.put(
        ([part.numpy() for part in gallery.pair], matches, omegas, rerank_first)
    )  # read in place by every task
    with Track("evaluate", count, unit="queries") as track:
        pending = {}
        for rows in slices(count, TASK_ROWS):
            pending[_rank_rows.remote(tuple(part[rows] for part in queries.pair), shared, rows)] = rows
        parts = {}
        while pending:
            (done,), _ = ray.wait(list(pending), num_returns=1)
            rows = pending.pop(done)
            parts[rows.start] = ray.get(done)
            track.advance(rows.stop - rows.start)
    return {omega: np.concatenate([parts[start][omega] for start in sorted(parts)]) for omega in omegas}


@ray.remote(num_cpus=1)
def _rank_rows(queries: Any, shared: Any, rows: slice) -> dict[float, np.ndarray]:
    torch.set_num_threads(1)
    gallery, matches, omegas, rerank_first = shared
    parts = [torch.from_numpy(part) for part in gallery]
    return rank_embeddings(queries, (parts[0], parts[1]), matches.of(rows), omegas, rerank_first=rerank_first)


def per_query_table(queries: pa.Table, captions: pa.Table, found: dict[str, np.ndarray]) -> bytes:
    """A Parquet file with a row per caption: its words, and by each similarity the figures of `PER_QUERY`."""
    words = dict(zip(captions["caption_id"].to_pylist(), captions["text"].to_pylist(), strict=True))
    columns = {
        "caption_id": queries["caption_id"],
        "identity": queries["identity"],
        "text": pa.array([words.get(caption) for caption in queries["caption_id"].to_pylist()], pa.string()),
    }
    for similarity, figures in found.items():
        for name, values in zip(PER_QUERY, figures.T, strict=True):
            columns[f"{similarity}_{name}"] = pa.array(values, pa.float64())
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def embed_split(store: Store, config: EvaluateConfig, *, redo: bool = False) -> tuple[pa.Table, pa.Table]:
    """Embedded queries and gallery images of a split; those computed before are read."""
    model = require_model(store, config.model)
    images, rows, rejects, made_from = plan_images(store, model, config.split)
    captions = store.current("captions", "ingest")
    wanted = {row.image_id for row in list_images(store, images, config.split)}
    table = store.read(captions, ["caption_id", "image_id", "identity", "text"]).to_pydict()
    columns = zip(table["caption_id"], table["identity"], table["text"], table["image_id"], strict=True)
    queries = [[caption, identity, text] for caption, identity, text, image_id in columns if image_id in wanted]
    if not rows or not queries:
        raise StoreError(
            f"nothing to evaluate: {store.uri} has {len(rows)} images with a dialogue and {len(queries)} captions "
            f"in split {config.split!r}"
        )
    widths = (model.global_dim, model.local_dim, pa.float32())
    place = f"{EVALUATIONS}/{model.digest}/{config.split}"
    tables = {
        "queries": (f"{place}/queries", schema.queries(*widths)),
        "images": (f"{place}/images", schema.gallery(*widths)),
    }
    units = [{"images": unit} for unit in cut([image_item(row) for row in rows], config.rows_per_part)]
    units += [{"queries": unit} for unit in cut(queries, config.rows_per_part)]
    made_from = {**made_from, "captions": captions.version}
    plan = Plan(
        stage="evaluate",
        version=version_of("evaluate", schema.SCHEMA_VERSION, made_from, config.split, config.rows_per_part),
        tables=(f"{place}/queries", f"{place}/images"),
        units=units,
        sizes=[len(items) for unit in units for items in unit.values()],
        worker=EmbedWorker,
        arguments={
            "uri": store.uri,
            "model": config.model,
            "images": images,
            "schemas": tables,
            "batch": config.batch,
            "gpu": usable_gpus(config.gpus) > 0,
            "replicas": config.replicas,
        },
        made_from=made_from,
        config=to_mapping(config, results_only=True),
        rejects=rejects,
        notes={"model": config.model},
    )
    manifests = run_plan(store, plan, redo=redo, replicas=config.replicas, cpus=1, gpus=config.gpus)
    return store.read(manifests[f"{place}/queries"]), store.read(manifests[f"{place}/images"])


def chance(query_identities: np.ndarray, gallery_identities: np.ndarray, most: int = 1000) -> dict[str, float]:
    """What a random order of the gallery scores, estimated with a fixed seed from queries spread over all."""
    source = np.random.default_rng(0)
    asked = query_identities[np.linspace(0, len(query_identities) - 1, min(most, len(query_identities))).astype(int)]
    matches = Matches(asked, gallery_identities)
    size = len(gallery_identities)
    parts = [
        rank_strip(source.random((rows.stop - rows.start, size), np.float32), matches, rows)
        for rows in slices(len(asked), max(1, STRIP // size))
    ]
    return RetrievalMetrics.of(np.concatenate(parts)).as_dict()


def print_metrics(title: str, found: dict[str, dict[str, float]]) -> None:
    """A row per similarity, percent."""
    table = TextTable(title=title, title_justify="left")
    table.add_column("")
    for heading in METRICS.values():
        table.add_column(heading, justify="right")
    for name, metrics in found.items():
        table.add_row(name, *(f"{metrics[key]:.2f}" for key in METRICS))
    console.print(table)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments("evaluate", argv, prog="evaluate")
    evaluate(arguments.data, arguments.config, redo=arguments.redo)


if __name__ == "__main__":
    entry(main)
