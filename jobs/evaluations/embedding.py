"""Embeddings of a split, computed on Ray workers and kept in fp32 below evaluations/."""

from __future__ import annotations

import pyarrow as pa

from ceca.config import EvaluateConfig
from ceca.data import schema
from ceca.data.names import EVALUATIONS
from ceca.data.schema import NOBODY
from ceca.data.store import Manifest, Store, StoreError, version_of
from ceca.data.tables import list_images
from ceca.environment import usable_gpus
from ceca.model.registry import require_model
from ceca.settings import to_mapping
from jobs.runtime.embed import CaptionRow, plan_images
from jobs.runtime.embed_worker import EmbedWorker
from jobs.runtime.records import cut, to_json
from jobs.runtime.units import Plan, Workers, run_plan


def embed_split(store: Store, config: EvaluateConfig, *, redo: bool = False) -> tuple[pa.Table, pa.Table]:
    """Embed the queries and the gallery images of a split; embeddings computed before are read.

    Raises:
        StoreError: the split has no image with a dialogue, or no caption.
    """
    model = require_model(store, config.model)
    images = plan_images(store, model, config.split)
    captions = store.captions(images.table)
    queries = _list_queries(store, images.table, captions, config.split)
    if not images.rows or not queries:
        raise StoreError(
            f"nothing to evaluate: {store.uri} has {len(images.rows)} images with a dialogue and {len(queries)} "
            f"captions in split {config.split!r}"
        )
    widths = (model.global_dim, model.local_dim, pa.float32())
    place = f"{EVALUATIONS}/{model.digest}/{config.split}"
    query_table, image_table = f"{place}/queries", f"{place}/images"
    units = [{"images": to_json(rows)} for rows in cut(images.rows, config.rows_per_part)]
    units += [{"queries": to_json(rows)} for rows in cut(queries, config.rows_per_part)]
    made_from = {**images.made_from, "captions": captions.version}
    plan = Plan(
        stage="evaluate",
        version=version_of("evaluate", schema.SCHEMA_VERSION, made_from, config.split, config.rows_per_part),
        tables=(query_table, image_table),
        units=units,
        sizes=[len(rows) for unit in units for rows in unit.values()],
        worker=EmbedWorker,
        arguments={
            "uri": store.uri,
            "model": config.model,
            "images": images.table,
            "schemas": {
                "queries": (query_table, schema.queries(*widths)),
                "images": (image_table, schema.gallery(*widths)),
            },
            "batch": config.batch,
            "gpu": usable_gpus(config.gpus) > 0,
            "replicas": config.replicas,
        },
        made_from=made_from,
        config=to_mapping(config, results_only=True),
        rejects=images.rejects,
        notes={"model": config.model},
    )
    workers = Workers(config.replicas, cpus=1, gpus=config.gpus, pool="dialogue" if config.gpus else "cpu")
    manifests = run_plan(store, plan, workers, redo=redo)
    return store.read(manifests[query_table]), store.read(manifests[image_table])


def _list_queries(store: Store, images: Manifest, captions: Manifest, split: str) -> list[CaptionRow]:
    """The captions of named people in a split, also of images without a dialogue."""
    in_split = {row.image_id for row in list_images(store, images, split)}
    table = store.read(captions, ["caption_id", "image_id", "identity", "text"]).to_pydict()
    columns = zip(table["caption_id"], table["identity"], table["text"], table["image_id"], strict=True)
    return [
        CaptionRow(caption_id, identity, text)
        for caption_id, identity, text, image in columns
        if image in in_split and identity != NOBODY  # nobody could say which image is right
    ]
