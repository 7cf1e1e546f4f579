"""Embeddings of a split, computed on Ray workers and kept in fp32 below evaluations/."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from ceca.config import EvaluateConfig
from ceca.data import schema
from ceca.data.names import EVALUATIONS
from ceca.data.schema import NOBODY
from ceca.data.store import Manifest, Store, StoreError, version_of
from ceca.data.tables import Images, find_captions
from ceca.environment import usable_gpus
from ceca.evaluation.mapped import read_mapped
from ceca.model.registry import require_model
from ceca.settings import to_mapping
from jobs.runtime.embed import plan_images
from jobs.runtime.embed_worker import EmbedWorker
from jobs.runtime.records import Joined, Units
from jobs.runtime.units import Plan, Workers, run_plan


def embed_split(store: Store, config: EvaluateConfig, *, redo: bool = False) -> tuple[pa.Table, pa.Table]:
    """Embed the queries and the gallery images of a split; embeddings computed before are read, into mapped files.

    Raises:
        StoreError: the split has no image with a dialogue, or no caption.
    """
    model = require_model(store, config.model)
    plan = plan_images(store, model, config.split)
    images, table = plan.images, plan.images.table
    captions = store.captions(table)
    queries = _find_queries(store, plan.listed, captions)
    if not len(images) or not len(queries):
        raise StoreError(
            f"nothing to evaluate: {store.uri} has {len(images)} images with a dialogue and {len(queries)} "
            f"captions in split {config.split!r}"
        )
    widths = (model.global_dim, model.local_dim, pa.float32())
    place = f"{EVALUATIONS}/{model.digest}/{config.split}"
    query_table, image_table = f"{place}/queries", f"{place}/images"
    shown = Units(config.rows_per_part, images=images.rows, dialogues=images.told)
    asked = Units(config.rows_per_part, queries=queries)
    made_from = {**plan.made_from, "captions": captions.version}
    work = Plan(
        stage="evaluate",
        version=version_of("evaluate", schema.SCHEMA_VERSION, made_from, config.split, config.rows_per_part),
        tables=(query_table, image_table),
        units=Joined(shown, asked),
        sizes=[*shown.sizes, *asked.sizes],
        worker=EmbedWorker,
        arguments={
            "uri": store.uri,
            "model": config.model,
            "images": table,
            "dialogues": images.dialogues,
            "captions": captions,
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
        rejects=plan.rejects,
        notes={"model": config.model},
    )
    workers = Workers(config.replicas, cpus=1, gpus=config.gpus)
    manifests = run_plan(store, work, workers, redo=redo)
    return read_mapped(store, manifests[query_table]), read_mapped(store, manifests[image_table])


def _find_queries(store: Store, images: Images, captions: Manifest) -> np.ndarray:
    """Rows of the captions of named people, also of images without a dialogue, [Q]."""
    found = find_captions(store, images, captions)
    return found.rows[found.said_of != NOBODY]  # of others nobody could say which image is right
