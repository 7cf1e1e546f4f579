"""A process like one of Ray's proxies: uvicorn with our connections and middleware, and an application behind it.

    python -m tests.serve.front PORT

Ray's own part is replaced by `Proxy`, which takes bodies from the client as eagerly as Ray does. Times are short.
"""

from __future__ import annotations

import asyncio
import hashlib
import sys
from types import SimpleNamespace
from typing import Any

import uvicorn
from starlette.responses import Response

from ceca.config import ServeConfig
from serve import connections, proxy
from serve.access import Gate, Key
from serve.admission import Admission
from serve.wire import INGRESS

SECRET = "secret-of-the-test"
CONNECTIONS = 500
HEADERS_S = LINGER_S = 0.5
BODY_S = 1.0
LARGE_ANSWER = 32 * 1024 * 1024  # more than the kernel takes


class Nothing:
    """Metrics of nobody."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *_: Any, **__: Any) -> None: ...


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the length of the body, or with much."""
    length, more = 0, True
    while more:
        message = await receive()
        length, more = length + len(message.get("body", b"")), message.get("more_body", False)
    content = bytes(LARGE_ANSWER) if scope["path"] == "/v1/large" else str(length).encode()
    await Response(content)(scope, receive, send)


class Proxy:
    """As `HTTPProxy` of Ray Serve: a task puts all that the client sends into a queue, whether it is wanted or not."""

    def __init__(self, app: Any, names: dict[str, str]):
        self.app = app
        self.proxy_router = SimpleNamespace(match_route=lambda path: self.match(path))
        self.names = names  # prefix → deployment
        self.seen: list[dict[str, Any]] = []

    def match(self, path: str) -> Any:
        for prefix, name in self.names.items():
            if path.startswith(prefix):
                return prefix, SimpleNamespace(deployment_id=SimpleNamespace(name=name)), False
        return None

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        self.seen = [scope]  # the last one
        queue: asyncio.Queue[Any] = asyncio.Queue()

        async def pull() -> None:
            while True:
                await queue.put(message := await receive())
                if message["type"] == "http.disconnect":
                    return

        pulling = asyncio.create_task(pull())
        try:
            await self.app(scope, queue.get, send)
        finally:
            pulling.cancel()


def make_front() -> proxy.Front:
    """The middleware over an application with a key."""
    key = Key("both", hashlib.sha256(SECRET.encode()).hexdigest(), ("search", "write"), 10**9)
    admission = Admission(application, ServeConfig(keys="-"), Gate((key,)), Nothing())  # type: ignore[arg-type]
    return proxy.Front(Proxy(admission, {"/other": "Other", "/": INGRESS}))


def main() -> None:
    connections.HEADERS_S, connections.LINGER_S, proxy.BODY_S = HEADERS_S, LINGER_S, BODY_S
    proxy.BODY_BYTES_PER_S = 2**40
    proxy.middlewares()
    connections.Connection.limit = CONNECTIONS
    uvicorn.run(make_front(), port=int(sys.argv[1]), log_level="critical", timeout_keep_alive=1)


if __name__ == "__main__":
    main()
