"""The search of the service: each deployment holds one shard of the gallery and answers for it.

Plain Python; `serve.app` makes it one deployment per shard.
"""

from __future__ import annotations

import asyncio
import functools

import numpy as np
import torch

from ceca.config import ServeConfig
from ceca.data.keys import Positions
from ceca.data.store import Store
from ceca.search.edition import Edition, find_edition
from ceca.search.facets import Facets, open_facets
from ceca.search.gallery import Gallery, open_gallery
from ceca.search.ranking import Candidates
from ceca.search.topk import FEW
from serve.batches import Batches, by_kind
from serve.device import replica_device
from serve.held import Held
from serve.metrics import Metrics
from serve.query import Conditions, ShardQuery

MASKS = 32  # most recent conditions whose masks are kept, one byte per image each

Kind = tuple[
    Edition, int, Conditions, bool
]  # what queries of one pass have in common: edition, shards, where, with_rows


class GalleryShard:
    """One shard of an edition's gallery, and which of its images fulfil a query's conditions."""

    def __init__(self, edition: Edition, gallery: Gallery):
        self.edition, self.gallery = edition, gallery
        self.mask = functools.lru_cache(MASKS)(self._mask)

    def _mask(self, where: Conditions) -> torch.Tensor | None:
        return torch.from_numpy(self.facets.mask(dict(where))) if where else None

    @functools.cached_property
    def facets(self) -> Facets:
        return open_facets(self.edition, self.gallery.ids)

    @functools.cached_property
    def index(self) -> Positions:
        return Positions(self.gallery.ids, first=True)

    def embeddings(self, image_id: str) -> np.ndarray | None:
        """The embeddings [D + E] of an image; None if this shard does not hold it."""
        row = self.index.of(image_id)
        return None if row is None else self.gallery.rows[torch.tensor([row])][0].float().cpu().numpy()


class GallerySearch:
    """Searches one shard of the gallery. Queries that wait at the same time are answered in one pass over it.

    Args:
        data: dataset URI.
        config: settings of the service.
        number: which shard, from 0.
    """

    def __init__(self, data: str, config: ServeConfig, number: int):
        self.config, self.number, self.device, self.metrics = config, number, replica_device(config), Metrics()
        self.held: Held[tuple[Edition, int], GalleryShard] = Held(self._open)
        self.batches = Batches(self._search_batch, config.batch)  # queries arrive in the encoder's batches
        self.held.get((find_edition(Store(data), config.model), config.shards))

    async def prepare(self, edition: Edition, shards: int) -> None:
        """Load this deployment's shard of an edition whose gallery is cut into `shards`."""
        await asyncio.to_thread(self.held.get, (edition, shards))

    async def search(self, queries: list[ShardQuery]) -> list[Candidates]:
        """The best images of this shard for each query."""
        return await asyncio.gather(*map(self.batches.ask, queries))

    async def row(self, key: tuple[Edition, int], image_id: str) -> np.ndarray | None:
        """The embeddings [D + E] of an image.

        Args:
            key: the edition, and the number of shards that its gallery is cut into.
            image_id: the image.

        Returns:
            None if this shard does not hold the image.
        """
        shard = await asyncio.to_thread(self.held.get, key)
        return shard.embeddings(image_id)

    def _open(self, key: tuple[Edition, int]) -> GalleryShard:
        edition, shards = key
        config = self.config
        gallery = open_gallery(
            edition,
            self.device,
            neighbours=config.neighbours,
            omega=config.omega,
            shard=(self.number, shards),
            approximate=config.approximate,
        )
        if len(gallery):
            widths = (gallery.global_dim, gallery.rows.width - gallery.global_dim)
            probe = [torch.nn.functional.normalize(torch.randn(FEW + 1, width), dim=1) for width in widths]
            gallery.search(*probe, omega=0.3, top_k=1)  # the first batch is slow: no user waits for it
        return GalleryShard(edition, gallery)

    async def _search_batch(self, queries: list[ShardQuery]) -> list[Candidates]:
        return await asyncio.to_thread(self._search, queries)

    def _search(self, queries: list[ShardQuery]) -> list[Candidates]:
        self.metrics.batches.observe(len(queries), {"deployment": "GallerySearch"})
        return by_kind(queries, _kind, self._search_kind)  # mostly one kind, so one pass over the gallery

    def _search_kind(self, kind: Kind, queries: list[ShardQuery]) -> list[Candidates]:
        edition, shards, where, with_rows = kind
        shard = self.held.get((edition, shards))
        best = shard.gallery.candidates(
            torch.from_numpy(np.stack([query.global_embedding for query in queries])),
            torch.from_numpy(np.stack([query.local_embedding for query in queries])),
            omega=[query.omega for query in queries],
            top_k=max(query.top_k for query in queries),
            allowed=shard.mask(where),
            with_rows=with_rows,
        )
        return [candidates.first(query.top_k) for query, candidates in zip(queries, best, strict=True)]


def _kind(query: ShardQuery) -> Kind:
    return query.edition, query.shards, query.where, query.with_rows
