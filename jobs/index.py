"""Index: a model embeds images and their summaries; the embeddings become the table gallery.

    python jobs/index.py --data s3://bucket/cuhk --model ceca-vitb16 --split test

`--only-missing` embeds the images that the published gallery lacks. The new version takes over the other parts as
they are. Two kinds of part are copied instead: parts with rows that are no longer valid, and small parts if there are
many.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from ceca.commandline import parse_arguments
from ceca.config import IndexConfig
from ceca.data import schema
from ceca.data.changes import removed_images
from ceca.data.store import Manifest, Part, Receipt, Store, StoreError, version_of
from ceca.data.tables import ImageRow, read_summaries
from ceca.environment import usable_gpus
from ceca.errors import UserError
from ceca.model.registry import PublishedModel, require_model
from ceca.settings import to_mapping
from jobs.runtime.console import console, entry
from jobs.runtime.embed import ImagePlan, plan_images
from jobs.runtime.records import cut, from_json, to_json
from jobs.runtime.units import Output, Plan, Workers, run_plan

if TYPE_CHECKING:
    from jobs.runtime.embed_worker import EmbedWorker

SMALL_PARTS = 8  # up to this many parts below half the usual size are kept; each costs a search an extra shard


def index(data: str, config: IndexConfig, *, redo: bool = False) -> dict[str, Manifest]:
    """Publish the table gallery.

    Args:
        data: dataset URI.
        config: the model, the split and the size of the parts.
        redo: make a new version even if this one is published.

    Returns:
        The manifest of the gallery.

    Raises:
        StoreError: the split has no image to index.
        UserError: with `only_missing`, the published gallery was made by another model.
    """
    store = Store(data)
    model = require_model(store, config.model)
    images = _searchable(store, plan_images(store, model, config.split))
    if not images.rows:
        raise StoreError(f"nothing to index: {store.uri} has no images of split {config.split!r} with a dialogue")
    earlier = store.current("gallery", "index") if config.only_missing else None
    reused = Reused()
    if earlier is not None:
        reused = reuse(store, earlier, model, images.rows, images.made_from, config.images_per_part)
        rows = [row for row in images.rows if row.image_id not in reused.ids]
        before = {name: version for name, version in earlier.made_from.items() if name != "gallery"}
        if not rows and not reused.copies and before == images.made_from:
            console.print(f"index: {store.place('gallery')} lacks nothing")
            return {"gallery": earlier}
        images = dataclasses.replace(images, rows=rows, made_from={**images.made_from, "gallery": earlier.version})
        kept = sum(part.rows for part in reused.parts)
        console.print(
            f"index: {kept:,} rows stay where they are, {len(reused.ids) - kept:,} are copied, {len(rows):,} images "
            "are embedded"
        )
    plan = _plan(store, config, model, images, earlier, reused)
    workers = Workers(config.replicas, cpus=1, gpus=config.gpus, pool="dialogue" if config.gpus else "cpu")
    return run_plan(store, plan, workers, redo=redo)


def _searchable(store: Store, images: ImagePlan) -> ImagePlan:
    """Leave out the images that were removed from search."""
    removed = removed_images(store).intersection(row.image_id for row in images.rows)
    if not removed:
        return images
    return dataclasses.replace(
        images,
        rows=[row for row in images.rows if row.image_id not in removed],
        made_from={**images.made_from, "removed": version_of(sorted(removed))},
    )


@dataclasses.dataclass(frozen=True)
class CopiedRows:
    """Rows of a part of the earlier gallery, by the part's number."""

    part: int
    rows: list[int]


@dataclasses.dataclass(frozen=True)
class Reused:
    """What a gallery takes from the earlier one.

    Attributes:
        parts: parts that are taken over as they are.
        copies: rows that are copied, by unit of work.
        ids: ids of the images in both.
    """

    parts: Sequence[Part] = ()
    copies: Sequence[list[CopiedRows]] = ()
    ids: frozenset[str] = frozenset()


