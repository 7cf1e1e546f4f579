"""What a search is over, pinned by version: a gallery, the model that made it, and what was added or removed since.

Two searches of one edition give one answer; whatever is published meanwhile is another edition.

    gallery/           the images that `ceca index` embedded
    added/<digest>/    images added one by one since (by the service), embedded by the model of that digest: immutable
                       Parquet objects named by their content; the listing is the table, so two writers lose nothing
    removed/           ids that no search may find any more
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import pyarrow as pa

from ceca.data.changes import read_added, removed_images
from ceca.data.names import ADDED, REMOVED
from ceca.data.store import Manifest, Store, StoreError, version_of
from ceca.model.registry import require_model


@dataclasses.dataclass(frozen=True)
class Edition:
    """Dataset URI, model URI and digest, the width of its global embeddings, versions of the tables, and names of the
    objects of what was added and removed."""

    data: str
    model: str
    digest: str
    global_dim: int
    gallery: str
    images: str
    dialogues: str | None
    added: tuple[str, ...]
    removed: tuple[str, ...]

    @property
    def model_name(self) -> str:
        """For people and logs: the model's name and digest."""
        return f"{self.model.rstrip('/').rsplit('/', 1)[-1]}@{self.digest}"

    @property
    def gallery_name(self) -> str:
        """The gallery's version, and behind a + what tells apart what was added and removed since."""
        since = f"+{version_of(self.added, self.removed)[:6]}" if self.added or self.removed else ""
        return self.gallery + since

    @functools.cached_property
    def store(self) -> Store:
        return Store(self.data)

    def __reduce__(self) -> tuple:  # a store's connections do not travel
        return Edition, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @functools.cached_property
    def removed_ids(self) -> set[str]:
        return removed_images(self.store, self.removed)

    def manifest(self, table: str) -> Manifest:
        """The manifest of `gallery` or `images`.

        Raises:
            StoreError: this version is gone.
        """
        return _pinned(self.store, table, getattr(self, table))

    def told(self) -> Manifest | None:
        """The manifest of the dialogues, if there are any."""
        found = self.store.manifest("dialogues", self.dialogues) if self.dialogues else None
        return found if found is not None and found.rows else None

    def read_added(self, columns: Sequence[str]) -> list[pa.Table]:
        """Of each object of `added`, these columns."""
        return [read_added(self.store, self.digest, name, columns) for name in self.added]


def find_edition(store: Store, model: str = "") -> Edition:
    """What a dataset has to search now.

    Args:
        model: name below the dataset or URI; empty takes the one that made the gallery.

    Raises:
        StoreError: no gallery or model, a gallery made by another model, or its images are gone.
    """
    gallery = store.current("gallery", "index")
    published = require_model(store, model or gallery.notes["model"])
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
        added=tuple(store.names(ADDED, published.digest)),
        removed=tuple(store.names(REMOVED)),
    )


def _pinned(store: Store, table: str, version: str) -> Manifest:
    manifest = store.manifest(table, version)
    if manifest is None:
        raise StoreError(f"{store.place(table, version)} is gone; run the stage `index` again")
    return manifest


def _matching_dialogues(store: Store, gallery: Manifest, images: Manifest) -> Manifest | None:
    """The dialogues that the gallery was made from, else the current ones if they tell of the same images."""
    if "dialogues" in gallery.made_from:
        return store.manifest("dialogues", gallery.made_from["dialogues"])
    current = store.manifest("dialogues")
    return current if current is not None and current.made_from.get("images") == images.version else None
