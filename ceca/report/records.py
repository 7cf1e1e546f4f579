"""Contents of pictures, as records. Imports no drawing library."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from PIL import Image


@dataclasses.dataclass(frozen=True)
class RankedList:
    """A query and the images found for it.

    Attributes:
        query: the sentence.
        identity: the person described; None if unknown.
        images: the best images, best first.
        identities: the person on each image.
        label: a name for the list, where one query has several.
    """

    query: str
    identity: int | None
    images: Sequence[Image.Image]
    identities: Sequence[int]
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Described:
    """An image with two descriptions: a person's caption and a model's summary."""

    image: Image.Image
    caption: str
    summary: str
