"""Search in one process: a model and a gallery, text in and hits out."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch

from ceca.data.store import Store
from ceca.model.embed import embed_texts
from ceca.model.weights import load_weights
from ceca.search.confidence import read_calibration
from ceca.search.edition import find_edition
from ceca.search.facets import Facets, open_facets
from ceca.search.gallery import open_gallery
from ceca.search.ranking import Hit


class Searcher:
    """A model and a gallery that it made, in one process without a cluster.

    Args:
        store: the dataset.
        model: name below the dataset, or URI; empty means the model that made the gallery.
        device: device of the model and the gallery.
        neighbours: number of nearest images averaged into each gallery embedding; 0 is off.
        approximate: share of the images that an approximate search compares exactly; 0 searches exactly.

    Raises:
        StoreError: there is nothing to search (`find_edition`).
    """

    def __init__(
        self,
        store: Store,
        model: str = "",
        device: str | torch.device = "cpu",
        *,
        neighbours: int = 0,
        approximate: float = 0.0,
    ):
        self.edition = find_edition(store, model)
        self.gallery = open_gallery(self.edition, device, neighbours=neighbours, approximate=approximate)
        self.model = load_weights(store, self.edition.model, self.edition.digest, device)
        self.device = device
        self.calibration = None if neighbours else read_calibration(store, self.edition.digest)

    def search(
        self,
        query: str,
        *,
        omega: float,
        top_k: int,
        where: Mapping[str, Sequence[str]] | None = None,
        rerank_first: int = 0,
    ) -> list[Hit]:
        """Find the best images for a text.

        Args:
            query: the text.
            omega: ω, the share of the local similarity in the fused one.
            top_k: number of hits.
            where: facet → accepted values; images must fit every facet.
            rerank_first: number of best images ranked again (`ceca.search.feedback`); 0 is off.

        Raises:
            FacetError: `where` names a facet or value that the gallery does not have.
        """
        allowed = self._allowed(where)
        embeddings = embed_texts(self.model, [query], self.device)
        (hits,) = self.gallery.search(*embeddings, omega=omega, top_k=top_k, allowed=allowed, rerank_first=rerank_first)
        return hits

    def confidence(
        self, hits: Sequence[Hit], omega: float, where: Mapping[str, Sequence[str]] | None = None
    ) -> float | None:
        """Probability that the first hit of a search shows the person asked for.

        Args:
            hits: of `search`, without re-ranking.
            omega: ω of the search.
            where: conditions of the search.

        Returns:
            None if the model was not calibrated for this ω, or if nothing was found.
        """
        if self.calibration is None:
            return None
        return self.calibration.of_hits(hits, omega, self.gallery.images(self._allowed(where)))

    def _allowed(self, where: Mapping[str, Sequence[str]] | None) -> torch.Tensor | None:
        """Which images fulfil the conditions, [N]; None for all."""
        return torch.from_numpy(self.facets.where(where)) if where else None

    @functools.cached_property
    def facets(self) -> Facets:
        """Facets of the gallery's images, in its order."""
        return open_facets(self.edition, self.gallery.ids)
