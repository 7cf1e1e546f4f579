"""In Ray Serve's HTTP proxies: a request whose ingress replica died before it answered is asked of another one.

Ray answers such a request with 500, for it cannot know whether it may be asked twice. Here every request may: a search
changes nothing, and an image that is added or removed twice is added or removed once. Ray's proxies take this from
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.proxy:middlewares in their nodes' environment.
"""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.middleware import Middleware

# What Ray's processes need in their environment before they start.
ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy:middlewares",
    # On a machine that is busy a proxy takes longer than Ray's 5 s to start, and was ended and started again.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # Requests run in a replica's own loop and not in a thread beside it: what takes long is in threads here anyway, and
    # a request costs a third less.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # A replica's threads that wait for work sleep: the cores are another replica's then.
    "OMP_WAIT_POLICY": "PASSIVE",
}
ATTEMPTS, PAUSE_S = 5, 0.2
KEPT_BYTES = 16 * 1024 * 1024  # of a request's body; a larger one, or one of unknown length, is asked once


class AskAgain:
    """Pure ASGI: keeps a request's body, and what the application sends reaches the client as it comes."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        headers = dict(scope.get("headers", ()))
        length = headers.get(b"content-length", b"0")
        known = length.isdigit() and int(length) <= KEPT_BYTES and b"transfer-encoding" not in headers
        if scope["type"] != "http" or not known:  # a body without a length may have no end
            await self.app(scope, receive, send)
            return
        kept, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            kept += message.get("body", b"")
            more = message.get("more_body", False)
        body = bytes(kept)
        started = False

        async def watched(message: dict[str, Any]) -> None:
            nonlocal started
            started = True
            await send(message)

        for attempt in range(ATTEMPTS):
            unread = [{"type": "http.request", "body": body, "more_body": False}]

            async def again(unread: list[dict[str, Any]] = unread) -> dict[str, Any]:
                return unread.pop() if unread else await receive()

            try:
                await self.app(dict(scope), again, watched)
            except Exception:
                if started:
                    raise
            if started:
                return
            await asyncio.sleep(PAUSE_S * (attempt + 1))
        told = [(b"content-type", b"application/json"), (b"retry-after", b"1")]
        await send({"type": "http.response.start", "status": 503, "headers": told})
        await send({"type": "http.response.body", "body": b'{"detail": "no replica answers; come again"}'})


def middlewares() -> list[Middleware]:
    return [Middleware(AskAgain)]
