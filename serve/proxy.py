"""Middleware of Ray Serve's HTTP proxies: if an ingress replica dies, its requests are retried on another.

Ray answers such a request with 500, because it cannot know whether the request may be repeated. Here every request may:
a search changes nothing, and adding or removing an image twice has the same effect as once. Ray's proxies load this
module because of RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH in their environment (`serve.environment`).
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.middleware import Middleware

ATTEMPTS, PAUSE_S = 5, 0.2
KEPT_BYTES = 16 * 1024 * 1024  # largest body that is kept; a request with a larger or unknown length is sent once


class AskAgain:
    """Keeps a request's body and sends the request again until a replica answers. Responses are streamed unchanged.

    Args:
        app: the ASGI application of the proxy.
    """

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not _can_be_kept(scope):
            await self.app(scope, receive, send)
            return
        body = await _read(receive)
        if body is None:
            return
        started = False

        async def send_and_note(message: dict[str, Any]) -> None:
            nonlocal started
            started = True
            await send(message)

        for attempt in range(ATTEMPTS):
            unread = [{"type": "http.request", "body": body, "more_body": False}]

            async def receive_again(unread: list[dict[str, Any]] = unread) -> dict[str, Any]:
                return unread.pop() if unread else await receive()

            try:
                await self.app(dict(scope), receive_again, send_and_note)
            except Exception:
                if started:
                    raise
            if started:
                return
            await asyncio.sleep(PAUSE_S * (attempt + 1))
        headers = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
        await send({"type": "http.response.start", "status": 503, "headers": headers})
        await send({"type": "http.response.body", "body": b'{"detail": "no replica answers; try again"}'})


def _can_be_kept(scope: dict[str, Any]) -> bool:
    """Whether a request states the length of its body, and that is small. A body without a length may have no end."""
    headers = dict(scope.get("headers", ()))
    length = headers.get(b"content-length", b"0")
    return length.isdigit() and int(length) <= KEPT_BYTES and b"transfer-encoding" not in headers


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


def middlewares() -> list[Middleware]:
    """The middleware that Ray's proxies add."""
    return [Middleware(AskAgain)]
