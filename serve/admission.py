"""Which requests are let in: decided by their headers before anything of the body is read.

Every answer passes here on its way out: it is counted, measured and logged, and gets the headers that all answers have.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from ceca.config import ServeConfig
from serve.access import Gate, Refusal, Scope
from serve.audit import audit
from serve.origin import names_this_machine, of_another_site
from serve.refusals import Overloaded, refused, unavailable
from serve.sessions import cookie_name
from serve.wire import ADMITTED, ASK, BODY_LIMIT, TIME_LIMIT, with_headers

if TYPE_CHECKING:  # it imports Ray
    from serve.metrics import Metrics

# Routes that need no key: none says anything about a person.
OPEN = {("GET", path) for path in ("/", "/page.js", "/page.css", "/healthz", "/readyz")}
OPEN |= {(method, "/v1/session") for method in ("POST", "DELETE")}
HEADERS_LIMIT = 32 * 1024  # bytes, all headers of a request together
CLIENT_LEFT = 499  # status in the log and in metrics
ELSEWHERE = "a page of another site sent this: a browser may use /v1 only from this service's own page"
OTHER_NAME = (
    "a service without keys answers only to localhost and loopback addresses, and the Host of this request is another: "
    "start it with --keys FILE, or with --open if a proxy in front of it asks who users are"
)


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a route requires: the scope of the key, and the limit of the body in bytes."""

    scope: Scope
    body: int = BODY_LIMIT


class Admission:
    """Middleware that turns requests away, or counts and measures them.

    Args:
        app: the application.
        config: settings of the service.
        gate: the API keys.
        metrics: counters of this replica.
    """

    def __init__(self, app: Any, config: ServeConfig, gate: Gate, metrics: Metrics):
        self.app, self.config, self.gate, self.metrics = app, config, gate, metrics
        self.in_flight = 0

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer a request, or refuse it. There are no WebSockets here."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] == "http":
            await self._admit(Request(scope), receive, send)
        else:
            await self.app(scope, receive, send)

    async def _admit(self, request: Request, receive: Any, send: Any) -> None:
        asked = ASK in (request.scope.get("extensions") or {})
        request.state.who, request.state.facts = "anyone", {}
        refusal = await self._refusal(request, take=not asked)
        if asked and refusal is None:
            refusal = Response(status_code=204, headers={ADMITTED.decode(): "1"})
            await refusal(request.scope, receive, send)
            return
        answer = Answer(send, self.config.timeout_s, functools.partial(self._record, request, refusal is not None))
        if refusal is not None:
            await refusal(request.scope, receive, answer.send)
            return
        try:
            await self._answer(request, receive, answer)
        finally:
            answer.end()

    def _record(self, request: Request, refused: bool, status: int) -> None:
        """Count and log an answer."""
        name = "turned away" if refused else _route(request)
        self.metrics.requests.inc(1, {"route": name, "status": str(status)})
        audit(request.state.who, f"{request.method} {path_of(request)}", status, request.state.facts)

    async def _answer(self, request: Request, receive: Any, answer: Answer) -> None:
        self._count(1)
        started = time.perf_counter()
        try:
            await self.app(request.scope, receive, answer.send)
        except ClientDisconnect:
            return  # there is nobody to answer
        except Exception:
            if not answer.begun:
                await JSONResponse({"detail": "an error of the service"}, 500)(request.scope, receive, answer.send)
            raise  # Starlette logs it
        finally:
            self._count(-1)
        self.metrics.stages.observe(time.perf_counter() - started, {"stage": _route(request)})

    def _count(self, change: int) -> None:
        self.in_flight += change
        self.metrics.waiting.set(self.in_flight)

    async def _refusal(self, request: Request, *, take: bool) -> Response | None:
        """The refusal of a request: for its headers, its key, its length, or because too many requests wait."""
        path, headers = path_of(request), request.headers
        route, needs = (request.method, path), _needs(request.method, path, self.config)
        if sum(len(name) + len(value) for name, value in request.scope["headers"]) > HEADERS_LIMIT:
            return JSONResponse({"detail": f"send headers of at most {HEADERS_LIMIT} bytes"}, status_code=431)
        if not (self.gate.closed or self.config.open or names_this_machine(headers)):
            return JSONResponse({"detail": OTHER_NAME}, status_code=403)
        if path.startswith("/v1") and of_another_site(headers):
            return JSONResponse({"detail": ELSEWHERE}, status_code=403)
        if route not in OPEN:
            key = headers.get("authorization", "").removeprefix("Bearer ")
            session = request.cookies.get(cookie_name(headers.get("host", "")))
            admitted = self.gate.admit(key, needs.scope, session=session, take=take)
            if isinstance(admitted, Refusal):
                request.state.who = admitted.who
                return refused(admitted)
            request.state.who = admitted.name if admitted else "anyone"
        if not _fits(request, needs.body):
            detail = f"send a Content-Length of at most {needs.body} bytes"
            return JSONResponse({"detail": detail}, status_code=413)
        if self.in_flight >= self.config.queue and route not in OPEN:
            return await unavailable(request, Overloaded("too many requests wait"))
        return None


class Answer:
    """The answer to a request on its way to the client.

    Args:
        forward: ASGI's `send`.
        limit_s: seconds in which a replica answers, for the proxy.
        record: is called with the status once, before the client gets anything.
    """

    def __init__(self, forward: Any, limit_s: float, record: Callable[[int], None]):
        self.forward, self.record = forward, record
        self.limit = (TIME_LIMIT, b"%g" % limit_s)
        self.begun = False

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Send a message of the answer, with the headers that every answer has."""
        if message["type"] == "http.response.start":
            self.begun = True
            self.record(message["status"])
            message = {**message, "headers": [*with_headers(message.get("headers", ())), self.limit]}
        await self.forward(message)

    def end(self) -> None:
        """Record a client that left before its answer began."""
        if not self.begun:
            self.record(CLIENT_LEFT)


def _route(request: Request) -> str:
    """Method and route. Only routes that exist: clients can invent paths, and each would be a time series."""
    route = request.scope.get("route")
    return f"{request.method} {route.path}" if route is not None else "unknown"


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
