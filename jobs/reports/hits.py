"""Hits of a search as source paths and as pictures."""

from __future__ import annotations

from collections.abc import Sequence

from ceca.data.tables import list_images
from ceca.datasets.images import open_image
from ceca.report.records import RankedList
from ceca.search.catalogue import Catalogue
from ceca.search.edition import Edition
from ceca.search.ranking import Hit


def find_paths(edition: Edition, hits: Sequence[Hit]) -> list[str]:
    """The source paths of the images, in the order of the hits."""
    paths = {row.image_id: row.source_path for row in list_images(edition.store, edition.manifest("images"))}
    for table in edition.read_added(["image_id", "source_path"]):
        paths |= dict(zip(table["image_id"].to_pylist(), table["source_path"].to_pylist(), strict=True))
    return [paths[hit.image_id] for hit in hits]


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
