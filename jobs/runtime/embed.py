"""What index and evaluation embed with a published model. The workers are in embed_worker.py; this imports no torch."""

from __future__ import annotations

import dataclasses

from ceca.data.store import Reject, Store
from ceca.data.tables import Images, find_dialogues, find_images
from ceca.model.registry import PublishedModel


@dataclasses.dataclass(frozen=True)
class ImagePlan:
    """The images that a model embeds.

    Attributes:
        listed: all images of the split.
        images: images to embed, with their dialogues if the model uses summaries.
        rejects: images that lack a summary.
        made_from: versions of the model and of the tables.
    """

    listed: Images
    images: Images
    rejects: list[Reject]
    made_from: dict[str, str]


def plan_images(store: Store, model: PublishedModel, split: str | None) -> ImagePlan:
    """Find the images of a split (None: all) as the model embeds them."""
    table = store.current("images", "ingest")
    listed = find_images(store, table, split)
    made_from = {"model": model.digest, "images": table.version}
    if not model.config["model"]["summary_weight"]:
        return ImagePlan(listed, listed, [], made_from)
    dialogues = store.current("dialogues", "dialogue")
    described, rejects = find_dialogues(store, listed, dialogues)
    return ImagePlan(listed, described, rejects, {**made_from, "dialogues": dialogues.version})
