"""The search service on Ray Serve: text in, people out.

    proxy ─► Ingress (HTTP, pictures, ranking) ─► QueryEncoder (batches)
                 │                              ─► GallerySearch 0 … n-1 (exact top-k of a share each)
                 └─► Intake (one): images that are added or removed ─► dialogue engine, QueryEncoder

Notable: queries that arrive together are embedded in one pass and meet the gallery in one matrix product. A question
carries its *edition* (model and gallery by version) to every replica, which answers of that one or not at all, so an
answer never mixes two; replicas load the next edition while they answer of this one. What can be wrong with a dataset
is found before anything is deployed.

    python -m serve --data URI                         in the foreground, starts Ray if there is none
    serve deploy serve/service.yaml                    on a cluster; the same `import_path` for a KubeRay RayService
"""

from __future__ import annotations

import asyncio
import functools
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.schema import LoggingConfig

from ceca.commandline import load_recipe
from ceca.config import ServeConfig
from ceca.data.store import Store
from ceca.datasets.images import decode_image
from ceca.environment import usable_gpus
from ceca.errors import UserError
from ceca.model.ceca import CECA
from ceca.model.embed import embed_images, embed_texts
from ceca.model.weights import load_weights
from ceca.search.edition import Edition, find_edition
from ceca.search.facets import Facets, open_facets
from ceca.search.gallery import Gallery, open_gallery
from ceca.search.ranking import Candidates
from ceca.search.topk import FEW
from ceca.settings import from_mapping
from serve.access import read_keys
from serve.batches import Batches, by_kind
from serve.held import Held
from serve.ingress import Ingress, Question, Where
from serve.intake import Intake, engine_settings
from serve.metrics import Metrics

QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
MASKS = 32  # of conditions asked last, a byte per image each
CALLS = 4  # at one replica, of up to a batch of questions each; with more another one starts
DRAIN_S = 10  # that a replica gets to finish what it has begun

Pair = tuple[np.ndarray, np.ndarray]  # normalised global [D] and local [E], or [n, D] and [n, E]


@serve.deployment(logging_config=QUIET)
class QueryEncoder:
    """Turns texts and images into normalised embeddings, texts that wait at the same time in one pass."""

    def __init__(self, data: str, config: ServeConfig):
        self.device, self.metrics = _device(config), Metrics()
        self.models: Held[tuple[str, str, str], CECA] = Held(self._load)
        self.batches = Batches(self._encode_batch, config.batch, config.batch_wait_s)
        self._prepare(find_edition(Store(data), config.model))

    def _load(self, key: tuple[str, str, str]) -> CECA:
        data, model, digest = key
        return load_weights(Store(data), model, digest, self.device)

    def _model(self, edition: Edition) -> CECA:
        return self.models.get((edition.data, edition.model, edition.digest))

    def _prepare(self, edition: Edition) -> None:
        embed_texts(self._model(edition), ["a person"], self.device)  # the first pass is slow, so it is not a user's

    async def prepare(self, edition: Edition) -> None:
        """Be ready for questions about this edition."""
        await asyncio.to_thread(self._prepare, edition)

    async def encode(self, asked: list[tuple[Edition, str]]) -> list[Pair]:
        """Embeddings of queries, [D] and [E] each."""
        return await asyncio.gather(*map(self.batches.ask, asked))

    async def _encode_batch(self, asked: list[tuple[Edition, str]]) -> list[Pair]:
        return await asyncio.to_thread(self._encode, asked)

    def _encode(self, asked: list[tuple[Edition, str]]) -> list[Pair]:
        self.metrics.batches.observe(len(asked), {"deployment": "QueryEncoder"})
        # Of two editions only while one follows the other.
        return by_kind(asked, lambda question: question[0], self._encode_of)

    def _encode_of(self, edition: Edition, asked: list[tuple[Edition, str]]) -> list[Pair]:
        return list(zip(*self._texts(edition, [text for _, text in asked]), strict=True))

    def _texts(self, edition: Edition, texts: list[str]) -> Pair:
        parts = embed_texts(self._model(edition), texts, self.device)
        return parts[0].cpu().numpy(), parts[1].cpu().numpy()

    async def texts(self, edition: Edition, texts: list[str]) -> Pair:
        """Many texts of one question, [n, D] and [n, E]."""
        return await asyncio.to_thread(self._texts, edition, texts)

    async def images(self, edition: Edition, images: list[bytes], summaries: list[str] | None) -> Pair:
        """Images as a gallery has them, with their summaries, or as a query, without; ImageError for bad bytes."""
        return await asyncio.to_thread(self._images, edition, images, summaries)

    def _images(self, edition: Edition, images: list[bytes], summaries: list[str] | None) -> Pair:
        model = self._model(edition)
        size = model.config.image_height, model.config.image_width
        parts = embed_images(model, [decode_image(content, *size) for content in images], summaries, self.device)
        return parts[0].cpu().numpy(), parts[1].cpu().numpy()