def _plan(
    store: Store,
    config: IndexConfig,
    model: PublishedModel,
    images: ImagePlan,
    earlier: Manifest | None,
    reused: Reused,
) -> Plan:
    """The units of work: copies first, then images to embed."""
    embedded = cut(images.rows, config.images_per_part)
    return Plan(
        stage="index",
        version=version_of("index", schema.SCHEMA_VERSION, images.made_from, config.split, config.images_per_part),
        tables=("gallery",),
        units=[
            *({"copy": to_json(copies)} for copies in reused.copies),
            *({"images": to_json(rows)} for rows in embedded),
        ],
        sizes=[*(sum(len(copied.rows) for copied in copies) for copies in reused.copies), *map(len, embedded)],
        worker=IndexWorker,
        arguments={
            "earlier": earlier,
            "uri": store.uri,
            "model": config.model,
            "images": images.table,
            "schemas": {"images": ("gallery", schema.gallery(model.global_dim, model.local_dim))},
            "batch": config.batch,
            "gpu": usable_gpus(config.gpus) > 0,
            "replicas": config.replicas,
        },
        made_from=images.made_from,
        config=to_mapping(config, results_only=True),
        rejects=images.rejects,
        kept=[Receipt({"gallery": part}) for part in reused.parts],
        notes={"model": config.model},
    )


def reuse(
    store: Store,
    earlier: Manifest,
    model: PublishedModel,
    rows: Sequence[ImageRow],
    made_from: dict[str, str],
    images_per_part: int,
) -> Reused:
    """Find the rows of the earlier gallery that indexing these images would give again.

    Args:
        store: the dataset.
        earlier: the published gallery.
        model: the model that indexes.
        rows: images to index.
        made_from: versions that the new gallery is made from.
        images_per_part: usual size of a part.

    Raises:
        UserError: the earlier gallery was made by another model.
    """
    if earlier.made_from["model"] != model.digest:
        raise UserError(
            f"{store.place('gallery')} was made by model {earlier.made_from['model']} and {model.uri} is "
            f"{model.digest}, and one gallery holds embeddings of one model: leave --only-missing out to embed all "
            "images"
        )
    valid = _unchanged(store, earlier, rows, made_from)
    ids = store.read(earlier, ["image_id"])["image_id"].to_pylist() if earlier.rows else []
    valid_rows: list[list[int]] = []  # by part
    start = 0
    for part in earlier.parts:
        in_part = ids[start : start + part.rows]
        valid_rows.append([row for row, image_id in enumerate(in_part) if image_id in valid])
        start += part.rows
    whole = {number for number, part in enumerate(earlier.parts) if len(valid_rows[number]) == part.rows}
    small = {number for number in whole if len(valid_rows[number]) < images_per_part / 2}
    if len(small) > SMALL_PARTS:
        whole -= small
    copies: list[list[CopiedRows]] = []
    room = 0  # rows that the last unit can still take
    for number, copied in enumerate(valid_rows):
        if number in whole or not copied:
            continue
        if len(copied) > room:
            copies.append([])
            room = images_per_part
        copies[-1].append(CopiedRows(number, copied))
        room -= len(copied)
    present = frozenset(image_id for image_id in ids if image_id in valid)
    return Reused([earlier.parts[number] for number in sorted(whole)], copies, present)


def _unchanged(store: Store, earlier: Manifest, rows: Sequence[ImageRow], made_from: dict[str, str]) -> set[str]:
    """Ids of the images that had the same summary when the earlier gallery was made."""
    if earlier.made_from.get("dialogues") == made_from.get("dialogues"):
        return {row.image_id for row in rows}
    # If that version of the dialogues is gone, the earlier summaries are unknown and no image counts as unchanged.
    version = earlier.made_from.get("dialogues")
    dialogues = store.manifest("dialogues", version) if version else None
    summaries = read_summaries(store, dialogues) if dialogues and dialogues.rows else {}
    return {row.image_id for row in rows if summaries.get(row.image_id) == row.summary}


class IndexWorker:
    """Embeds images, or copies rows of the earlier gallery; the model is loaded when the first image comes.

    A unit of work is {"images": [ImageRow, …]} as of EmbedWorker, or {"copy": [CopiedRows, …]}, records as JSON.
    """

    def __init__(self, earlier: Manifest | None, uri: str, **embedding: Any):
        self.store, self.earlier, self.embedding = Store(uri), earlier, {"uri": uri, **embedding}
        self.embedder: EmbedWorker | None = None

    def __call__(self, work: dict[str, list[Any]]) -> Output:
        if "copy" in work:
            assert self.earlier is not None
            parts = [
                self.store.read_part(self.earlier, copied.part).take(copied.rows)
                for copied in from_json(CopiedRows, work["copy"])
            ]
            return Output({"gallery": pa.concat_tables(parts)})
        if self.embedder is None:
            from jobs.runtime.embed_worker import EmbedWorker

            self.embedder = EmbedWorker(**self.embedding)
        return self.embedder(work)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments("index", argv, prog="index")
    index(arguments.data, arguments.config, redo=arguments.redo)


if __name__ == "__main__":
    entry(main)
