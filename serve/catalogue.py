"""What the service serves: the versions it was started with, and the gallery's pictures and summaries.

Everything is looked up once, before anything is deployed, and pinned by version: a table that is published while
the service runs changes no answer before it is started again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections import OrderedDict

from ceca.datasets.images import mime_type
from ceca.facets import open_facets
from ceca.gallery import check_same_model
from ceca.model.weights import require_model
from ceca.samples import list_images, read_summaries, removed_images
from ceca.store import Manifest, Store, StoreError

CACHE_BYTES = 64 * 1024 * 1024  # of encoded images in one ingress replica: a few thousand pedestrian crops


@dataclasses.dataclass(frozen=True)
class Served:
    """A gallery and the model that made it: dataset URI, model URI, digest, and versions of the tables."""

    data: str
    model: str
    digest: str
    gallery: str
    images: str
    dialogues: str | None
    size: int

    @property
    def model_name(self) -> str:
        """For people and logs: the model's name and digest."""
        return f"{self.model.rstrip('/').rsplit('/', 1)[-1]}@{self.digest}"


def find_served(data: str, model: str = "") -> Served:
    """What a dataset has to serve.

    Args:
        model: name below the dataset or URI; empty takes the one that made the gallery.

    Raises:
        StoreError: no gallery or model, a gallery made by another model, or its images are gone.
    """
    store = Store(data)
    gallery = store.current("gallery", "index")
    published = require_model(store, model or gallery.notes["model"])
    check_same_model(gallery, published.digest, published.uri)
    images = _pinned(store, "images", gallery.made_from["images"])
    dialogues = _matching_dialogues(store, gallery, images)
    return Served(
        data=store.uri,
        model=published.uri,
        digest=published.digest,
        gallery=gallery.version,
        images=images.version,
        dialogues=dialogues.version if dialogues else None,
        size=gallery.rows,
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


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image as it came: encoded bytes, media type, and the tag that names this content."""

    content: bytes
    media_type: str
    etag: str


class Catalogue:
    """Pictures and summaries of the gallery's images, and of no others. Its methods block and may run in threads."""

    def __init__(self, served: Served):
        self.store = Store(served.data)
        self.images = _pinned(self.store, "images", served.images)
        gallery = _pinned(self.store, "gallery", served.gallery)
        listed = self.store.read(gallery, ["image_id"])["image_id"].to_pylist()
        ids = set(listed) - removed_images(self.store)
        self.facets = open_facets(self.store, gallery, sorted(ids))
        rows = list_images(self.store, self.images)
        self.places = {row.image_id: (row.part, row.row) for row in rows if row.image_id in ids}
        told = self.store.manifest("dialogues", served.dialogues) if served.dialogues else None
        summaries = read_summaries(self.store, told) if told and told.rows else {}
        self.summaries = {image_id: summary for image_id, summary in summaries.items() if image_id in ids}
        self._cache: OrderedDict[str, Picture] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def cached(self, image_id: str) -> Picture | None:
        """A picture if it is at hand; never blocks for long."""
        with self._lock:
            picture = self._cache.get(image_id)
            if picture is not None:
                self._cache.move_to_end(image_id)
            return picture

    def picture(self, image_id: str) -> Picture | None:
        """The picture of an image; None where the gallery has no such image.

        Raises:
            StoreError: the images table cannot be read.
        """
        picture = self.cached(image_id)
        place = self.places.get(image_id)
        if picture is not None or place is None:
            return picture
        try:
            content = self.store.take(self.images, [place], ["image"])["image"][0].as_py()
        except FileNotFoundError:
            raise StoreError(f"{self.store.place('images', self.images.version)} is damaged: a part is gone") from None
        picture = Picture(content, mime_type(content), f'"{hashlib.sha256(content).hexdigest()[:32]}"')
        self._keep(image_id, picture)
        return picture

    def _keep(self, image_id: str, picture: Picture) -> None:
        with self._lock:
            if image_id in self._cache:
                return
            self._cache[image_id] = picture
            self._cached_bytes += len(picture.content)
            while self._cached_bytes > CACHE_BYTES and len(self._cache) > 1:
                _, oldest = self._cache.popitem(last=False)
                self._cached_bytes -= len(oldest.content)