Kind = tuple[Edition, int, Where, bool]  # of questions to one share: edition, shares, where, with_rows


class Share:
    """A share of an edition's gallery, and which of its images fulfil conditions."""

    def __init__(self, edition: Edition, gallery: Gallery):
        self.edition, self.gallery = edition, gallery
        self.rows = {image_id: row for row, image_id in enumerate(gallery.ids)}
        self.mask = functools.lru_cache(MASKS)(lambda where: self.facets.mask(dict(where)) if where else None)

    @functools.cached_property
    def facets(self) -> Facets:
        return open_facets(self.edition, self.gallery.ids)


@serve.deployment(logging_config=QUIET)
class GallerySearch:
    """Holds a share of the gallery and answers exactly; questions that wait at the same time share a pass over it."""

    def __init__(self, data: str, config: ServeConfig, number: int):
        self.config, self.number, self.device, self.metrics = config, number, _device(config), Metrics()
        self.shares: Held[tuple[Edition, int], Share] = Held(self._open)
        self.batches = Batches(self._search_batch, config.batch)  # they come in the encoder's batches
        self.shares.get((find_edition(Store(data), config.model), config.shards))

    def _open(self, key: tuple[Edition, int]) -> Share:
        edition, shares = key
        share = (self.number, shares)
        config = self.config
        gallery = open_gallery(edition, self.device, neighbours=config.neighbours, omega=config.omega, shard=share)
        if gallery.shards:
            widths = (gallery.global_dim, gallery.shards[0].shape[1] - gallery.global_dim)
            probe = [torch.nn.functional.normalize(torch.randn(FEW + 1, width), dim=1) for width in widths]
            gallery.search(*probe, omega=0.3, top_k=1)  # the first batch is slow, so it is not a user's
        return Share(edition, gallery)

    async def prepare(self, edition: Edition, shares: int) -> None:
        """Be ready for questions about this edition, cut into so many shares."""
        await asyncio.to_thread(self.shares.get, (edition, shares))

    async def search(self, questions: list[Question]) -> list[Candidates]:
        """The best images of this share, for each question."""
        return await asyncio.gather(*map(self.batches.ask, questions))

    async def _search_batch(self, questions: list[Question]) -> list[Candidates]:
        return await asyncio.to_thread(self._search, questions)

    def _search(self, questions: list[Question]) -> list[Candidates]:
        self.metrics.batches.observe(len(questions), {"deployment": "GallerySearch"})
        return by_kind(questions, _kind, self._search_of)  # mostly one kind, and one pass over the gallery

    def _search_of(self, kind: Kind, asked: list[Question]) -> list[Candidates]:
        edition, shares, where, rows = kind
        share = self.shares.get((edition, shares))
        best = share.gallery.candidates(
            torch.from_numpy(np.stack([question.global_embedding for question in asked])),
            torch.from_numpy(np.stack([question.local_embedding for question in asked])),
            omega=[question.omega for question in asked],
            top_k=max(question.top_k for question in asked),
            allowed=share.mask(where),
            with_rows=rows,
        )
        return [own.first(question.top_k) for question, own in zip(asked, best, strict=True)]

    async def row(self, key: tuple[Edition, int], image_id: str) -> np.ndarray | None:
        """An image's embeddings [D + E], where it is in this share of an edition cut into so many."""
        share = await asyncio.to_thread(self.shares.get, key)
        row = share.rows.get(image_id)
        if row is None:
            return None
        for shard in share.gallery.shards:
            if row < len(shard):
                return shard[row].float().cpu().numpy()
            row -= len(shard)
        return None


