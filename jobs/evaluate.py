"""Evaluate: retrieval metrics of a model for global, local and fused similarity, as a table and as JSON.

    python jobs/evaluate.py --data s3://bucket/cuhk --model ceca-vitb16 --split test

Embeddings are computed on Ray workers and kept in fp32 below evaluations/, so that another ω costs no model.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import torch
from rich.table import Table as TextTable

from ceca import schema
from ceca.commandline import parse_arguments
from ceca.config import EvaluateConfig, to_mapping
from ceca.gallery import agree_with_neighbours, matrix
from ceca.metrics import retrieval_metrics
from ceca.model.ceca import fused_similarity
from ceca.model.weights import require_model
from ceca.samples import list_images
from ceca.store import Store, StoreError, version_of
from jobs import stages
from jobs.embed import EmbedWorker, cut, image_item, plan_images

METRICS = {
    "rank1": "Rank-1",
    "rank5": "Rank-5",
    "rank10": "Rank-10",
    "mean_average_precision": "mAP",
    "mean_inverse_negative_penalty": "mINP",
    "rsum": "Rsum",
}


def evaluate(data: str, config: EvaluateConfig, *, redo: bool = False) -> dict[str, Any]:
    """Compute, print and store the metrics; the result is {"global": …, "local": …, "fused": …, "chance": …}."""
    store = Store(data)
    queries, gallery = embed_split(store, config, redo=redo)
    pairs = [
        tuple(torch.from_numpy(matrix(table, name)) for name in ("global", "local")) for table in (queries, gallery)
    ]
    if config.neighbours:
        pairs[1] = agree_with_neighbours(pairs[1], config.neighbours, config.omega)  # type: ignore[arg-type]
    identities = [table["identity"].to_numpy() for table in (queries, gallery)]
    found = {}
    for name, omega in (("global", 0.0), ("local", 1.0), ("fused", config.omega)):
        similarity = fused_similarity(pairs[0], pairs[1], omega)  # type: ignore[arg-type]
        found[name] = retrieval_metrics(similarity, *identities).as_dict()
    found["chance"] = chance(*identities)
    model = require_model(store, config.model)
    result = {
        "model": config.model,
        "model_digest": model.digest,
        "split": config.split,
        "omega": config.omega,
        "neighbours": config.neighbours,
        "queries": len(identities[0]),
        "gallery": len(identities[1]),
        "metrics": found,
        "made_from": model.made_from,
        "config": to_mapping(config),
    }
    store.write_json(result, "evaluations", model.digest, f"{config.split}.json")
    print_metrics(
        f"{config.model} on {config.split}: {result['queries']:,} queries, {result['gallery']:,} images", found
    )
    stages.console.print(f"evaluate: → {store.place('evaluations', model.digest, f'{config.split}.json')}")
    return result


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
    place = f"evaluations/{model.digest}/{config.split}"
    tables = {
        "queries": (f"{place}/queries", schema.queries(*widths)),
        "images": (f"{place}/images", schema.gallery(*widths)),
    }
    units = [{"images": unit} for unit in cut([image_item(row) for row in rows], config.rows_per_part)]
    units += [{"queries": unit} for unit in cut(queries, config.rows_per_part)]
    made_from = {**made_from, "captions": captions.version}
    plan = stages.Plan(
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
            "gpu": config.gpus > 0,
            "replicas": config.replicas,
        },
        made_from=made_from,
        config=to_mapping(config, results_only=True),
        rejects=rejects,
        notes={"model": config.model},
    )
    manifests = stages.run(store, plan, redo=redo, replicas=config.replicas, cpus=1, gpus=config.gpus)
    return store.read(manifests[f"{place}/queries"]), store.read(manifests[f"{place}/images"])


def chance(query_identities: Any, gallery_identities: Any) -> dict[str, float]:
    """What a random order of the gallery scores, estimated with a fixed seed."""
    source = torch.Generator().manual_seed(0)
    similarity = torch.rand(len(query_identities), len(gallery_identities), generator=source)
    return retrieval_metrics(similarity, query_identities, gallery_identities).as_dict()


def print_metrics(title: str, found: dict[str, dict[str, float]]) -> None:
    """A row per similarity, percent."""
    table = TextTable(title=title, title_justify="left")
    table.add_column("")
    for heading in METRICS.values():
        table.add_column(heading, justify="right")
    for name, metrics in found.items():
        table.add_row(name, *(f"{metrics[key]:.2f}" for key in METRICS))
    stages.console.print(table)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments("evaluate", argv, prog="evaluate")
    evaluate(arguments.data, arguments.config, redo=arguments.redo)


if __name__ == "__main__":
    stages.entry(main)
