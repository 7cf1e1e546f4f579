"""Index: a model embeds images and their summaries; the embeddings become the table gallery.

python jobs/index.py --data s3://bucket/cuhk --model ceca-vitb16 --split test
"""

from __future__ import annotations

from ceca import schema
from ceca.commandline import parse_arguments
from ceca.config import IndexConfig, to_mapping
from ceca.model.weights import require_model
from ceca.store import Manifest, Store, StoreError, version_of
from jobs import stages
from jobs.embed import EmbedWorker, cut, image_item, plan_images


def index(data: str, config: IndexConfig, *, redo: bool = False) -> dict[str, Manifest]:
    """Publish the table gallery."""
    store = Store(data)
    model = require_model(store, config.model)
    images, rows, rejects, made_from = plan_images(store, model, config.split)
    if not rows:
        raise StoreError(f"nothing to index: {store.uri} has no images of split {config.split!r} with a dialogue")
    units = cut([image_item(row) for row in rows], config.images_per_part)
    plan = stages.Plan(
        stage="index",
        version=version_of("index", schema.SCHEMA_VERSION, made_from, config.split, config.images_per_part),
        tables=("gallery",),
        units=[{"images": unit} for unit in units],
        sizes=[len(unit) for unit in units],
        worker=EmbedWorker,
        arguments={
            "uri": store.uri,
            "model": config.model,
            "images": images,
            "schemas": {"images": ("gallery", schema.gallery(model.global_dim, model.local_dim))},
            "batch": config.batch,
            "gpu": config.gpus > 0,
            "replicas": config.replicas,
        },
        made_from=made_from,
        config=to_mapping(config, results_only=True),
        rejects=rejects,
        notes={"model": config.model},
    )
    return stages.run(store, plan, redo=redo, replicas=config.replicas, cpus=1, gpus=config.gpus)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments("index", argv, prog="index")
    index(arguments.data, arguments.config, redo=arguments.redo)


if __name__ == "__main__":
    stages.entry(main)
