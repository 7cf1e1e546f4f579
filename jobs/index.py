"""Index: a model embeds images and their summaries; the embeddings become the table gallery.

    python jobs/index.py --data s3://bucket/cuhk --model ceca-vitb16 --split test

`--only-missing` embeds the images that the published gallery lacks. The new version takes over the other parts as
they are. Two kinds of part are copied instead: parts with rows that are no longer valid, and small parts if there are
many.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ceca.commandline import parse_arguments
from ceca.config import IndexConfig
from ceca.data import schema
from ceca.data.changes import removed_images
from ceca.data.keys import Positions, known_numbers, numbers, spelled
from ceca.data.store import Manifest, Part, Receipt, Store, StoreError, version_of
from ceca.data.tables import Images, read_keys
from ceca.environment import usable_gpus
from ceca.errors import UserError
from ceca.model.registry import PublishedModel, require_model
from ceca.settings import to_mapping
from jobs.runtime.console import console, entry
from jobs.runtime.embed import ImagePlan, plan_images
from jobs.runtime.records import Joined, Units, from_json, to_json
from jobs.runtime.units import Output, Plan, Workers, run_plan

if TYPE_CHECKING:
    from jobs.runtime.embed_worker import EmbedWorker

SMALL_PARTS = 8  # up to this many parts below half the usual size are kept; each costs a search an extra shard


def index(data: str, config: IndexConfig, *, redo: bool = False) -> dict[str, Manifest]:
    """Publish the table gallery, and the recall of approximate search over it where that is asked for.

    Args:
        data: dataset URI.
        config: the model, the split and the size of the parts.
        redo: make a new version even if this one is published.

    Returns:
        The manifest of the gallery, and of the recall.

    Raises:
        StoreError: the split has no image to index.
        UserError: with `only_missing`, the published gallery was made by another model.
    """
    store = Store(data)
    published = _index(store, config, redo)
    if config.approximate:
        from jobs.evaluations.recall import measure_recall

        published["recall"] = measure_recall(store, published["gallery"], config.model, config.approximate, redo=redo)
    return published


def _index(store: Store, config: IndexConfig, redo: bool) -> dict[str, Manifest]:
    """Publish the table gallery."""
    model = require_model(store, config.model)
    images = _searchable(store, plan_images(store, model, config.split))
    if not len(images.images):
        raise StoreError(f"nothing to index: {store.uri} has no images of split {config.split!r} with a dialogue")
    earlier = store.current("gallery", "index") if config.only_missing else None
    reused = Reused()
    if earlier is not None:
        reused = reuse(store, earlier, model, images.images, images.made_from, config.images_per_part)
        new = images.images.take(~np.isin(images.images.keys, reused.keys))
        before = {name: version for name, version in earlier.made_from.items() if name != "gallery"}
        if not len(new) and not reused.copies and before == images.made_from:
            console.print(f"index: {store.place('gallery')} lacks nothing")
            return {"gallery": earlier}
        images = dataclasses.replace(images, images=new, made_from={**images.made_from, "gallery": earlier.version})
        kept = sum(part.rows for part in reused.parts)
        console.print(
            f"index: {kept:,} rows stay where they are, {len(reused.keys) - kept:,} are copied, {len(new):,} images "
            "are embedded"
        )
    plan = _plan(store, config, model, images, earlier, reused)
    workers = Workers(config.replicas, cpus=1, gpus=config.gpus)
    return run_plan(store, plan, workers, redo=redo)


def _searchable(store: Store, images: ImagePlan) -> ImagePlan:
    """Leave out the images that were removed from search."""
    hidden = np.isin(images.images.keys, known_numbers(removed_images(store)))
    if not hidden.any():
        return images
    removed = sorted(set(spelled(images.images.keys[hidden])))
    return dataclasses.replace(
        images, images=images.images.take(~hidden), made_from={**images.made_from, "removed": version_of(removed)}
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
        keys: keys of the images in both, [N].
    """

    parts: Sequence[Part] = ()
    copies: Sequence[list[CopiedRows]] = ()
    keys: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint64))


