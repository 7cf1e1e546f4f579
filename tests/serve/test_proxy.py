"""Requests in front of replicas: asked again where one dies, never kept without an end, and only if they are ours."""

from __future__ import annotations

import asyncio
import contextlib
import pickle
from typing import Any

import pytest
import uvicorn.config
from ray.serve._private.http_util import start_asgi_http_server
from ray.serve._private.proxy import HTTPProxy
from ray.serve._private.proxy_request_response import ASGIProxyRequest
from ray.serve._private.proxy_router import ProxyRouter
from ray.serve.config import HTTPOptions

from ceca.config import ServeConfig
from cluster.object_store import free_port
from serve import proxy
from serve.proxy import LARGE_BYTES, AskAgain, Bodies, Front, Full, Room, middlewares
from serve.wire import ADMITTED, ASK, BODY_LIMIT, INGRESS, TIME_LIMIT
from tests.serve.front import Proxy

PIECE = b"x" * 1024


def send_to(
    app: Any, headers: dict[bytes, bytes], pieces: int, path: str = "/", kind: str = "http"
) -> tuple[int, list[dict[str, Any]]]:
    """Send a request in `pieces` pieces → how many were read, and the answer."""
    read, sent = 0, []

    async def receive() -> dict[str, Any]:
        nonlocal read
        if read >= pieces:
            await asyncio.Event().wait()  # as a client that waits for its answer
        read += 1
        return {"type": "http.request", "body": PIECE, "more_body": read < pieces}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(app({"type": kind, "path": path, "headers": list(headers.items())}, receive, send))
    return read, sent


async def refuse(scope: Any, receive: Any, send: Any) -> None:
    """As the ingress refuses what it does not read."""
    await send({"type": "http.response.start", "status": 413, "headers": []})


