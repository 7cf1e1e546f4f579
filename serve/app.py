"""The search service on Ray Serve: text in, people out.

    ingress (HTTP, pictures) ──text──► QueryEncoder (batches) ──embeddings──► GallerySearch (exact top-k)

Notable: queries that arrive together are embedded in one pass and meet the gallery in one matrix product; ω is
chosen per query; what can be wrong with a dataset is found before anything is deployed.

    python -m serve --data URI                         in the foreground, starts Ray if there is none
    serve run serve.app:build data=URI omega=0.5       Ray's own command; also `import_path` of a KubeRay RayService
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from ceca.commandline import load_recipe
from ceca.config import ServeConfig, from_mapping
from ceca.errors import UserError
from ceca.facets import open_facets
from ceca.gallery import Hit, check_same_model, embed_texts, open_gallery
from ceca.model.weights import load_model
from ceca.store import Store, StoreError
from ceca.topk import FEW
from serve.access import AUDIT, Gate, Key, read_keys
from serve.api import make_api
from serve.catalogue import Catalogue, Picture, Served, find_served

QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)
Conditions = tuple[tuple[str, tuple[str, ...]], ...]  # facets and values, so that a mask can be kept for it
MASKS = 32  # of conditions asked last, a byte per image each
INGRESS_REQUESTS = 512  # in flight on one ingress replica; more wait at the proxy


@dataclasses.dataclass(frozen=True)
class Question:
    """An embedded query: normalised [D] and [E], ω, how many hits are wanted, and of which images."""

    global_embedding: np.ndarray
    local_embedding: np.ndarray
    omega: float
    top_k: int
    where: Conditions = ()


@serve.deployment(logging_config=QUIET)
class QueryEncoder:
    """Turns texts into normalised embeddings, those that wait at the same time in one pass."""

    def __init__(self, served: Served, config: ServeConfig):
        self.device = _device(config)
        self.model, published = load_model(Store(served.data), served.model, self.device)
        if published.digest != served.digest:
            raise StoreError(
                f"{served.model} was {served.digest} and is now {published.digest}; start the service anew"
            )
        self.encode.set_max_batch_size(config.batch)  # type: ignore[attr-defined]
        self.encode.set_batch_wait_timeout_s(config.batch_wait_s)  # type: ignore[attr-defined]
        self._encode(["a person"])  # the first pass is slow, so it is not a user's

    @serve.batch
    async def encode(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        return await asyncio.to_thread(self._encode, texts)

    def _encode(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        embeddings = embed_texts(self.model, texts, self.device)
        return list(zip(*(part.cpu().numpy() for part in embeddings), strict=True))


@serve.deployment(logging_config=QUIET)
class GallerySearch:
    """Holds the gallery and answers exactly; questions that wait at the same time share a pass over it."""

    def __init__(self, served: Served, config: ServeConfig):
        store = Store(served.data)
        self.gallery, manifest = open_gallery(store, _device(config), neighbours=config.neighbours, omega=config.omega)
        check_same_model(manifest, served.digest, served.model)
        if manifest.version != served.gallery:
            raise StoreError(
                f"the gallery was {served.gallery} and is now {manifest.version}; start the service anew to serve it"
            )
        self.rerank_first = config.rerank
        facets = open_facets(store, manifest, self.gallery.ids)
        self.mask = functools.lru_cache(MASKS)(lambda where: facets.where(dict(where)) if where else None)
        widths = (self.gallery.global_dim, self.gallery.shards[0].shape[1] - self.gallery.global_dim)
        probe = [torch.nn.functional.normalize(torch.randn(FEW + 1, width), dim=1) for width in widths]
        self.gallery.search(*probe, omega=0.3, top_k=1)  # the first batch is slow, so it is not a user's
        self.search.set_max_batch_size(config.batch)  # type: ignore[attr-defined]
        self.search.set_batch_wait_timeout_s(0.0)  # type: ignore[attr-defined]  # they come in the encoder's batches

    @serve.batch
    async def search(self, questions: list[Question]) -> list[list[Hit]]:
        return await asyncio.to_thread(self._search, questions)

    def _search(self, questions: list[Question]) -> list[list[Hit]]:
        found: list[list[Hit]] = [[] for _ in questions]
        for where in {question.where for question in questions}:  # mostly one, and one pass over the gallery
            places = [place for place, question in enumerate(questions) if question.where == where]
            asked = [questions[place] for place in places]
            query_global, query_local = (
                torch.from_numpy(np.stack([getattr(question, name) for question in asked]))
                for name in ("global_embedding", "local_embedding")
            )
            most, omega = max(question.top_k for question in asked), [question.omega for question in asked]
            hits = self.gallery.search(
                query_global,
                query_local,
                omega=omega,
                top_k=most,
                allowed=self.mask(where),
                rerank_first=self.rerank_first,
            )
            for place, question, own in zip(places, asked, hits, strict=True):
                found[place] = own[: question.top_k]
        return found


@serve.deployment(logging_config=QUIET)
@serve.ingress()
class Ingress:
    """HTTP in front of the two; reads pictures from the images table in threads."""

    def __init__(
        self,
        served: Served,
        config: ServeConfig,
        keys: tuple[Key, ...],
        encoder: DeploymentHandle,
        gallery: DeploymentHandle,
    ):
        self.served, self.config, self.keys = served, config, keys
        self.encoder, self.gallery = encoder, gallery
        self.catalogue = Catalogue(served)

    def __serve_build_asgi_app__(self) -> Any:
        # Into the replica's log, which Ray keeps; where there are no keys, nobody is told from another.
        AUDIT.handlers = [logging.StreamHandler() if self.keys else logging.NullHandler()]
        AUDIT.setLevel(logging.INFO)
        AUDIT.propagate = False
        return make_api(self, self.config, Gate(self.keys, self.config.ingress_replicas))

    async def search(self, query: str, *, omega: float, top_k: int, where: Mapping[str, list[str]]) -> list[Hit]:
        self.catalogue.facets.check(where)  # here, so that what does not exist is refused alone and not with its batch
        conditions = tuple((name, tuple(values)) for name, values in sorted(where.items()))
        query_global, query_local = await self.encoder.encode.remote(query)
        return await self.gallery.search.remote(Question(query_global, query_local, omega, top_k, conditions))

    async def picture(self, image_id: str) -> Picture | None:
        if image_id not in self.catalogue.places:
            return None
        return self.catalogue.cached(image_id) or await asyncio.to_thread(self.catalogue.picture, image_id)


def build(arguments: dict[str, Any]) -> Application:
    """The application from plain values, as `serve run serve.app:build key=value …` and KubeRay give them.

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
    return application(find_served(data, config.model), config)