def _kind(question: Question) -> Kind:
    """Questions of one kind are asked in one pass."""
    return question.edition, question.shares, question.where, question.with_rows


def build(arguments: dict[str, Any]) -> Application:
    """The application from plain values: serve/service.yaml, `serve run serve.app:build key=value …`, KubeRay.

    Args:
        arguments: `data` (dataset URI), optionally `recipe`, and settings of ServeConfig but host and port, which
            belong to Ray Serve's own `http_options` there.

    Raises:
        UserError: an argument is not valid, or the dataset has nothing to serve.
    """
    values = dict(arguments)
    data, recipe = values.pop("data", ""), values.pop("recipe", "")
    if not data:
        raise UserError("serve.app:build needs data=URI, the dataset whose gallery is served")
    for name in ("host", "port"):
        if name in values:
            raise UserError(f"serve.app:build takes no {name!r}: set it in Ray Serve's http_options")
    section = (load_recipe(recipe).get("serve") or {}) if recipe else {}
    config = from_mapping(ServeConfig, {**section, **values}, "serve.app:build")
    if not config.keys and not config.open:
        raise UserError(
            "serve.app:build needs keys=FILE (see serve/access.py), or open=true where nobody else reaches the service"
        )
    return application(find_edition(Store(data), config.model), config)


def application(edition: Edition, config: ServeConfig) -> Application:
    """The deployments of a service over a dataset, of which `edition` was found to be in order, bound together."""
    keys = read_keys(Path(config.keys)) if config.keys else ()
    data = edition.data
    refuse = BackpressureConfig(retry_after_s=1)
    drain = {"graceful_shutdown_timeout_s": DRAIN_S, "graceful_shutdown_wait_loop_s": 1.0}
    resources = {"num_cpus": config.cpus or 1, "num_gpus": config.gpus}
    # Calls of one question at the least, so that a replica is never idle while others wait.
    shared = {"max_ongoing_requests": 4 * config.batch, "max_queued_requests": config.queue, **drain}
    encoder = QueryEncoder.options(  # type: ignore[attr-defined]
        **_replicas(config, "encoder", CALLS),
        ray_actor_options=resources,
        **shared,
    ).bind(data, config)
    shards = [
        GallerySearch.options(  # type: ignore[attr-defined]
            name=f"GallerySearch{number}",
            **_replicas(config, "search", CALLS),
            ray_actor_options=resources,
            **shared,
        ).bind(data, config, number)
        for number in range(config.shards)
    ]
    intake = Intake.options(  # type: ignore[attr-defined]
        ray_actor_options={"num_cpus": 0}, logging_config=QUIET, **drain
    ).bind(data, config, engine_settings(edition, config), encoder)
    ingress = Ingress.options(  # type: ignore[attr-defined]
        **_replicas(config, "ingress", config.queue / 2),
        ray_actor_options={"num_cpus": 0},  # it waits more than it works, and must fit beside the others
        max_ongoing_requests=2 * config.queue,  # it says itself when it has too many
        max_queued_requests=config.queue,
        backpressure_config=refuse,
        logging_config=QUIET,
        **drain,
    )
    return ingress.bind(data, config, keys, encoder, shards, intake)


def _replicas(config: ServeConfig, kind: str, target: float) -> dict[str, Any]:
    """A fixed number, or one that follows the load: so many requests at work or waiting for each."""
    least, most = getattr(config, f"{kind}_replicas"), getattr(config, f"{kind}_replicas_max")
    if most is None:
        return {"num_replicas": least}
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=least,
            max_replicas=most,
            target_ongoing_requests=target,
            upscale_delay_s=5,
            downscale_delay_s=config.shrink_s,
        )
    }


def _device(config: ServeConfig) -> torch.device:
    """Where a replica computes; on CPUs torch gets as many threads as the replica has reserved."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if usable_gpus(config.gpus):
        return torch.device("cuda")
    torch.set_num_threads(config.cpus or 1)
    return torch.device("cpu")
