"""Editions: all versions that a search depends on, so that two searches of one edition give the same answer.

    gallery/           the images that `ceca index` embedded
    added/<digest>/    images that the service added one by one since, embedded by the model of that digest: immutable
                       Parquet objects named by their content; the listing is the table, so two writers lose nothing
    removed/           ids that no search may find any more

Anything published later belongs to another edition.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from ceca.data.changes import added_objects, read_added, removed_images
from ceca.data.keys import known_numbers
from ceca.data.names import REMOVED
from ceca.data.store import Manifest, Store, StoreError, version_of
from ceca.model.registry import named_model, require_model


@dataclasses.dataclass(frozen=True)
class Edition:
    """A gallery, the model that made it, the tables that it was made from, and the images added and removed since."""

    data: str  # URI of the dataset
    model: str  # URI of the model
    digest: str  # of the model
    global_dim: int  # width of the model's global embeddings
    gallery: str  # version
    images: str  # version
    dialogues: str | None  # version
    added: tuple[str, ...]  # names of objects below added/<digest>
    removed: tuple[str, ...]  # names of objects below removed

    @property
    def model_name(self) -> str:
        """The model's name and digest, for people and logs."""
        return f"{self.model.rstrip('/').rsplit('/', 1)[-1]}@{self.digest}"

    @property
    def gallery_name(self) -> str:
        """The gallery's version; after images were added or removed, + and a digest of these changes."""
        changes = f"+{version_of(self.added, self.removed)[:6]}" if self.added or self.removed else ""
        return self.gallery + changes

    @functools.cached_property
    def store(self) -> Store:
        """The dataset."""
        return Store(self.data)

    def __reduce__(self) -> tuple:  # without the store, whose connections cannot be pickled
        return Edition, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @functools.cached_property
    def removed_ids(self) -> set[str]:
        """Ids of the removed images."""
        return removed_images(self.store, self.removed)

    def is_removed(self, ids: np.ndarray) -> np.ndarray:
        """Whether each image was removed: [N] booleans for [N] ids as numbers."""
        return np.isin(ids, known_numbers(self.removed_ids))

    def manifest(self, table: str) -> Manifest:
        """Manifest of this edition's version of `gallery` or `images`.

        Raises:
            StoreError: the version is gone.
        """
        return _pinned(self.store, table, getattr(self, table))

    def told(self) -> Manifest | None:
        """Manifest of the dialogues; None if there are none."""
        dialogues = self.store.manifest("dialogues", self.dialogues) if self.dialogues else None
        return dialogues if dialogues is not None and dialogues.rows else None

    def read_added(self, columns: Sequence[str]) -> list[pa.Table]:
        """These columns of each object of `added`."""
        return [read_added(self.store, self.digest, name, columns) for name in self.added]


def find_edition(store: Store, model: str = "") -> Edition:
    """Find the current edition of a dataset.

    Args:
        store: the dataset.
        model: name below the dataset, or URI; empty means the model that made the gallery.

    Raises:
        StoreError: the gallery or the model is missing, another model made the gallery, or its images are gone.
    """
    gallery = store.current("gallery", "index")
    published = require_model(store, model or named_model(store, gallery.notes.get("model"), store.place("gallery")))
    if gallery.made_from["model"] != published.digest:
        raise StoreError(
            f"the gallery was made by model {gallery.made_from['model']}, but {published.uri} is {published.digest}; "
            "run the stage `index` with this model"
        )
    images = _pinned(store, "images", gallery.made_from["images"])
    dialogues = _matching_dialogues(store, gallery, images)
    return Edition(
        data=store.uri,
        model=published.uri,
        digest=published.digest,
        global_dim=published.global_dim,
        gallery=gallery.version,
        images=images.version,
        dialogues=dialogues.version if dialogues else None,
        added=added_objects(store, published.digest),
        removed=tuple(store.names(REMOVED)),
    )


def _pinned(store: Store, table: str, version: str) -> Manifest:
    """Manifest of a version that must exist."""
    manifest = store.manifest(table, version)
    if manifest is None:
        raise StoreError(f"{store.place(table, version)} is gone; run the stage `index` again")
    return manifest


def _matching_dialogues(store: Store, gallery: Manifest, images: Manifest) -> Manifest | None:
    """The dialogues that the gallery was made from; else the current ones, if they describe the same images."""
    if "dialogues" in gallery.made_from:
        return store.manifest("dialogues", gallery.made_from["dialogues"])
    current = store.manifest("dialogues")
    return current if current is not None and current.made_from.get("images") == images.version else None
