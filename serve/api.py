"""The FastAPI application: routes, admission, error responses, and the description at /openapi.json.

Knows nothing of Ray: what it needs of the service is the protocol `serve.service.Service`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI

from ceca.config import ServeConfig
from serve.access import Gate
from serve.admission import OPEN, Admission
from serve.decoding import Decoding
from serve.refusals import add_handlers, documented
from serve.routes.about import about_routes
from serve.routes.gallery import gallery_routes
from serve.routes.search import search_routes
from serve.routes.session import session_routes
from serve.schema import ExplainRequest, LikeRequest, Rerank, SearchRequest, WordsRequest
from serve.service import Service


def make_api(service: Service, config: ServeConfig, gate: Gate) -> FastAPI:
    """Make the FastAPI application over a service.

    Args:
        service: what answers the requests.
        config: settings of the service.
        gate: the API keys. With any, all routes but `serve.admission.OPEN` need one.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        following = asyncio.create_task(service.keep_following())
        yield
        following.cancel()

    # FastAPI's own documentation pages load scripts from other hosts; the description stays at /openapi.json.
    # It would redirect `/v1/facets/` to an address made of the client's Host.
    elsewhere: dict[str, Any] = {"docs_url": None, "redoc_url": None, "redirect_slashes": False}
    api = FastAPI(title="CECA person search", version="1", lifespan=lifespan, **elsewhere)
    api.state.decoding = Decoding(config.image_pixels_limit)
    api.state.gate = gate
    add_handlers(api)
    api.add_middleware(Admission, config=config, gate=gate, metrics=service.metrics)
    api.include_router(session_routes(service, gate), responses=documented(401, 403, 413, 429, 431, 503))
    api.include_router(search_routes(service, config), responses=documented(401, 403, 413, 429, 431, 503))
    api.include_router(gallery_routes(service), responses=documented(401, 403, 413, 429, 431, 503))
    api.include_router(about_routes(service, config, gate.closed), responses=documented(403, 413, 431, 503))
    _describe(api.openapi(), config, gate.closed)
    return api


def _describe(description: dict[str, Any], config: ServeConfig, closed: bool) -> None:
    """Add the configured limits to /openapi.json, and the need for a key if the service is `closed`."""
    limits: dict[str, dict[str, float]] = {
        "query": {"maxLength": config.text_limit},
        "words": {"maxLength": config.text_limit},
        "top_k": {"maximum": config.top_k_limit},
        "offset": {"maximum": config.top_k_limit - 1},
        "seconds": {"maximum": config.rerank_seconds_limit},
        "images": {"maximum": config.rerank_images_limit},
    }
    for model in (SearchRequest, LikeRequest, ExplainRequest, Rerank, WordsRequest):
        properties = description["components"]["schemas"][model.__name__]["properties"]
        for name in limits.keys() & properties.keys():
            properties[name] |= limits[name]
    if closed:
        description["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in description["paths"].items():
            for method, operation in methods.items():
                if (method.upper(), path) not in OPEN:
                    operation["security"] = [{"key": []}]
