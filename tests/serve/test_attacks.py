"""Attacks on the proxy by clients without a key and with one: others are answered, and memory has an end."""

from __future__ import annotations

import contextlib
import resource
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator

import httpx
import psutil
import pytest

from cluster.object_store import free_port
from serve.wire import BODY_LIMIT
from tests.serve.conftest import ROOT
from tests.serve.front import BODY_S, CONNECTIONS, HEADERS_S, LARGE_ANSWER, LINGER_S, SECRET

GROWTH_BYTES = 300 * 1024 * 1024
BEARER = b"Authorization: Bearer " + SECRET.encode() + b"\r\n"
IMAGE = 8 * 1024 * 1024


class Front:
    """The process, and what it has when it starts."""

    def __init__(self, port: int, process: psutil.Process):
        self.port, self.process, self.start = port, process, process.memory_info().rss
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"Authorization": f"Bearer {SECRET}"})

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=20)

    def grown(self) -> int:
        return self.process.memory_info().rss - self.start

    def serves_others(self) -> None:
        """Others are answered at once, and memory has not grown too much."""
        started = time.monotonic()
        with httpx.Client() as other:
            bearer = {"Authorization": f"Bearer {SECRET}"}
            url = f"http://127.0.0.1:{self.port}"
            assert other.get(f"{url}/v1/facets", headers=bearer, timeout=10).text == "0"
            assert other.post(f"{url}/v1/search", content=bytes(1000), headers=bearer, timeout=10).text == "1000"
        assert time.monotonic() - started < 5
        assert self.grown() < GROWTH_BYTES


