"""An S3 server's bad days: a proxy before a real one, which refuses, cuts and delays on demand."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web
from yarl import URL

SLOW_DOWN = "<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
UNEQUAL = "<Error><Code>PreconditionFailed</Code><Message>A condition did not hold.</Message></Error>"
EXPIRED = "<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
SKEWED = (
    "<Error><Code>RequestTimeTooSkewed</Code>"
    "<Message>The difference between the request time and the current time is too large.</Message></Error>"
)
OF_ONE_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "date", "server"}


@dataclass
class Faults:
    """What goes wrong; may be changed at any time.

    conditions: writes with If-Match and If-None-Match are compared, as AWS does and rclone does not.
    refuse: share of requests that are answered 503. cut: the first read of every object, or of every range of one,
    ends in its middle. delay_s: before every answer. deny: every request is answered 403 with this.
    """

    conditions: bool = False
    refuse: float = 0.0
    cut: bool = False
    delay_s: float = 0.0
    deny: str = ""
    happened: Counter[str] = field(default_factory=Counter)


class Proxy:
    def __init__(self, behind: str, faults: Faults):
        self.behind, self.faults = behind, faults
        self.random = random.Random(0)
        self.read: set[tuple[str, str]] = set()
        self.tags: dict[str, str] = {}  # of the objects written through this proxy
        self.writing = asyncio.Lock()
        self.session: aiohttp.ClientSession

    async def answer(self, request: web.Request) -> web.StreamResponse:
        faults = self.faults
        content = await request.read()
        faults.happened["requests"] += 1
        await asyncio.sleep(faults.delay_s)
        if faults.deny:
            return web.Response(status=403, text=faults.deny, content_type="application/xml")
        if self.random.random() < faults.refuse:
            faults.happened["refused"] += 1
            return web.Response(status=503, text=SLOW_DOWN, content_type="application/xml")
        if faults.conditions and request.method in ("PUT", "DELETE"):
            async with self.writing:
                return await self.write_if(request, content)
        return await self.forward(request, content)

    async def write_if(self, request: web.Request, content: bytes) -> web.StreamResponse:
        tag, wanted = self.tags.get(request.path), request.headers.get("If-Match")
        if (wanted is not None and wanted != tag) or (request.headers.get("If-None-Match") == "*" and tag is not None):
            self.faults.happened["unequal"] += 1
            return web.Response(status=412, text=UNEQUAL, content_type="application/xml")
        answer = await self.forward(request, content)
        self.tags.pop(request.path, None)
        if request.method == "PUT" and answer.status == 200:
            self.tags[request.path] = answer.headers["ETag"]
        return answer

    async def forward(self, request: web.Request, content: bytes) -> web.StreamResponse:
        faults = self.faults
        headers = {name: value for name, value in request.headers.items() if name.lower() not in OF_ONE_CONNECTION}
        target = URL(self.behind + request.raw_path, encoded=True)  # as it was signed
        skipped = ("Accept", "Accept-Encoding", "User-Agent", "Content-Type")
        async with self.session.request(
            request.method, target, headers=headers, data=content or None, skip_auto_headers=skipped
        ) as found:
            body = await found.read()
            kept = [(name, value) for name, value in found.headers.items() if name.lower() not in OF_ONE_CONNECTION]
            key = (request.path, request.headers.get("Range", ""))
            is_read = request.method == "GET" and found.status in (200, 206) and "list-type" not in request.query
            if faults.cut and is_read and len(body) > 1 and key not in self.read:
                self.read.add(key)
                faults.happened["cut"] += 1
                answer = web.StreamResponse(status=found.status, headers=dict(kept))
                await answer.prepare(request)
                await answer.write(body[: len(body) // 2])
                assert request.transport is not None
                request.transport.close()
                return answer
            if request.method == "HEAD":
                answer = web.StreamResponse(status=found.status, headers=dict(kept))
                await answer.prepare(request)
                return answer
            return web.Response(status=found.status, headers=dict(kept), body=body)


@contextmanager
def before(endpoint: str) -> Iterator[tuple[str, Faults]]:
    """A proxy before this endpoint while the context lasts: its own endpoint, and what goes wrong there."""
    faults, started = Faults(), threading.Event()
    loop = asyncio.new_event_loop()
    address = ""

    async def serve() -> web.AppRunner:
        nonlocal address
        proxy = Proxy(endpoint, faults)
        proxy.session = aiohttp.ClientSession(auto_decompress=False)
        application = web.Application(client_max_size=2**30)
        application.router.add_route("*", "/{path:.*}", proxy.answer)
        application.on_cleanup.append(lambda _: proxy.session.close())
        runner = web.AppRunner(application, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    def work() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(serve())
        started.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())

    thread = threading.Thread(target=work)
    thread.start()
    try:
        assert started.wait(20)
        yield address, faults
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