def _plan(
    store: Store,
    config: IndexConfig,
    model: PublishedModel,
    images: ImagePlan,
    earlier: Manifest | None,
    reused: Reused,
) -> Plan:
    """The units of work: copies first, then images to embed."""
    embedded = Units(config.images_per_part, images=images.images.rows, dialogues=images.images.told)
    copied = [{"copy": to_json(copies)} for copies in reused.copies]
    return Plan(
        stage="index",
        version=version_of("index", schema.SCHEMA_VERSION, images.made_from, config.split, config.images_per_part),
        tables=("gallery",),
        units=Joined(copied, embedded),
        sizes=[*(sum(len(copied.rows) for copied in copies) for copies in reused.copies), *embedded.sizes],
        worker=IndexWorker,
        arguments={
            "earlier": earlier,
            "uri": store.uri,
            "model": config.model,
            "images": images.images.table,
            "dialogues": images.images.dialogues,
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
    images: Images,
    made_from: dict[str, str],
    images_per_part: int,
) -> Reused:
    """Find the rows of the earlier gallery that indexing these images would give again.

    Args:
        store: the dataset.
        earlier: the published gallery.
        model: the model that indexes.
        images: images to index.
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
    keys = read_keys(store, earlier) if earlier.rows else np.zeros(0, np.uint64)
    valid = np.isin(keys, _unchanged(store, earlier, images, made_from))
    starts = np.cumsum([0, *(part.rows for part in earlier.parts)])
    valid_rows = [np.flatnonzero(valid[start:end]) for start, end in itertools.pairwise(starts)]  # by part
    whole = {number for number, part in enumerate(earlier.parts) if len(valid_rows[number]) == part.rows}
    small = {number for number in whole if len(valid_rows[number]) < images_per_part / 2}
    if len(small) > SMALL_PARTS:
        whole -= small
    copies: list[list[CopiedRows]] = []
    room = 0  # rows that the last unit can still take
    for number, copied in enumerate(valid_rows):
        if number in whole or not len(copied):
            continue
        if len(copied) > room:
            copies.append([])
            room = images_per_part
        copies[-1].append(CopiedRows(number, copied.tolist()))
        room -= len(copied)
    return Reused([earlier.parts[number] for number in sorted(whole)], copies, keys[valid])


def _unchanged(store: Store, earlier: Manifest, images: Images, made_from: dict[str, str]) -> np.ndarray:
    """Keys of the images that had the same picture and summary when the earlier gallery was made, [N]."""
    images = images.take(_same_pictures(store, earlier, images))
    version = earlier.made_from.get("dialogues")
    before = store.manifest("dialogues", version) if version else None
    is_same = version == made_from.get("dialogues")
    has_common = before is not None and before.config.get("agree", "none") != "none"
    if is_same and not has_common:
        return images.keys
    # If that version of the dialogues is gone, the earlier summaries are unknown and no image counts as unchanged.
    if before is None or not before.rows:
        return images.keys[:0]
    told_before = Positions(read_keys(store, before)).find(images.keys)
    same = told_before >= 0
    if has_common:
        same &= ~_dropped(store, before)[told_before]
    if not is_same:
        assert images.dialogues is not None, "a model that uses summaries made the earlier gallery"
        same &= _digests(store, before)[told_before] == _digests(store, images.dialogues)[images.told]
    return images.keys[same]


def _same_pictures(store: Store, earlier: Manifest, images: Images) -> np.ndarray:
    """Which images had the same bytes when the earlier gallery was made, [N] bool. Reads only parts that differ."""
    version = earlier.made_from["images"]
    if version == images.table.version:
        return np.ones(len(images), bool)
    before = store.manifest("images", version)
    if before is None:  # that version is gone, and nobody knows its pictures
        return np.zeros(len(images), bool)
    common = {part.sha256 for part in before.parts} & {part.sha256 for part in images.table.parts}
    then, keys_then = _pictures(store, before, common)
    now, keys_now = _pictures(store, images.table, common)
    place = Positions(keys_then).find(keys_now)
    changed = keys_now[(place < 0) | (then[place] != now)] if len(then) else keys_now
    return ~np.isin(images.keys, changed)


def _pictures(store: Store, images: Manifest, without: Collection[str]) -> tuple[np.ndarray, np.ndarray]:
    """Digests and keys of the pictures of a table, [N] uint64 each, without the parts of these digests."""
    digests, keys = [], []
    for number, part in enumerate(images.parts):
        if part.sha256 not in without:
            rows = store.read_columns(images, number, ["image_id", "image"])
            keys.append(numbers(rows["image_id"]))
            digests += [_digest(picture.as_buffer()) for picture in rows["image"]]
    return np.frombuffer(b"".join(digests), np.uint64), np.concatenate([np.zeros(0, np.uint64), *keys])


def _digests(store: Store, dialogues: Manifest) -> np.ndarray:
    """A number for each summary, [N] uint64: equal ones have the same, and others by one chance in 2⁶⁴."""
    return np.concatenate(
        [
            np.frombuffer(b"".join(_digest(summary.encode()) for summary in part["summary"].to_pylist()), np.uint64)
            for part in store.read_each(dialogues, ["summary"])
        ]
    )


def _dropped(store: Store, dialogues: Manifest) -> np.ndarray:
    """Which images lost their common summary by an erasure, [N] bool: the gallery may be older, and still have it."""
    parts = store.read_each(dialogues, ["summary_of"])
    empty = [pc.equal(pc.list_value_length(part["summary_of"]), 0).fill_null(False) for part in parts]
    return np.concatenate([part.to_numpy() for part in empty])


def _digest(content: bytes | pa.Buffer) -> bytes:
    return hashlib.blake2b(content, digest_size=8).digest()


class IndexWorker:
    """Embeds images, or copies rows of the earlier gallery; the model is loaded when the first image comes.

    A unit of work is one of EmbedWorker's, or {"copy": [CopiedRows, …]}, records as JSON.
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
