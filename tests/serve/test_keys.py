"""Keys, limits and the log of who asked, over HTTP."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import random
import socket
from pathlib import Path

import httpx
import pytest
import ray
from PIL import Image

from ceca.data import schema
from serve.wire import BODY_LIMIT
from tests.conftest import own_processes
from tests.serve.conftest import Running
from tests.serve.dataset import QUERY


def requests_of(running: Running) -> list[tuple[str, str]]:
    """A request of every route that the description lists, and of some that it does not."""
    bearer = {"Authorization": f"Bearer {running.keys['portal']}"}
    paths = running.client.get("/closed/openapi.json", headers=bearer).json()["paths"]
    listed = [(method.upper(), path) for path, methods in paths.items() for method in methods]
    filled = [
        (method, path.replace("{image_id}", schema.image_id("0000.jpg")).replace("{job}", "add-" + "0" * 16))
        for method, path in listed
    ]
    return [
        *filled,
        ("GET", "/"),
        ("GET", "/page.js"),
        ("GET", "/openapi.json"),
        ("GET", "/nowhere"),
        ("POST", "/"),
        ("PUT", "/v1/images"),
    ]


def test_every_route_is_closed_without_the_right_key_but_those_that_tell_nothing_of_a_person(running: Running) -> None:
    asked = requests_of(running)
    assert ("POST", "/v1/search") in asked
    opened = []
    for method, path in asked:
        writes = (method == "DELETE" and "images" in path) or "jobs" in path or (method, path) == ("POST", "/v1/images")
        other = running.keys["portal" if writes else "loader"]  # opens other routes
        for key, status in ((None, 401), ("guessed", 401), (other, 403)):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            response = running.client.request(method, f"/closed{path}", headers=headers, content="{")
            if response.status_code != status:
                opened.append((method, path))
                break
            assert response.json()["detail"]
    assert sorted(opened) == [
        ("DELETE", "/v1/session"),
        *(("GET", path) for path in ("/", "/healthz", "/page.js", "/readyz")),
        ("POST", "/v1/session"),
    ]


def test_a_key_opens_and_a_session_opens_pictures_for_a_browser(running: Running) -> None:
    bearer = {"Authorization": f"Bearer {running.keys['portal']}"}
    found = running.client.post("/closed/v1/search", json={"query": QUERY, "top_k": 1}, headers=bearer).json()
    picture = f"{running.url}/closed{found['hits'][0]['image']}"
    with httpx.Client() as visitor:
        assert visitor.get(picture).status_code == 401
        assert visitor.post(f"{running.url}/closed/v1/session", json={"key": "guessed"}).status_code == 401
        answer = visitor.post(f"{running.url}/closed/v1/session", json={"key": running.keys["portal"]})
        assert answer.status_code == 204
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert "secure" not in cookie  # it came by plain HTTP
        behind = {"X-Forwarded-Proto": "https"}  # TLS ended at a load balancer
        url, key = f"{running.url}/closed/v1/session", {"key": running.keys["portal"]}
        assert "secure" in httpx.post(url, json=key, headers=behind).headers["set-cookie"].lower()
        assert visitor.get(picture).status_code == 200
        assert running.keys["portal"] not in cookie
        assert visitor.delete(f"{running.url}/closed/v1/session").status_code == 204
        assert visitor.get(picture).status_code == 401
        visitor.headers["Cookie"] = cookie.partition(";")[0]
        assert visitor.get(picture).status_code == 401  # also for whoever has a copy


def test_a_key_has_a_limit_of_its_own(running: Running) -> None:
    bearer = {"Authorization": f"Bearer {running.keys['slow']}"}
    answers = [running.client.get("/closed/v1/facets", headers=bearer) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 31


def test_who_searched_is_logged_and_the_words_are_not(running: Running) -> None:
    words = "a woman with a very particular umbrella"
    bearer = {"Authorization": f"Bearer {running.keys['portal']}"}
    hits = running.client.post("/closed/v1/search", json={"query": words}, headers=bearer).json()["hits"]
    running.client.get("/closed/v1/facets", headers={"Authorization": "Bearer guessed"})
    (file,) = running.audit.iterdir()
    text = file.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    mine = [line for line in lines if line.get("query") == hashlib.sha256(words.encode()).hexdigest()[:16]]
    assert len(mine) == 1
    assert mine[0]["who"] == "portal"
    assert mine[0]["images"] == [hit["image_id"] for hit in hits]
    assert any(line["status"] == 401 and line["action"] == "GET /v1/facets" for line in lines)
    assert words not in text
    assert not any(key in text for key in running.keys.values())
    assert file.stat().st_mode & 0o777 == 0o600
    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"  # which others may read
    assert not any('"who"' in found.read_text(errors="replace") for found in logs.glob("worker-*"))


@pytest.mark.parametrize("size", [64 * 1024 + 1, 10_000_000])
def test_a_body_that_is_too_long_is_refused_before_it_is_read(running: Running, size: int) -> None:
    response = running.client.post("/v1/search", content=json.dumps({"query": "x" * size}))
    assert response.status_code == 413
    response = running.client.post("/v1/search", content=iter([b'{"query": "a man"}']))  # does not say how long it is
    assert response.status_code == 413


def test_rays_proxy_has_the_limits(running: Running) -> None:
    """Those of tests/serve/test_attacks.py, which has no Ray: here they are in Ray's own process."""
    bearer = {"Authorization": f"Bearer {running.keys['both']}"}
    content = io.BytesIO()
    Image.frombytes("RGB", (200, 200), random.Random(0).randbytes(120_000)).save(content, "PNG")
    assert len(content.getvalue()) > BODY_LIMIT  # so a replica is asked before it is read
    found = running.client.post("/closed/v1/search/image", content=content.getvalue(), headers=bearer)
    assert found.status_code == 200
    refused = running.client.post("/closed/v1/search/image", content=content.getvalue())
    assert refused.status_code == 401
    assert running.client.get("/-/routes").status_code == 404
    assert running.client.get("/-/healthz").text == "success"
    (process,) = own_processes("ProxyActor")
    before, port = process.memory_info().rss, int(running.url.rpartition(":")[2])
    begin = b"POST /closed/v1/images HTTP/1.1\r\nHost: localhost\r\nContent-Length: 16777216\r\n\r\n"
    many = b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 300 + b"\r\n"
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 10)) for _ in range(40)]
        for client in clients:
            client.sendall(begin)
        assert {client.recv(12) for client in clients} == {b"HTTP/1.1 401"}
        for client in clients:
            client.settimeout(0.5)
            with contextlib.suppress(OSError):
                client.sendall(bytes(16_777_215))
        assert running.client.get("/v1/facets").status_code == 200
        assert process.memory_info().rss - before < 100_000_000
        curious = stack.enter_context(socket.create_connection(("127.0.0.1", port), 10))
        curious.sendall(many)
        assert curious.recv(12) == b"HTTP/1.1 431"