@pytest.fixture(scope="module")
def process() -> Iterator[tuple[int, psutil.Process]]:
    port = free_port()
    server = subprocess.Popen([sys.executable, "-m", "tests.serve.front", str(port)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 200
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            assert time.monotonic() < deadline
            time.sleep(0.1)
        yield port, psutil.Process(server.pid)
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def front(process: tuple[int, psutil.Process]) -> Iterator[Front]:
    front = Front(*process)
    front.serves_others()
    yield front
    front.serves_others()
    front.client.close()


def head(method: str, path: str, *headers: bytes) -> bytes:
    lines = b"".join(header + b"\r\n" for header in (b"Host: localhost", *headers))
    return f"{method} {path} HTTP/1.1\r\n".encode() + lines + b"\r\n"


def all_but_the_end(path: str, length: int, *headers: bytes) -> bytes:
    """A request without the last byte of its body."""
    return head("POST", path, b"Content-Length: %d" % length, *headers) + bytes(length - 1)


@contextlib.contextmanager
def held(front: Front, requests: list[bytes]) -> Iterator[list[socket.socket]]:
    """A connection for each request, as much of it as the service takes within a moment."""
    connections = []
    try:
        for request in requests:
            connections.append(connection := front.connect())
            connection.settimeout(0.3)
            with contextlib.suppress(OSError):
                connection.sendall(request)
        yield connections
    finally:
        for connection in connections:
            connection.close()


def status(connection: socket.socket) -> int:
    connection.settimeout(20)
    answer = b""
    while b"\r\n" not in answer:
        piece = connection.recv(4096)
        if not piece:
            return 0
        answer += piece
    return int(answer.split()[1])


def closed(connection: socket.socket, seconds: float) -> bool:
    """Whether the service closes a connection within some time."""
    connection.settimeout(0.2)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if not connection.recv(65_536):
                return True
        except TimeoutError:
            continue
        except OSError:
            return True
    return False


# --- bodies -----------------------------------------------------------------------------------------------


def test_a_body_that_never_ends_is_refused_by_its_headers(front: Front) -> None:
    paths = ["/v1/images", "/v1/search/image", "/v1/search", "/v1/session", "/", "/nowhere"]
    with held(front, [all_but_the_end(path, 16_777_216) for path in paths * 5]) as connections:  # 480 MB
        assert {status(connection) for connection in connections} == {401, 413}
        front.serves_others()
        assert closed(connections[0], LINGER_S + 3)


def test_120_clients_without_a_key_hold_nothing(front: Front) -> None:
    start = all_but_the_end("/v1/images", 16_777_216)[:1_000_000]
    with held(front, [start] * 120) as connections:
        assert {status(connection) for connection in connections} == {401}
        before = front.process.memory_info().rss
        front.serves_others()
        assert front.process.memory_info().rss - before < 20_000_000


def test_bodies_that_the_service_wants_have_a_limit_over_all_and_a_time(front: Front) -> None:
    with held(front, [all_but_the_end("/v1/images", IMAGE, BEARER.strip())] * 20) as connections:
        front.serves_others()
        assert {status(connection) for connection in connections} <= {408, 503}
        assert front.client.post("/v1/images", content=bytes(IMAGE)).text == str(IMAGE)


def test_small_bodies_that_never_end_make_room_for_others(front: Front) -> None:
    started = time.monotonic()
    with held(front, [all_but_the_end("/v1/search", BODY_LIMIT)] * (CONNECTIONS - 20)) as connections:
        front.serves_others()
        assert {status(connection) for connection in connections[:50]} <= {408, 503}
        assert time.monotonic() - started < BODY_S + 20


def test_a_body_without_a_stated_length_is_not_read(front: Front) -> None:
    for key, expected in ((b"X: x", 401), (BEARER.strip(), 413)):
        with held(front, [head("POST", "/v1/search/image", b"Transfer-Encoding: chunked", key)]) as (connection,):
            assert status(connection) == expected
            connection.settimeout(1)
            piece = b"10000\r\n" + bytes(65_536) + b"\r\n"
            with contextlib.suppress(OSError):
                for _ in range(2_000):  # 130 MB
                    connection.sendall(piece)
            assert closed(connection, LINGER_S + 5)
    front.serves_others()


def test_what_is_no_http_is_answered_with_400(front: Front) -> None:
    chunked = head("POST", "/v1/search", b"Transfer-Encoding: chunked")
    with held(front, [chunked + b"zz\r\n", b"FOO / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\r\n\r\n"]) as connections:
        assert [status(connection) for connection in connections] == [400] * 3
        assert all(closed(connection, 2) for connection in connections)


def test_a_client_that_asks_before_it_sends_is_told(front: Front) -> None:
    waits = head("POST", "/v1/images", b"Content-Length: 1000000", b"Expect: 100-continue")
    with held(front, [waits, waits[:-2] + BEARER + b"\r\n"]) as (unknown, known):
        assert status(unknown) == 401
        assert status(known) == 100
        known.sendall(bytes(1_000_000))
        assert status(known) == 200


def test_the_rest_of_a_refused_body_is_not_awaited(front: Front) -> None:
    with held(front, [head("POST", "/v1/images", b"Content-Length: 1000000")]) as (connection,):
        assert status(connection) == 401
        started = time.monotonic()
        while time.monotonic() < started + LINGER_S + 5:
            time.sleep(0.1)
            try:
                connection.sendall(b"x")
            except OSError:
                break
        assert time.monotonic() < started + LINGER_S + 3


# --- headers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "begin", [b"", b"GET /", b"GET / HTTP/1.1\r\n", b"GET / HTTP/1.1\r\nHost: a\r\nX: ", b"\r\n" * 99]
)
def test_headers_have_a_time_to_arrive(front: Front, begin: bytes) -> None:
    with held(front, [begin]) as (connection,):
        started = time.monotonic()
        while time.monotonic() < started + HEADERS_S + 5:
            time.sleep(0.1)
            try:
                connection.sendall(b"\r\n" if begin == b"\r\n" * 99 else b"x")
            except OSError:
                break
        assert time.monotonic() < started + HEADERS_S + 3


@pytest.mark.parametrize("line", [b"x" * 100, b"a:\r\n" * 25], ids=["one", "many"])
def test_headers_have_a_length(front: Front, line: bytes) -> None:
    start = b"GET / HTTP/1.1\r\nX: x\r\n"
    with held(front, [start + line * 10_000]) as (endless,):
        assert status(endless) == 431
        assert closed(endless, 3)
    with held(front, [start + line * 600] * 200):  # of many clients
        front.serves_others()
    with held(front, [start + b"a:\r\n" * 150 + b"\r\n"] * 100) as connections:  # complete, and then idle
        assert status(connections[-1]) == 200
        front.serves_others()


def test_headers_behind_a_body_are_not_kept(front: Front) -> None:
    with held(front, [head("POST", "/v1/search", b"Transfer-Encoding: chunked") + b"0\r\n" + b"a:\r\n" * 500_000]):
        front.serves_others()


def test_requests_that_do_not_wait_for_answers_have_a_number(front: Front) -> None:
    with held(front, [head("GET", "/v1/facets", BEARER.strip()) * 20_000] * 50):
        front.serves_others()
    two = head("GET", "/v1/facets", BEARER.strip())
    with held(front, [two + two.replace(b"Host", b"Connection: close\r\nHost")]) as (connection,):
        answer = b""
        while piece := connection.recv(4096):
            answer += piece
    assert answer.count(b"HTTP/1.1 200") == 2


# --- connections ------------------------------------------------------------------------------------------


def test_idle_connections_make_room_for_others(front: Front) -> None:
    assert front.client.get("/v1/facets").status_code == 200  # its connection is one of those that wait
    with held(front, [b""] * (3 * CONNECTIONS)):
        for _ in range(20):
            front.serves_others()
        assert len(front.process.net_connections()) <= CONNECTIONS + 5
    with held(front, [head("GET", "/v1/facets", BEARER.strip())] * (2 * CONNECTIONS)):  # that were answered once
        front.serves_others()


@pytest.mark.slow
@pytest.mark.long
def test_twenty_thousand_connections_hold_nothing(front: Front) -> None:
    before, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    held: deque[socket.socket] = deque(maxlen=min(20_000, most - 1_000))  # as many as this process may have at once
    try:
        for number in range(20_000):
            held.append(front.connect())
            if number % 2_000 == 0:
                front.serves_others()
        front.serves_others()
        assert len(front.process.net_connections()) <= CONNECTIONS + 5
    finally:
        for connection in held:
            connection.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (before, most))


