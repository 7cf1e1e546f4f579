"""Which requests are let in: decided by their key, headers and length before anything of the body is read."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from ceca.config import ServeConfig
from serve.access import Gate, Refusal, Scope, audit
from serve.refusals import Overloaded, refused, unavailable

if TYPE_CHECKING:  # it imports Ray
    from serve.metrics import Metrics

# Routes that need no key: none says anything about a person.
OPEN = {("GET", path) for path in ("/", "/page.js", "/page.css", "/healthz", "/readyz")} | {("POST", "/v1/session")}
COOKIE = "ceca_key"
BODY_LIMIT = 64 * 1024  # bytes; the longest query is a few thousand
HEADERS_LIMIT = 32 * 1024  # bytes, all headers of a request together


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a route requires: the scope of the key, and the limit of the body in bytes."""

    scope: Scope
    body: int = BODY_LIMIT


class Admission:
    """Middleware that turns requests away or counts and measures them.

    Args:
        config: settings of the service.
        gate: the API keys.
        metrics: counters of this replica.
    """

    def __init__(self, config: ServeConfig, gate: Gate, metrics: Metrics):
        self.config, self.gate, self.metrics = config, gate, metrics
        self.in_flight = 0

    async def admit(self, request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        """Answer a request, or refuse it."""
        response = await self._refusal(request)
        if response is not None:
            self.metrics.requests.inc(1, {"route": "turned away", "status": str(response.status_code)})
            return response
        self._count(1)
        started = time.perf_counter()
        try:
            response = await answer(request)
        finally:
            self._count(-1)
        route = request.scope.get("route")
        # Only routes that exist: a client can invent paths and methods, and each would be a time series.
        name = f"{request.method} {route.path}" if route is not None else "unknown"
        self.metrics.stages.observe(time.perf_counter() - started, {"stage": name})
        self.metrics.requests.inc(1, {"route": name, "status": str(response.status_code)})
        return response

    def _count(self, change: int) -> None:
        self.in_flight += change
        self.metrics.waiting.set(self.in_flight)

    async def _refusal(self, request: Request) -> Response | None:
        """The refusal of a request: for its headers, its key, its length, or because too many requests wait."""
        path = path_of(request)
        route, needs = (request.method, path), _needs(request.method, path, self.config)
        request.state.who = "anyone"
        if sum(len(name) + len(value) for name, value in request.scope["headers"]) > HEADERS_LIMIT:
            return JSONResponse({"detail": f"send headers of at most {HEADERS_LIMIT} bytes"}, status_code=431)
        if route not in OPEN:
            key = request.headers.get("authorization", "").removeprefix("Bearer ") or request.cookies.get(COOKIE)
            admitted = self.gate.admit(key, needs.scope)
            if isinstance(admitted, Refusal):
                audit(admitted.who, " ".join(route), admitted.status)
                return refused(admitted)
            request.state.who = admitted.name if admitted else "anyone"
        if not _fits(request, needs.body):
            detail = f"send a Content-Length of at most {needs.body} bytes"
            return JSONResponse({"detail": detail}, status_code=413)
        if self.in_flight >= self.config.queue and route not in OPEN:
            return await unavailable(request, Overloaded("too many requests wait"))
        return None


def path_of(request: Request) -> str:
    """A request's path below the application's root. Not from `request.url`, which depends on the client's Host."""
    return request.scope["path"].removeprefix(request.scope.get("root_path", ""))


def _fits(request: Request, limit: int) -> bool:
    """Whether a request states the length of its body, and that is within the limit."""
    length = request.headers.get("content-length", "0").lstrip("0") or "0"
    stated = length.isdecimal() and len(length) < 20 and "transfer-encoding" not in request.headers
    return stated and int(length) <= limit


def _needs(method: str, path: str, config: ServeConfig) -> Needs:
    """What each route requires. The only place that says which key opens which route."""
    if method == "POST" and path == "/v1/images":
        return Needs("write", config.image_bytes_limit)
    if method == "DELETE" or path.startswith("/v1/jobs/"):
        return Needs("write")
    if path == "/v1/status":
        return Needs("admin")
    if path == "/v1/search/image":
        return Needs("search", config.image_bytes_limit)
    return Needs("search")
