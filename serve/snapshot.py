"""An edition with its catalogue, as an ingress replica serves it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from ceca.config import ServeConfig
from ceca.data.store import Store, StoreError
from ceca.dialogue.attributes import Choices, attributes_of, read_vocabulary
from ceca.search.catalogue import Catalogue
from ceca.search.confidence import Calibration, read_calibration
from ceca.search.edition import Edition, find_edition

OPENINGS = 3  # attempts: objects of `added` can be joined between their listing and their reading
KEPT = 100_000  # images whose attributes are kept
UNASKED = ("identity", "split", "camera")  # facets that no dialogue answers


class Snapshot:
    """An edition and its catalogue. A request keeps the one that it began with.

    Args:
        edition: the edition.
        before: the snapshot of an earlier edition: only what is new is read.
    """

    catalogue: Catalogue

    def __init__(self, edition: Edition, before: Snapshot | None = None):
        self.edition, self.catalogue = edition, Catalogue(edition, before.catalogue if before else None)
        self.facets = self.catalogue.facets  # read now, not at the first search
        self.structured = [name for name in self.facets.columns if name not in UNASKED]
        self.calibration = read_calibration(edition.store, edition.digest)
        self.vocabulary = read_vocabulary(edition.store, self.catalogue.images)
        self._attributes_of: dict[str, dict[str, str]] = {}

    def calibration_for(self, config: ServeConfig) -> Calibration | None:
        """The calibration of searches; None if there is none, or if the settings change similarities."""
        return None if config.neighbours or config.rerank else self.calibration

    def images(self, where: Mapping[str, Sequence[str]]) -> int:
        """Number of images that fulfil conditions."""
        return int(self.facets.mask(where).sum()) if where else len(self.catalogue)

    async def file(self, image_id: str) -> bytes | None:
        """The file of an image; None if it is gone: then nobody is asked about it."""
        try:
            picture = self.catalogue.cached(image_id) or await asyncio.to_thread(self.catalogue.picture, image_id)
        except (StoreError, FileNotFoundError):
            return None
        return picture.content if picture else None

    @property
    def choices(self) -> Choices:
        """The facets that an answer can be about, and their values."""
        if not self.structured:
            return self.vocabulary
        return {name: self.facets.values(name) for name in self.structured}

    def possible(self, facet: str) -> Sequence[str]:
        """The values that a facet can have."""
        return self.facets.values(facet) if facet in self.structured else self.vocabulary.get(facet, ())

    def attributes(self, ids: Sequence[str]) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
        """The attributes of K images, from the structured answers of the dialogues or else from their words.

        Returns:
            Codes of each facet [K], -1 if an image has no value; and the values that the codes stand for.
        """
        if self.structured:
            rows = pa.array(self.catalogue.positions(ids))
            return _encode({name: self.facets.columns[name].take(rows).to_pylist() for name in self.structured})
        images = self._said(ids)
        names = sorted({name for attributes in images for name in attributes})
        return _encode({name: [attributes.get(name) for attributes in images] for name in names})

    def _said(self, ids: Sequence[str]) -> list[dict[str, str]]:
        """The attributes that the words of each image's dialogue name. The last ones are kept."""
        held = {image_id: self._attributes_of.get(image_id) for image_id in ids}
        new = [image_id for image_id, attributes in held.items() if attributes is None]
        for image_id, dialogue in zip(new, self.catalogue.told(new), strict=True):
            held[image_id] = attributes_of(dialogue.turns, self.vocabulary) if dialogue else {}
        if len(self._attributes_of) > KEPT:
            self._attributes_of = {}
        self._attributes_of |= {image_id: held[image_id] or {} for image_id in new}
        return [held[image_id] or {} for image_id in ids]


def read_snapshot(store: Store, model: str, before: Snapshot | None = None) -> Snapshot:
    """Read the newest edition of a dataset.

    Args:
        store: the dataset.
        model: name or URI; empty takes the model that made the gallery.
        before: the snapshot of an earlier edition: only what is new is read.

    Raises:
        StoreError: the dataset has no gallery or model, or they do not fit together.
    """
    for _ in range(OPENINGS):
        try:
            return Snapshot(find_edition(store, model), before)
        except FileNotFoundError:
            continue
    return Snapshot(find_edition(store, model), before)


def _encode(columns: Mapping[str, list[str | None]]) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    values = {name: sorted({value for value in column if value is not None}) for name, column in columns.items()}
    numbers = {name: {value: number for number, value in enumerate(known)} for name, known in values.items()}
    codes = {
        name: np.array([-1 if value is None else numbers[name][value] for value in column])
        for name, column in columns.items()
    }
    return codes, values
