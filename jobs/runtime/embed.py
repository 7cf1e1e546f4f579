"""What index and evaluation embed with a published model. The workers are in embed_worker.py; this imports no torch."""

from __future__ import annotations

import dataclasses

from ceca.data.store import Manifest, Reject, Store
from ceca.data.tables import ImageRow, add_summaries, list_images
from ceca.model.registry import PublishedModel


@dataclasses.dataclass(frozen=True)
class CaptionRow:
    """A caption that is embedded as a query."""

    caption_id: str
    identity: int
    text: str


@dataclasses.dataclass(frozen=True)
class ImagePlan:
    """The images that a model embeds.

    Attributes:
        table: the images table.
        rows: images to embed, with their summaries if the model uses them.
        rejects: images that lack a summary.
        made_from: versions of the model and of the tables.
    """

    table: Manifest
    rows: list[ImageRow]
    rejects: list[Reject]
    made_from: dict[str, str]


def plan_images(store: Store, model: PublishedModel, split: str | None) -> ImagePlan:
    """List the images of a split (None: all) as the model embeds them."""
    images = store.current("images", "ingest")
    rows = list_images(store, images, split)
    made_from = {"model": model.digest, "images": images.version}
    if not model.config["model"]["summary_weight"]:
        return ImagePlan(images, rows, [], made_from)
    dialogues = store.current("dialogues", "dialogue")
    rows, rejects = add_summaries(store, rows, images, dialogues)
    return ImagePlan(images, rows, rejects, {**made_from, "dialogues": dialogues.version})