def test_a_connection_between_requests_is_closed_after_a_while(front: Front) -> None:
    with held(front, [head("GET", "/v1/facets", BEARER.strip())]) as (connection,):
        assert status(connection) == 200
        started = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() < started + 8:
                time.sleep(0.1)
                connection.sendall(b"\r\n")  # between requests, these mean nothing
        assert time.monotonic() < started + 6


def test_answers_that_nobody_takes_have_a_limit_over_all(front: Front) -> None:
    with held(front, [head("GET", "/v1/large", BEARER.strip())] * 40):
        time.sleep(1)
        front.serves_others()
    assert len(front.client.get("/v1/large").content) == LARGE_ANSWER


def test_a_slow_reader_gets_all_of_its_answer(front: Front) -> None:
    with held(front, [head("GET", "/v1/large", b"Connection: close", BEARER.strip())]) as (connection,):
        connection.settimeout(20)
        read = 0
        while piece := connection.recv(2_000_000):
            read += len(piece)
            time.sleep(0.05)
    assert read > LARGE_ANSWER


# --- whatever Ray would do --------------------------------------------------------------------------------


def test_the_list_of_applications_is_closed_and_there_are_no_websockets(front: Front) -> None:
    answer = front.client.get("/-/routes")
    assert (answer.status_code, answer.headers["cache-control"]) == (404, "no-store")
    upgrade = (b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13")
    with held(front, [head("GET", "/v1/search", *upgrade, b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==")]) as (one,):
        assert status(one) == 403