def application(served: Served, config: ServeConfig) -> Application:
    """The deployments of a service, bound together."""
    keys = read_keys(Path(config.keys)) if config.keys else ()
    resources = {"num_cpus": config.cpus, "num_gpus": config.gpus}
    # Two batches at work or filling, so that a replica is never idle while others wait.
    shared: dict[str, Any] = {"ray_actor_options": resources, "max_ongoing_requests": 4 * config.batch}
    encoder = QueryEncoder.options(  # type: ignore[attr-defined]
        num_replicas=config.encoder_replicas, **shared
    )
    gallery = GallerySearch.options(  # type: ignore[attr-defined]
        num_replicas=config.search_replicas, **shared
    )
    ingress = Ingress.options(  # type: ignore[attr-defined]
        num_replicas=config.ingress_replicas,
        ray_actor_options={"num_cpus": 0},  # it waits more than it works, and must fit beside the other two
        max_ongoing_requests=INGRESS_REQUESTS,
    )
    return ingress.bind(served, config, keys, encoder.bind(served, config), gallery.bind(served, config))


def _device(config: ServeConfig) -> torch.device:
    """Where a replica computes; on CPUs torch gets as many threads as the replica has reserved."""
    if config.gpus:
        return torch.device("cuda")
    torch.set_num_threads(config.cpus)
    return torch.device("cpu")
