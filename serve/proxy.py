"""Middleware of Ray Serve's HTTP proxies: what is decided before a request reaches an ingress replica.

- A large body is read only if the service wants it: a replica first answers for the headers alone, so that a client
  without a key sends nothing that is kept. Bodies have a time to arrive, and a limit over all.
- If an ingress replica dies, its requests are retried on another. Ray answers such a request with 500, because it
  cannot know whether the request may be repeated. Here every request may: a search changes nothing, and adding or
  removing an image twice has the same effect as once.
- If a replica does not answer at all, the same is done. Every replica says how long it takes at most (`TIME_LIMIT`).
  Ray itself would wait for ever for a process that hangs.
- Headers by which clients could steer Ray are removed, and Ray's list of applications is closed.

Ray's proxies load this module because of RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH in their environment
(`serve.environment`). Requests to other applications of the cluster pass unchanged.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from typing import Any

from starlette.middleware import Middleware

from serve import connections
from serve.wire import ADMITTED, ASK, BODY_LIMIT, INGRESS, TIME_LIMIT, with_headers

ATTEMPTS, PAUSE_S = 5, 0.2
LATE_S = 5.0  # beyond a replica's own limit, which does not hold for all that it does
# Bodies of at most BODY_LIMIT are read at once, others when they are wanted. All that arrive or wait for an answer:
SMALL_BYTES, LARGE_BYTES = 32 * 1024 * 1024, 64 * 1024 * 1024
BODY_S, BODY_BYTES_PER_S = 10.0, 64 * 1024  # time for a body to arrive, and that much more for a large one
# Headers with which Ray lets a client switch time limits off, keep a request at work after the client has left, or
# choose a replica. Ray fails at values that are not UTF-8.
OF_RAY = {
    *(b"x-request-timeout-seconds", b"x-request-disconnect-disabled", b"serve-multiplexed-model-id"),
    b"x-session-id",
}
# Headers that Ray may have in a form that it can read.
USABLE = {
    b"x-request-id": re.compile(rb"[!-~]{1,100}"),
    b"traceparent": re.compile(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]"),
}


class Full(Exception):
    """There is no room for a body at the moment."""


class Bodies:
    """Keeps bodies, each until its request is answered. If room runs out, the one that has arrived longest is given up.

    Args:
        limit: most bytes of all bodies together, as their requests state them.
    """

    def __init__(self, limit: int):
        self.limit, self.kept = limit, 0
        self.arriving: dict[asyncio.Timeout, int] = {}

    @contextlib.asynccontextmanager
    async def keep(self, receive: Any, length: int) -> AsyncIterator[bytes | None]:
        """Read a body, and keep it until the block ends. None if the client leaves.

        Raises:
            TimeoutError: it does not arrive in time.
            Full: there is no room, or others needed it.
        """
        body = await self._arrive(receive, length)
        self.kept += length
        try:
            yield body
        finally:
            self.kept -= length

    async def _arrive(self, receive: Any, length: int) -> bytes | None:
        async with asyncio.timeout(BODY_S + length / BODY_BYTES_PER_S) as end:
            self._make_room(length)
            self.arriving[end] = length
            try:
                return await _read(receive)
            except asyncio.CancelledError:
                if end not in self.arriving:  # `_make_room` took it out
                    raise Full from None
                raise
            finally:
                self.arriving.pop(end, None)

    def _make_room(self, length: int) -> None:
        while self.kept + sum(self.arriving.values()) + length > self.limit:
            if not self.arriving:
                raise Full
            oldest = next(iter(self.arriving))
            del self.arriving[oldest]
            oldest.reschedule(0)


@dataclasses.dataclass
class Room:
    """The bodies of all requests of a proxy."""

    small: Bodies = dataclasses.field(default_factory=lambda: Bodies(SMALL_BYTES))
    large: Bodies = dataclasses.field(default_factory=lambda: Bodies(LARGE_BYTES))


class AskAgain:
    """Reads the body of a request, if the service wants it, and sends the request again until a replica answers.

    Answers are streamed, and only the header `TIME_LIMIT` is taken out.

    Args:
        app: the ASGI application of the proxy.
        room: where bodies are kept.
    """

    def __init__(self, app: Any, room: Room):
        self.app, self.room = app, room
        self.limit_s: float | None = None  # in which replicas answer, as the last answer stated it

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        length = _length(scope)
        large = length is None or length > BODY_LIMIT
        if large and not await self._wanted(scope, send):
            return
        try:
            async with (self.room.large if large else self.room.small).keep(receive, length or 0) as body:
                if body is not None:
                    await self._ask(scope, body, receive, send)
        except TimeoutError:
            await _answer(send, 408, "the body of the request did not arrive in time")
        except Full:
            await _answer(send, 503, "too many large requests; try again")

    async def _wanted(self, scope: dict[str, Any], send: Any) -> bool:
        """Ask a replica whether a request would be let in. If not, its answer goes to the client."""
        wanted = False

        async def send_refusal(message: dict[str, Any]) -> None:
            nonlocal wanted
            wanted = wanted or any(name == ADMITTED for name, _ in message.get("headers", ()))
            if not wanted:
                await send(message)

        extensions = {**(scope.get("extensions") or {}), ASK: {}}
        await self._ask({**scope, "extensions": extensions}, b"", _wait_for_ever, send_refusal)
        return wanted

    async def _ask(self, scope: dict[str, Any], body: bytes, receive: Any, send: Any) -> None:
        """Send a request until a replica answers."""
        for attempt in range(ATTEMPTS):
            if await self._attempt(scope, body, receive, send):
                return
            await asyncio.sleep(PAUSE_S * (attempt + 1))
        await _answer(send, 503, "no replica answers; try again")

    async def _attempt(self, scope: dict[str, Any], body: bytes, receive: Any, send: Any) -> bool:
        """Send a request to one replica. Returns whether it answered in time."""
        started = False
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> dict[str, Any]:
            return unread.pop() if unread else await receive()

        async def send_and_note(message: dict[str, Any]) -> None:
            nonlocal started
            if end.expired():  # what Ray says about a request that was given up
                return
            if not started:
                started = True
                end.reschedule(None)  # a client may take its time for a long answer
            if message["type"] == "http.response.start":
                message = {**message, "headers": self._note_limit(message.get("headers", ()))}
            await send(message)

        try:
            async with asyncio.timeout(None if self.limit_s is None else self.limit_s + LATE_S) as end:
                await self.app(dict(scope), receive_again, send_and_note)
        except Exception:
            if started:
                raise
        return started

    def _note_limit(self, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """Note the limit that a replica states. Returns the headers for the client, without it."""
        passed = []
        for name, value in headers:
            if name == TIME_LIMIT:
                self.limit_s = float(value)
            else:
                passed.append((name, value))
        return passed


class Front:
    """Sorts requests by the application that they are for.

    Args:
        app: the ASGI application of the proxy.
    """

    def __init__(self, app: Any):
        self.app, self.room = app, Room()
        self.services: dict[str, AskAgain] = {}  # by the path below which each answers
        while not hasattr(app, "proxy_router"):  # of Ray's own application, below its middleware
            app = app._app
        self.router = app.proxy_router

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        prefix = self._ours(path)
        if path == "/-/routes":
            await _answer(send, 404, "this list is closed")
        elif prefix is None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            if prefix not in self.services:
                self.services[prefix] = AskAgain(self.app, self.room)
            headers = [(name, value) for name, value in scope["headers"] if _passes(name, value)]
            await self.services[prefix]({**scope, "headers": headers}, receive, send)

    def _ours(self, path: str) -> str | None:
        """The path below which our service answers this request; None if another application does."""
        found = self.router.match_route(path)
        return found[0] if found is not None and found[1].deployment_id.name == INGRESS else None


def _passes(name: bytes, value: bytes) -> bool:
    """Whether a header goes on to Ray."""
    if name in USABLE:
        return USABLE[name].fullmatch(value) is not None
    return name.replace(b"_", b"-") not in OF_RAY


def _length(scope: dict[str, Any]) -> int | None:
    """The stated length of a body; None if it is not stated or no number."""
    headers = dict(scope.get("headers", ()))
    length = headers.get(b"content-length", b"0")
    return int(length) if b"transfer-encoding" not in headers and re.fullmatch(rb"[0-9]{1,15}", length) else None


async def _read(receive: Any) -> bytes | None:
    """The whole body of a request; None if the client has gone."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)


async def _wait_for_ever() -> Any:
    await asyncio.Event().wait()


async def _answer(send: Callable[[dict[str, Any]], Awaitable[None]], status: int, detail: str) -> None:
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    headers += [(b"retry-after", b"1")] if status == 503 else []
    await send({"type": "http.response.start", "status": status, "headers": with_headers(headers)})
    await send({"type": "http.response.body", "body": json.dumps({"detail": detail}).encode()})


def middlewares() -> list[Middleware]:
    """The middleware that Ray's proxies add. They call this before they listen."""
    connections.install()
    return [Middleware(Front)]
