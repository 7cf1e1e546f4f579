"""Index: a model embeds images and their summaries; the embeddings become the table gallery.

    python jobs/index.py --data s3://bucket/cuhk --model ceca-vitb16 --split test

`--only-missing` embeds what the published gallery lacks. Its other parts are part of the new version as they are; only
those with rows that are not valid any more, and small ones when there are many, are written again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from ceca.commandline import parse_arguments
from ceca.config import IndexConfig
from ceca.data import schema
from ceca.data.changes import removed_images
from ceca.data.store import Manifest, Receipt, Store, StoreError, version_of
from ceca.data.tables import ImageRow, read_summaries
from ceca.environment import usable_gpus
from ceca.errors import UserError
from ceca.model.registry import PublishedModel, require_model
from ceca.settings import to_mapping
from jobs.runtime.console import console, entry
from jobs.runtime.embed import EmbedWorker, cut, image_item, plan_images
from jobs.runtime.units import Output, Plan, run_plan

SMALL_PARTS = 8  # so many parts under half the usual size are left alone; each is a shard that a search begins anew


def index(data: str, config: IndexConfig, *, redo: bool = False) -> dict[str, Manifest]:
    """Publish the table gallery."""
    store = Store(data)
    model = require_model(store, config.model)
    images, rows, rejects, made_from = plan_images(store, model, config.split)
    removed = removed_images(store).intersection(row.image_id for row in rows)
    if removed:
        rows = [row for row in rows if row.image_id not in removed]
        made_from = {**made_from, "removed": version_of(sorted(removed))}
    if not rows:
        raise StoreError(f"nothing to index: {store.uri} has no images of split {config.split!r} with a dialogue")
    earlier = store.current("gallery", "index") if config.only_missing else None
    reused = Reused()
    if earlier is not None:
        reused = reuse(store, earlier, model, rows, made_from, config.images_per_part)
        rows = [row for row in rows if row.image_id not in reused.ids]
        before = {name: version for name, version in earlier.made_from.items() if name != "gallery"}
        if not rows and not reused.copies and before == made_from:
            console.print(f"index: {store.place('gallery')} lacks nothing")
            return {"gallery": earlier}
        made_from = {**made_from, "gallery": earlier.version}
        kept = sum(part.rows for part in reused.parts)
        console.print(
            f"index: {kept:,} rows stay where they are, {len(reused.ids) - kept:,} are copied, {len(rows):,} images "
            "are embedded"
        )
    embedded = cut([image_item(row) for row in rows], config.images_per_part)
    plan = Plan(
        stage="index",
        version=version_of("index", schema.SCHEMA_VERSION, made_from, config.split, config.images_per_part),
        tables=("gallery",),
        units=[*({"copy": unit} for unit in reused.copies), *({"images": unit} for unit in embedded)],
        sizes=[*(sum(len(taken) for _, taken in unit) for unit in reused.copies), *map(len, embedded)],
        worker=IndexWorker,
        arguments={
            "earlier": earlier,
            "uri": store.uri,
            "model": config.model,
            "images": images,
            "schemas": {"images": ("gallery", schema.gallery(model.global_dim, model.local_dim))},
            "batch": config.batch,
            "gpu": usable_gpus(config.gpus) > 0,
            "replicas": config.replicas,
        },
        made_from=made_from,
        config=to_mapping(config, results_only=True),
        rejects=rejects,
        kept=[Receipt({"gallery": part}) for part in reused.parts],
        notes={"model": config.model},
    )
    return run_plan(store, plan, redo=redo, replicas=config.replicas, cpus=1, gpus=config.gpus)


@dataclasses.dataclass(frozen=True)
class Reused:
    """What a gallery takes from the one before it: whole parts, rows to copy as units of [[part, rows], …], and the
    ids of the images of both."""

    parts: Sequence[Any] = ()
    copies: Sequence[list[list[Any]]] = ()
    ids: frozenset[str] = frozenset()


def reuse(
    store: Store,
    earlier: Manifest,
    model: PublishedModel,
    rows: Sequence[ImageRow],
    made_from: dict[str, str],
    images_per_part: int,
) -> Reused:
    """Which rows of the earlier gallery are those that indexing these images would give.

    Raises:
        UserError: it was made by another model.
    """
    if earlier.made_from["model"] != model.digest:
        raise UserError(
            f"{store.place('gallery')} was made by model {earlier.made_from['model']} and {model.uri} is "
            f"{model.digest}, and one gallery holds embeddings of one model: leave --only-missing out to embed all "
            "images"
        )
    valid = {row.image_id for row in rows}
    if earlier.made_from.get("dialogues") != made_from.get("dialogues"):
        # Where that version of the dialogues is gone, nobody knows what the earlier images were told by.
        version = earlier.made_from.get("dialogues")
        dialogues = store.manifest("dialogues", version) if version else None
        told = read_summaries(store, dialogues) if dialogues and dialogues.rows else {}
        valid = {row.image_id for row in rows if told.get(row.image_id) == row.summary}
    ids = store.read(earlier, ["image_id"])["image_id"].to_pylist() if earlier.rows else []
    taken: list[list[int]] = []  # of each part the rows that are valid
    start = 0
    for part in earlier.parts:
        inside = ids[start : start + part.rows]
        taken.append([row for row, image_id in enumerate(inside) if image_id in valid])
        start += part.rows
    whole = {number for number, part in enumerate(earlier.parts) if len(taken[number]) == part.rows}
    small = {number for number in whole if len(taken[number]) < images_per_part / 2}
    if len(small) > SMALL_PARTS:
        whole -= small
    copies: list[list[list[Any]]] = []
    room = 0
    for number, valid_rows in enumerate(taken):
        if number in whole or not valid_rows:
            continue
        if len(valid_rows) > room:
            copies.append([])
            room = images_per_part
        copies[-1].append([number, valid_rows])
        room -= len(valid_rows)
    present = frozenset(image_id for image_id in ids if image_id in valid)
    return Reused([earlier.parts[number] for number in sorted(whole)], copies, present)


class IndexWorker:
    """Embeds images, or copies rows of the earlier gallery; the model is loaded at the first image.

    A unit of work is {"images": …} of EmbedWorker or {"copy": [[part, rows], …]}.
    """

    def __init__(self, earlier: Manifest | None, uri: str, **embedding: Any):
        self.store, self.earlier, self.embedding = Store(uri), earlier, {"uri": uri, **embedding}
        self.embedder: EmbedWorker | None = None

    def __call__(self, work: dict[str, list[Any]]) -> Output:
        if "copy" in work:
            assert self.earlier is not None
            parts = [self.store.read_part(self.earlier, part).take(rows) for part, rows in work["copy"]]
            return Output({"gallery": pa.concat_tables(parts)})
        if self.embedder is None:
            self.embedder = EmbedWorker(**self.embedding)
        return self.embedder(work)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments("index", argv, prog="index")
    index(arguments.data, arguments.config, redo=arguments.redo)


if __name__ == "__main__":
    entry(main)
