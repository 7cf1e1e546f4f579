"""Recall of approximate search: the share of the best images of exact search that it finds, measured and kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ceca.data.names import RECALL
from ceca.data.store import Manifest, Store
from ceca.errors import UserError
from ceca.search.edition import Edition

if TYPE_CHECKING:  # torch, which a process that asks shards does without
    from torch import Tensor

    from ceca.search.gallery import Gallery

TOP_K = 10
OMEGAS = (0.0, 0.3, 1.0)  # a query may have any ω: the least recall of these counts
TEXTS = 128  # queries that are asked


def find_recall(gallery: Gallery, query_global: Tensor, query_local: Tensor, omega: float) -> float:
    """Share of the ten best images of exact search that approximate search finds, on average over queries.

    Args:
        gallery: opened for approximate search.
        query_global: [Q, D] normalised global embeddings.
        query_local: [Q, E] normalised local embeddings.
        omega: ω of all queries.
    """
    near, exact = (
        searched.candidates(query_global, query_local, omega=omega, top_k=TOP_K)
        for searched in (gallery, gallery.exact())
    )
    shares = [
        len(set(found.ids) & set(best.ids)) / max(1, len(best.ids)) for found, best in zip(near, exact, strict=True)
    ]
    return float(np.mean(shares))


def sample_rows(rows: int) -> Sequence[int]:
    """Numbers of the rows of a table of texts whose texts are asked: spread over the table, always the same."""
    return np.unique(np.linspace(0, rows - 1, min(rows, TEXTS)).astype(int)).tolist()  # type: ignore[no-any-return]


def least_recall(store: Store, measured: Manifest) -> float:
    """The least recall of all ω that were measured.

    Args:
        store: the dataset.
        measured: the table of recall.
    """
    return float(min(store.read(measured, ["recall"])["recall"].to_pylist()))


def require_recall(store: Store, edition: Edition, share: float, least: float) -> None:
    """Refuse an approximate search whose recall is not known, or below what is asked for.

    Args:
        store: the dataset.
        edition: what is searched.
        share: share of the images that are compared exactly; 0 searches exactly, and nothing is refused.
        least: least recall, 0 to 1; 0 asks for none.

    Raises:
        UserError: it is refused.
    """
    if not share or not least:
        return
    measured = store.manifest(RECALL)
    if measured is None or (measured.config["gallery"], measured.config["approximate"]) != (edition.gallery, share):
        raise UserError(
            f"the recall of an approximate search that compares {share:.2%} of gallery {edition.gallery} has not been "
            f"measured: run `ceca index --approximate {share:g}` with the settings of that gallery, or ask for no "
            "least recall"
        )
    recall = least_recall(store, measured)
    if recall < least:
        raise UserError(
            f"an approximate search that compares {share:.2%} of gallery {edition.gallery} finds {recall:.1%} of the "
            f"ten best images, and {least:.1%} are asked for: compare a larger share, or search exactly"
        )