async def admit(scope: Any, receive: Any, send: Any) -> None:
    """As the ingress lets a request in if it is asked, and answers it with its length."""
    if ASK in scope.get("extensions", {}):
        await send({"type": "http.response.start", "status": 204, "headers": [(ADMITTED, b"1")]})
        await send({"type": "http.response.body", "body": b""})
        return
    body = (await receive())["body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"%d" % len(body)})


@pytest.mark.parametrize(
    "headers",
    [
        {b"transfer-encoding": b"chunked"},
        {b"transfer-encoding": b"chunked", b"content-length": b"3"},
        {b"content-length": str(BODY_LIMIT + 1).encode()},
        {b"content-length": b"9" * 5_000},
        {b"content-length": "²".encode("latin-1")},
        {b"content-length": b"-1"},
    ],
    ids=str,
)
def test_a_body_without_a_length_or_a_large_one_is_not_read_before_the_service_wants_it(headers: Any) -> None:
    read, sent = send_to(AskAgain(refuse, Room()), headers, pieces=10**6)
    assert (read, [message["status"] for message in sent]) == (0, [413])


def test_a_large_body_is_read_when_the_service_wants_it() -> None:
    length = BODY_LIMIT + 1024
    read, sent = send_to(AskAgain(admit, Room()), {b"content-length": str(length).encode()}, pieces=length // 1024)
    assert read == length // 1024
    assert [message.get("body") for message in sent] == [None, str(length).encode()]
    read, sent = send_to(AskAgain(admit, Room()), {b"content-length": str(LARGE_BYTES + 1).encode()}, pieces=10**6)
    assert (read, sent[0]["status"]) == (0, 503)


def test_a_request_is_asked_again_with_its_body_until_a_replica_answers() -> None:
    bodies: list[bytes] = []

    async def dies_once(scope: Any, receive: Any, send: Any) -> None:
        bodies.append((await receive())["body"])
        if len(bodies) == 1:
            raise RuntimeError("the replica is gone")
        await refuse(scope, receive, send)

    read, sent = send_to(AskAgain(dies_once, Room()), {b"content-length": b"3072"}, pieces=3)
    assert read == 3
    assert bodies == [3 * PIECE] * 2
    assert len(sent) == 1


def test_the_question_whether_a_body_is_wanted_is_asked_again_too() -> None:
    asked: list[bool] = []

    async def dies_every_other_time(scope: Any, receive: Any, send: Any) -> None:
        asked.append(ASK in scope.get("extensions", {}))
        if len(asked) % 2:
            raise RuntimeError("the replica is gone")
        await admit(scope, receive, send)

    length = BODY_LIMIT + 1024
    _, sent = send_to(
        AskAgain(dies_every_other_time, Room()), {b"content-length": str(length).encode()}, pieces=length // 1024
    )
    assert asked == [True, True, False, False]
    assert sent[-1]["body"] == str(length).encode()


class Hangs:
    """Replicas of an application: the first request is answered, the next `count` never, like those of dead processes.

    Args:
        count: requests without an answer.
        pause_s: between beginning and end of the others' answers.
    """

    def __init__(self, count: int, pause_s: float = 0.0):
        self.count, self.pause_s = count, pause_s
        self.given_up: list[bytes] = []  # their bodies

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = (await receive())["body"]
        if scope["path"] == "/hang" and len(self.given_up) < self.count:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:  # as Ray: it answers a client that has left, and its task ends quietly
                self.given_up.append(body)
                await send({"type": "http.response.start", "status": 499, "headers": []})
                await send({"type": "http.response.body", "body": b""})
                return
        await send({"type": "http.response.start", "status": 200, "headers": [(TIME_LIMIT, b"0.05"), (b"a", b"b")]})
        await asyncio.sleep(self.pause_s)
        await send({"type": "http.response.body", "body": body})

    def ask(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Ask twice → both answers."""
        service = AskAgain(self, Room())
        length = {b"content-length": b"1024"}
        return send_to(service, length, 1)[1], send_to(service, length, 1, "/hang")[1]


def test_a_replica_that_does_not_answer_is_given_up_when_its_own_limit_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "LATE_S", 0.05)
    monkeypatch.setattr(proxy, "PAUSE_S", 0.0)
    replicas = Hangs(count=1)
    first, second = replicas.ask()
    assert first[0]["headers"] == [(b"a", b"b")]  # the limit is not for the client
    assert second == first
    assert replicas.given_up == [PIECE]

    replicas = Hangs(count=100)
    start, body = replicas.ask()[1]
    assert start["status"] == 503
    assert (b"retry-after", b"1") in start["headers"]
    assert b"no replica answers" in body["body"]
    assert len(replicas.given_up) == proxy.ATTEMPTS


def test_an_answer_that_has_begun_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "LATE_S", 0.05)
    replicas = Hangs(count=0, pause_s=0.2)
    assert [message.get("body") for message in replicas.ask()[1]] == [None, PIECE]


def test_a_body_that_arrives_too_slowly_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "BODY_S", 0.05)

    async def ask() -> list[Any]:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "path": "/", "headers": [(b"content-length", b"9")]}
        front = AskAgain(admit, Room())
        await front(scope, asyncio.Event().wait, send)
        assert (front.room.small.kept, front.room.small.arriving) == (0, {})
        return sent

    start, body = asyncio.run(ask())
    assert start["status"] == 408
    assert (b"connection", b"close") in start["headers"]
    assert b"in time" in body["body"]


def test_the_body_that_has_arrived_longest_makes_room() -> None:
    async def work() -> None:
        bodies, whole = Bodies(100), asyncio.Event()

        async def arrives() -> dict[str, Any]:
            await whole.wait()
            return {"type": "http.request", "body": b"x"}

        async def keep(length: int) -> bytes | None:
            async with bodies.keep(arrives, length) as body:
                return body

        first, second = asyncio.create_task(keep(60)), asyncio.create_task(keep(40))
        await asyncio.sleep(0)
        third = asyncio.create_task(keep(50))
        await asyncio.sleep(0.01)
        with pytest.raises(Full):
            await first
        whole.set()
        assert await second == await third == b"x"
        async with bodies.keep(arrives, 60):  # what is at work is never given up
            with pytest.raises(Full):
                await keep(50)
            assert await keep(40) == b"x"
        left = asyncio.create_task(keep(100))
        whole.clear()
        await asyncio.sleep(0)
        left.cancel()
        with pytest.raises(asyncio.CancelledError):
            await left
        assert (bodies.kept, bodies.arriving) == (0, {})

    asyncio.run(work())


def test_only_our_requests_are_changed() -> None:
    inner = Proxy(admit, {"/other": "Ingress", "/ceca": INGRESS})
    headers = {
        b"x-request-timeout-seconds": b"0",
        b"X-Request-Disconnect-Disabled".lower(): b"?1",
        b"serve_multiplexed_model_id": b"\xff",
        b"x-session-id": b"\xff",
        b"x-session_id": b"\xff",
        b"traceparent": b"\xff",
        b"x-request-id": b"\xff" * 500,
        b"accept": b"*/*",
    }
    send_to(Front(inner), headers, 1, "/ceca/v1/facets")
    assert inner.seen[0]["headers"] == [(b"accept", b"*/*")]
    send_to(Front(inner), {b"x-request-id": b"mine-1"}, 1, "/ceca")
    assert inner.seen[0]["headers"] == [(b"x-request-id", b"mine-1")]
    trace = {b"traceparent": b"00-" + b"ab" * 16 + b"-" + b"cd" * 8 + b"-01"}
    send_to(Front(inner), trace, 1, "/ceca")
    assert inner.seen[0]["headers"] == list(trace.items())
    for path in ("/other/v1/facets", "/nowhere"):
        send_to(Front(inner), headers, 1, path)
        assert inner.seen[0]["headers"] == list(headers.items())
        large = {b"content-length": str(10 * LARGE_BYTES).encode()}
        _, sent = send_to(Front(inner), large, 1, path)
        assert sent[0]["status"] == 200
        assert ASK not in inner.seen[0].get("extensions", {})


def test_the_largest_image_that_settings_allow_fits() -> None:
    assert ServeConfig(image_bytes_limit=LARGE_BYTES)
    with pytest.raises(ValueError, match="image_bytes_limit"):
        ServeConfig(image_bytes_limit=LARGE_BYTES + 1)


def test_each_application_has_a_time_limit_of_its_own() -> None:
    async def replica(scope: Any, receive: Any, send: Any) -> None:
        limit = {"/a": b"20", "/b": b"0.5"}[scope["path"]]
        await send({"type": "http.response.start", "status": 200, "headers": [(TIME_LIMIT, limit)]})
        await send({"type": "http.response.body", "body": b""})

    front = Front(Proxy(replica, {"/a": INGRESS, "/b": INGRESS}))
    for path in ("/a", "/b", "/a"):
        send_to(front, {}, 1, path)
    assert {prefix: service.limit_s for prefix, service in front.services.items()} == {"/a": 20, "/b": 0.5}


def test_what_is_rays_own_is_closed() -> None:
    inner = Proxy(admit, {"/": INGRESS})
    _, sent = send_to(Front(inner), {}, 1, "/-/routes")
    assert sent[0]["status"] == 404
    assert send_to(Front(inner), {}, 1, "/v1/search", "websocket")[1] == [{"type": "websocket.close", "code": 1008}]
    assert not inner.seen


def test_rays_server_takes_the_middleware_and_the_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own code without a cluster, in which names are used that no interface promises."""
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", "")  # put back afterwards
    inner, port = Proxy(admit, {"/": INGRESS}), free_port()

    async def serve_and_ask() -> tuple[bytes, bytes]:
        options = HTTPOptions(host="127.0.0.1", port=port)
        options.middlewares.extend(middlewares())  # as `configure_http_middlewares` does
        running, server = await start_asgi_http_server(inner, options, event_loop=asyncio.get_running_loop())
        answers = []
        for headers in (b"Content-Length: 70000\r\nX-Session-Id: a\r\n", b"a: b\r\n" * 300):
            reader, writer = await _connect(port)
            writer.write(b"POST / HTTP/1.1\r\nConnection: close\r\n" + headers + b"\r\n" + bytes(70_000))
            answers.append(await reader.read())
            writer.close()
        server.should_exit = True
        await running
        return answers[0], answers[1]

    admitted, refused = asyncio.run(serve_and_ask())
    assert admitted.startswith(b"HTTP/1.1 200")
    assert b"70000" in admitted
    assert b"x-session-id" not in dict(inner.seen[0]["headers"])
    assert refused.startswith(b"HTTP/1.1 431")


async def _connect(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    for _ in range(100):
        with contextlib.suppress(OSError):
            return await asyncio.open_connection("127.0.0.1", port)
        await asyncio.sleep(0.05)
    raise TimeoutError


def test_rays_proxy_has_what_the_middleware_relies_on() -> None:
    assert callable(ProxyRouter.match_route)
    assert "proxy_router" in HTTPProxy.__init__.__code__.co_varnames
    scope = {"type": "http", "path": "/", "headers": [], "extensions": {ASK: {}}}
    sent = pickle.loads(ASGIProxyRequest(scope, None, None).serialized_replica_arg("proxy"))
    assert sent.asgi_scope == scope
