"""Contents of pictures, as records. Imports no drawing library."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from PIL import Image


@dataclasses.dataclass(frozen=True)
class RankedList:
    """A query and its hits, best first.

    Attributes:
        query: the description.
        identity: the person described, or None if unknown.
        images: pictures of the hits.
        identities: identities of the hits, in the same order.
        label: name of the list, if several belong to one query.
    """

    query: str
    identity: int | None
    images: Sequence[Image.Image]
    identities: Sequence[int]
    label: str = ""


@dataclasses.dataclass(frozen=True)
class Described:
    """An image with a person's caption and a model's summary."""

    image: Image.Image
    caption: str
    summary: str
