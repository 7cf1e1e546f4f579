"""Hits of a search as pictures."""

from __future__ import annotations

from collections.abc import Sequence

from ceca.datasets.images import open_image
from ceca.report.records import RankedList
from ceca.search.catalogue import Catalogue
from ceca.search.ranking import Hit


def ranked_list(catalogue: Catalogue, query: str, identity: int | None, hits: Sequence[Hit]) -> RankedList:
    """The hits with their pictures.

    Args:
        catalogue: gives the pictures.
        query: the description.
        identity: the person described, or None if unknown.
        hits: best first.
    """
    pictures = [catalogue.picture(hit.image_id) for hit in hits]
    images = [open_image(picture.content) for picture in pictures if picture is not None]
    return RankedList(query, identity, images, [hit.identity for hit in hits])
