"""The encoder of the service: texts and images become embeddings. Plain Python; `serve.app` makes it a deployment."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from torch import Tensor

from ceca.config import ServeConfig
from ceca.data.store import Store
from ceca.datasets.images import decode_image
from ceca.model.ceca import CECA
from ceca.model.embed import embed_images, embed_texts
from ceca.model.weights import load_weights
from ceca.search.edition import Edition, find_edition
from serve.batches import Batches, by_kind
from serve.device import replica_device
from serve.held import Held
from serve.metrics import Metrics
from serve.query import Embeddings


class QueryEncoder:
    """Turns texts and images into normalised embeddings. Texts that wait at the same time are embedded in one pass.

    Args:
        data: dataset URI.
        config: settings of the service.
    """

    def __init__(self, data: str, config: ServeConfig):
        self.device, self.metrics = replica_device(config), Metrics()
        self.models: Held[tuple[str, str, str], CECA] = Held(self._load)
        # Of its own, so that queries in words never wait for images to be decoded.
        self.decoding = ThreadPoolExecutor(1, thread_name_prefix="images")
        self.batches = Batches(self._encode_batch, config.batch, config.batch_wait_s)
        self._prepare(find_edition(Store(data), config.model))

    async def prepare(self, edition: Edition) -> None:
        """Load the model of this edition."""
        await asyncio.to_thread(self._prepare, edition)

    async def encode(self, requests: list[tuple[Edition, str]]) -> list[Embeddings]:
        """Embed queries, each with the model of its edition: [D] and [E] per query."""
        return await asyncio.gather(*map(self.batches.ask, requests))

    async def texts(self, edition: Edition, texts: list[str]) -> Embeddings:
        """Embed all texts of one request: [N, D] and [N, E]."""
        return await asyncio.to_thread(self._texts, edition, texts)

    async def images(self, edition: Edition, images: list[bytes], summaries: list[str] | None) -> Embeddings:
        """Embed encoded images: [N, D] and [N, E].

        Args:
            edition: its model is used.
            images: encoded images.
            summaries: one per image for gallery images; None for images that are queries.

        Raises:
            ImageError: an image cannot be decoded.
        """
        loop = asyncio.get_running_loop()
        model = await asyncio.to_thread(self._model, edition)
        config = model.config
        form = config.image_height, config.image_width, config.image_resize
        # One by one, so that a query with an image waits for one of many that are added and not for all.
        pixels = [await loop.run_in_executor(self.decoding, decode_image, content, *form) for content in images]
        return await asyncio.to_thread(self._images, model, pixels, summaries)

    def _load(self, key: tuple[str, str, str]) -> CECA:
        data, model, digest = key
        return load_weights(Store(data), model, digest, self.device)

    def _model(self, edition: Edition) -> CECA:
        return self.models.get((edition.data, edition.model, edition.digest))

    def _prepare(self, edition: Edition) -> None:
        embed_texts(self._model(edition), ["a person"], self.device)  # the first pass is slow: no user waits for it

    async def _encode_batch(self, requests: list[tuple[Edition, str]]) -> list[Embeddings]:
        return await asyncio.to_thread(self._encode, requests)

    def _encode(self, requests: list[tuple[Edition, str]]) -> list[Embeddings]:
        self.metrics.batches.observe(len(requests), {"deployment": "QueryEncoder"})
        # A batch holds two editions only while the service changes from one to the next.
        return by_kind(requests, lambda request: request[0], self._encode_edition)

    def _encode_edition(self, edition: Edition, requests: list[tuple[Edition, str]]) -> list[Embeddings]:
        return list(zip(*self._texts(edition, [text for _, text in requests]), strict=True))

    def _texts(self, edition: Edition, texts: list[str]) -> Embeddings:
        return _to_numpy(embed_texts(self._model(edition), texts, self.device))

    def _images(self, model: CECA, pixels: list[np.ndarray], summaries: list[str] | None) -> Embeddings:
        return _to_numpy(embed_images(model, pixels, summaries, self.device))


def _to_numpy(parts: tuple[Tensor, Tensor]) -> Embeddings:
    return parts[0].cpu().numpy(), parts[1].cpu().numpy()
