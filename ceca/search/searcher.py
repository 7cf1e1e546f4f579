"""A model and a gallery in one process: text in, hits out."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch

from ceca.data.store import Store
from ceca.model.embed import embed_texts
from ceca.model.weights import load_weights
from ceca.search.edition import find_edition
from ceca.search.facets import Facets, open_facets
from ceca.search.gallery import open_gallery
from ceca.search.ranking import Hit


class Searcher:
    """A model and a gallery made by it: text in, hits out. One process, no cluster."""

    def __init__(self, store: Store, model: str = "", device: str | torch.device = "cpu", *, neighbours: int = 0):
        self.edition = find_edition(store, model)
        self.gallery = open_gallery(self.edition, device, neighbours=neighbours)
        self.model = load_weights(store, self.edition.model, self.edition.digest, device)
        self.device = device

    def search(
        self,
        query: str,
        *,
        omega: float,
        top_k: int,
        where: Mapping[str, Sequence[str]] | None = None,
        rerank_first: int = 0,
    ) -> list[Hit]:
        """The best images, of those that have one of the values of every facet named in `where`."""
        allowed = self.facets.where(where) if where else None
        embeddings = embed_texts(self.model, [query], self.device)
        (hits,) = self.gallery.search(*embeddings, omega=omega, top_k=top_k, allowed=allowed, rerank_first=rerank_first)
        return hits

    @functools.cached_property
    def facets(self) -> Facets:
        return open_facets(self.edition, self.gallery.ids)
