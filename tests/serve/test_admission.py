"""What the application lets in, by headers alone; sessions; headers of every answer; the log of every answer."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from ceca.config import ServeConfig
from ceca.data import schema
from ceca.data.store import Store
from ceca.errors import UserError
from serve.access import Gate, Key
from serve.api import make_api
from serve.audit import LINE_LIMIT, Collector, audit, audit_folder, close_audit, open_audit
from serve.sessions import SESSION_S, Sessions, cookie_name
from serve.wire import ADMITTED, ASK, HEADERS
from tests.ceca.datasets.test_costs import scan_bomb
from tests.serve.dataset import QUERY, draw_person
from tests.serve.inside import InProcess

SECRETS = {"portal": "portal-secret", "boss": "boss-secret"}
KEYS = tuple(
    Key(name, hashlib.sha256(SECRETS[name].encode()).hexdigest(), scopes, 100_000)  # type: ignore[arg-type]
    for name, scopes in (("portal", ("search",)), ("boss", ("search", "write", "admin")))
)
PICTURE = f"/v1/images/{schema.image_id('0000.jpg')}"
BOSS = {"Authorization": f"Bearer {SECRETS['boss']}"}


@pytest.fixture(scope="module")
def service(people: Store) -> InProcess:
    return InProcess(people, ServeConfig(), ())


@functools.cache
def replica(service: InProcess, keys: tuple[Key, ...], is_open: bool, number: int) -> FastAPI:
    return make_api(service, ServeConfig(open=is_open), Gate(keys, secret=b"of all replicas"))


def client(
    service: InProcess, keys: tuple[Key, ...] = (), url: str = "http://localhost:8000", open: bool = False, at: int = 0
) -> Any:
    """A browser of its own, on an ingress replica."""
    application = replica(service, keys, open, at)
    service.gate = application.state.gate
    return TestClient(application, url, raise_server_exceptions=False)


# --- whom it answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8000", "LOCALHOST", "127.0.0.1:80", "127.8.9.1", "[::1]:8000"]
)
def test_without_keys_it_answers_to_the_names_of_this_machine(service: InProcess, host: str) -> None:
    assert client(service).get("/v1/facets", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", "192.168.0.7:8000"),
        *("0.0.0.0:8000", "[::]:8000", "[::1", "127.0.0.1:8000@evil.example", "localhost:8000/", "", "127.0.0.1:x"),
    ],
)
def test_without_keys_it_answers_to_no_other_name(service: InProcess, host: str) -> None:
    for method, path in (("GET", "/v1/facets"), ("GET", "/"), ("DELETE", PICTURE), ("GET", "/openapi.json")):
        answer = client(service).request(method, path, headers={"Host": host})
        assert (answer.status_code, "localhost" in answer.json()["detail"]) == (403, True), path
    for settings in ({"keys": KEYS}, {"open": True}):  # the page is for everybody then
        assert client(service, **settings).get("/", headers={"Host": host}).status_code == 200


ELSEWHERE: list[dict[str, str]] = [
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "http://localhost:3000"},  # another port is another site, though its pages have the cookie
    {"Origin": "http://localhost"},
    {"Origin": "http://localhost:8000.evil.example"},
    {"Origin": "http://evil.example@localhost:8000"},
    {"Origin": "chrome-extension://localhost:8000"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "Cross-Site"},
    {"Sec-Fetch-Site": "something new"},
    {"Sec-Fetch-Site": "same-origin", "Origin": "http://evil.example"},
]


@pytest.mark.parametrize("headers", ELSEWHERE, ids=str)
@pytest.mark.parametrize("settings", [{}, {"open": True}, {"keys": KEYS}], ids=["loopback", "open", "keys"])
def test_a_page_of_another_site_gets_nothing_of_v1(
    service: InProcess, headers: dict[str, str], settings: dict[str, Any]
) -> None:
    visitor = client(service, **settings)
    if "keys" in settings:
        assert visitor.post("/v1/session", json={"key": SECRETS["boss"]}).status_code == 204
    for key in ({}, BOSS):
        for method, path in (
            *(("POST", "/v1/images?summary=a"), ("DELETE", PICTURE), ("GET", PICTURE), ("GET", "/v1/status")),
            *(("POST", "/v1/session"), ("DELETE", "/v1/session"), ("OPTIONS", "/v1/search"), ("GET", "/v1")),
        ):
            content = draw_person(3) if "images?" in path else b'{"key": "boss-secret"}'
            answer = visitor.request(method, path, content=content, headers={**headers, **key})
            assert answer.status_code == 403, (method, path)
            assert "another site" in answer.json()["detail"]
            assert "set-cookie" not in answer.headers
            assert "access-control-allow-origin" not in answer.headers
    assert visitor.get("/", headers=headers).status_code == 200  # a link to the page may be anywhere


@pytest.mark.parametrize(
    ("url", "headers"),
    [
        ("http://localhost:8000", {"Origin": "http://localhost:8000", "Sec-Fetch-Site": "same-origin"}),
        ("http://localhost:8000", {"Sec-Fetch-Site": "none"}),  # the address was typed
        ("http://ceca.example", {"Origin": "https://ceca.example"}),  # TLS ended before the service
        ("http://ceca.example", {"Origin": "https://CECA.example:443"}),
        ("http://ceca.example:80", {"Origin": "http://ceca.example"}),
    ],
)
def test_its_own_page_is_let_in(service: InProcess, url: str, headers: dict[str, str]) -> None:
    answer = client(service, open=True, url=url).post("/v1/search", json={"query": QUERY}, headers=headers)
    assert answer.status_code == 200


def test_an_origin_or_host_that_is_there_twice_is_of_another_site(service: InProcess) -> None:
    twice = [("Origin", "http://localhost:8000"), ("Origin", "http://localhost:8000")]
    assert client(service, open=True).get("/v1/facets", headers=twice).status_code == 403
    hosts = [("Host", "localhost"), ("Host", "evil.example")]
    assert client(service).get("/v1/facets", headers=hosts).status_code == 403


def test_there_are_no_websockets(service: InProcess) -> None:
    for path in ("/v1/search", "/"):
        with pytest.raises(WebSocketDisconnect), client(service).websocket_connect(path):
            pass


# --- headers of answers -----------------------------------------------------------------------------------


def test_every_answer_has_the_headers_that_browsers_obey(service: InProcess) -> None:
    visitor = client(service)
    for method, path, status in (
        *(("GET", "/v1/facets", 200), ("GET", "/v1/nothing", 404), ("PUT", "/v1/search", 405), ("GET", "/", 200)),
        *(("POST", "/v1/search", 422), ("GET", "/healthz", 200), ("GET", PICTURE, 200), ("GET", "/v1/facets/", 404)),
        *(("GET", "/healthz/", 404), ("DELETE", "/v1/session", 204)),
    ):
        answer = visitor.request(method, path, follow_redirects=False)
        assert answer.status_code == status, path
        assert "location" not in answer.headers
        kept = path in ("/", PICTURE)
        assert answer.headers["cache-control"] == (
            "no-store" if not kept else "no-cache" if path == "/" else "private, max-age=3600"
        )
        assert {name.decode() for name in HEADERS} <= set(answer.headers)
        assert answer.headers["x-content-type-options"] == "nosniff"
    for refused in (visitor.get("/", headers={"Host": "evil"}), client(service, KEYS).get("/v1/facets")):
        assert refused.headers["cache-control"] == "no-store"


def test_an_error_of_the_service_is_an_answer_like_the_others(
    service: InProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail() -> Any:
        raise ZeroDivisionError("a secret")

    monkeypatch.setattr(service, "status", fail)
    answer = client(service).get("/v1/status")
    assert (answer.status_code, answer.headers["cache-control"]) == (500, "no-store")
    assert "secret" not in answer.text


# --- sessions ---------------------------------------------------------------------------------------------


def begin(visitor: TestClient, name: str = "portal") -> str:
    """Begin a session → its cookie's value."""
    answer = visitor.post("/v1/session", json={"key": SECRETS[name]})
    assert answer.status_code == 204
    return answer.cookies[cookie_name("localhost:8000")]


def test_a_cookie_is_a_session_and_not_the_key(service: InProcess) -> None:
    visitor = client(service, KEYS)
    answer = visitor.post("/v1/session", json={"key": SECRETS["portal"]})
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith("ceca_session_8000=")
    assert SECRETS["portal"] not in cookie
    assert hashlib.sha256(SECRETS["portal"].encode()).hexdigest() not in cookie
    attributes = {part.strip().lower() for part in cookie.split(";")[1:]}
    assert {"httponly", "samesite=strict", f"max-age={SESSION_S}"} <= attributes
    assert not any(part.startswith(("path", "domain", "secure")) for part in attributes)  # so: the folder /v1
    assert visitor.get(PICTURE).status_code == 200
    assert visitor.get("/v1/status").status_code == 403  # its key is not for that
    again = client(service, KEYS, "https://ceca.example").post("/v1/session", json={"key": SECRETS["portal"]})
    assert again.headers["set-cookie"].startswith("ceca_session=")
    assert "secure" in again.headers["set-cookie"].lower()
    assert "set-cookie" not in client(service).post("/v1/session", json={"key": "any"}).headers


def test_a_session_holds_on_every_replica_until_it_is_ended_on_one(service: InProcess) -> None:
    first, second = client(service, KEYS, at=1), client(service, KEYS, at=2)
    session = begin(first)
    stolen = {"Cookie": f"ceca_session_8000={session}"}
    assert second.get("/v1/facets", headers=stolen).status_code == 200
    service.gate = second.app.state.gate  # type: ignore[attr-defined]
    out = second.delete("/v1/session", headers=stolen)
    assert out.status_code == 204
    assert "max-age=0" in out.headers["set-cookie"].lower()
    assert out.headers["clear-site-data"] == '"cache"'
    assert second.get("/v1/facets", headers=stolen).status_code == 401
    service.gate = first.app.state.gate  # type: ignore[attr-defined]
    asyncio.run(service.tell_ended())  # as every replica does each `follow_s`
    assert first.get("/v1/facets").status_code == 401
    assert begin(first) != session
    assert first.get("/v1/facets").status_code == 200


def test_only_sessions_that_the_service_made_count() -> None:
    now = [1_000.0]
    sessions = Sessions(b"secret", clock=lambda: now[0])
    session = sessions.begin("portal")
    assert sessions.key(session, KEYS) is KEYS[0]
    assert sessions.key(session, KEYS[1:]) is None  # its key was taken back
    assert Sessions(b"other", clock=lambda: now[0]).key(session, KEYS) is None
    number, end, signature = session.split(".")
    for forged in (
        *("", ".", "..", "...", SECRETS["portal"], KEYS[0].sha256, f"{number}.{int(end) + 9}.{signature}"),
        *(f"{number}.{end}.", f"x.{end}.{signature}", f"{number}.{end}.{signature}.", f"{number}.²{end}.{signature}"),
        *(f"{number}.{'9' * 5_000}.{signature}", f"{number}.-1.{signature}", f"{number}.{end}.\xff\ud800"),
    ):
        assert sessions.key(forged, KEYS) is None, forged
    now[0] += SESSION_S
    assert sessions.key(session, KEYS) is None
    sessions.ended["old"] = 1
    assert sessions.merge({"older": 2, "new": 10**6}) == {"new": 10**6}


def test_neither_a_key_nor_a_session_is_taken_in_the_others_place(service: InProcess) -> None:
    visitor = client(service, KEYS)
    session = begin(visitor)
    visitor.cookies.clear()
    for headers in (
        {"Cookie": f"ceca_session_8000={SECRETS['portal']}"},
        {"Cookie": f"ceca_key={SECRETS['portal']}"},
        {"Authorization": f"Bearer {session}"},
        {"Cookie": f"ceca_session={session}"},  # of another port
        {"Cookie": f"ceca_session_9000={session}"},
    ):
        assert visitor.get("/v1/facets", headers=headers).status_code == 401, headers


# --- images -----------------------------------------------------------------------------------------------


def test_images_that_take_long_to_decode_keep_nobody_waiting(service: InProcess) -> None:
    visitor, bomb = client(service), scan_bomb(7_000)
    started = time.perf_counter()
    for _ in range(10):
        for path in ("/v1/search/image", "/v1/images?summary=a"):
            answer = visitor.post(path, content=bomb)
            assert (answer.status_code, answer.json()["detail"][0]["type"]) == (422, "costly_image")
    assert visitor.get(PICTURE).status_code == 200
    assert time.perf_counter() - started < 3


# --- asked by the proxy -----------------------------------------------------------------------------------


def test_the_proxy_learns_whether_a_request_would_be_let_in(service: InProcess) -> None:
    slow = Key("slow", hashlib.sha256(b"slow").hexdigest(), ("search",), 1)
    application = make_api(service, ServeConfig(), Gate((slow,)))

    def ask(length: bytes, key: bytes, asked: bool = True) -> tuple[int, bool]:
        headers = [(b"content-length", length), (b"authorization", b"Bearer " + key), (b"host", b"localhost")]
        scope = {"type": "http", "method": "POST", "path": "/v1/search/image", "query_string": b"", "root_path": ""}
        scope |= {"headers": headers, "scheme": "http", "extensions": {ASK: {}} if asked else {}}
        sent: list[Any] = []

        async def receive() -> Any:
            assert not asked, "the body is not read"
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        asyncio.run(application(scope, receive, send))
        return sent[0]["status"], (ADMITTED, b"1") in sent[0]["headers"]

    for _ in range(3):  # asking takes nothing from the key's limit
        assert ask(b"1000000", b"slow") == (204, True)
    assert ask(b"100000000", b"slow") == (413, False)
    assert ask(b"1000000", b"guessed") == (401, False)
    assert ask(b"0", b"slow", asked=False) == (422, False)
    assert ask(b"1000000", b"slow") == (429, False)


# --- the log ----------------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Any]:
    """The lines that the log gets."""
    path = open_audit(str(tmp_path / "audit"))
    yield lambda: [json.loads(line) for line in path.read_text().splitlines()]
    close_audit()


def test_every_answer_is_logged_once(service: InProcess, log: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    visitor = client(service, KEYS)
    words = "a woman with a very particular umbrella"
    image_id = PICTURE.rpartition("/")[2]
    monkeypatch.setattr(service, "status", lambda: 1 / 0)
    asked = [
        ("POST", "/v1/search", 200, "boss", {"json": {"query": words}}),
        ("POST", "/v1/search", 422, "boss", {"json": {"query": ""}}),
        ("POST", "/v1/search", 422, "boss", {"json": {"query": words, "where": {"hat": ["cap"]}}}),
        ("GET", "/v1/facets", 200, "boss", {}),
        ("GET", "/v1/facets", 401, "unknown", {"headers": {"Authorization": "Bearer guessed"}}),
        ("GET", "/v1/status", 500, "boss", {}),
        ("GET", "/v1/status", 403, "portal", {"headers": {"Authorization": f"Bearer {SECRETS['portal']}"}}),
        ("GET", PICTURE, 200, "boss", {}),
        ("GET", f"/v1/images/{'0' * 16}", 404, "boss", {}),
        ("GET", "/v1/jobs/add-0000000000000000", 404, "boss", {}),
        ("DELETE", f"/v1/images/{'0' * 16}", 404, "boss", {}),
        ("PUT", "/v1/search", 405, "boss", {}),
        ("GET", "/nowhere", 404, "boss", {}),
        ("POST", "/v1/search", 413, "boss", {"content": b"x" * 70_000}),
        ("GET", "/v1/facets", 431, "anyone", {"headers": {"X": "x" * 40_000}}),
        ("GET", "/v1/facets", 403, "anyone", {"headers": {"Origin": "http://evil.example"}}),
        ("POST", "/v1/session", 204, "portal", {"json": {"key": SECRETS["portal"]}}),
        ("POST", "/v1/session", 401, "unknown", {"json": {"key": "guessed"}}),
        ("DELETE", "/v1/session", 204, "portal", {}),
        ("GET", "/", 200, "anyone", {}),
        ("GET", "/healthz", 200, "anyone", {}),
        ("GET", "/openapi.json", 200, "boss", {}),
    ]
    for method, path, status, _, options in asked:
        assert visitor.request(method, path, **{"headers": BOSS, **options}).status_code == status, path
    lines = log()
    assert [(line["action"], line["status"], line["who"]) for line in lines] == [
        (f"{method} {path}", status, who) for method, path, status, who, _ in asked
    ]
    assert lines[0]["query"] == hashlib.sha256(words.encode()).hexdigest()[:16]
    assert len(lines[0]["images"]) == 10
    assert lines[7]["images"] == [image_id]
    text = json.dumps(lines)
    assert words not in text
    assert not any(secret in text for secret in (*SECRETS.values(), "guessed"))


def test_a_client_that_leaves_is_logged(service: InProcess, log: Any) -> None:
    application = make_api(service, ServeConfig(), Gate(KEYS))
    scope = {"type": "http", "method": "POST", "path": "/v1/search/image", "query_string": b"", "root_path": ""}
    headers = [(b"content-length", b"9"), (b"host", b"localhost"), (b"authorization", BOSS["Authorization"].encode())]

    async def receive() -> Any:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise OSError("gone")

    asyncio.run(application({**scope, "headers": headers, "scheme": "http"}, receive, send))
    (line,) = log()
    assert (line["who"], line["status"]) == ("boss", 499)


def test_a_line_has_a_limit_whatever_is_sent(service: InProcess, log: Any, tmp_path: Path) -> None:
    visitor = client(service, KEYS)
    for path in ("/v1/images/" + "0" * 60_000, "/" + "%F0%9F%98%80" * 2_000, "/v1/images/" + "%0a" * 9_000):
        assert visitor.get(path, headers=BOSS).status_code in (404, 422)
        assert visitor.get(path).status_code == 401
    assert visitor.request("X" * 9_000, "/", headers=BOSS).status_code == 405
    audit("w" * 9_000, "GET /", 200, {"images": ["i" * 999] * 5_000, "query": "q" * 9_000})
    audit("w", "POST /v1/search", 200, {"images": ["0" * 16] * 5_000})
    (file,) = (tmp_path / "audit").iterdir()
    assert max(map(len, file.read_bytes().splitlines())) <= LINE_LIMIT
    assert log()[-2].keys() >= {"who", "action", "status", "cut"}
    assert (len(log()[-1]["images"]), log()[-1]["more_images"]) == (200, 4_800)


def test_a_collector_prints_each_line_once_also_of_a_file_that_was_renamed(tmp_path: Path) -> None:
    first, collector = open_audit(str(tmp_path / "audit")), Collector(tmp_path / "audit")
    audit("ada", "POST /v1/search", 200, {})
    assert [json.loads(line)["who"] for line in collector.lines()] == ["ada"]
    assert not list(collector.lines())
    audit("bob", "POST /v1/search", 200, {})
    first.rename(f"{first}.1")  # as when a file is full
    with first.open("w") as file:
        file.write('{"who": "eve"}\n{"who": "half')
    assert sorted(json.loads(line)["who"] for line in collector.lines()) == ["bob", "eve"]
    with first.open("a") as file:
        file.write('"}\n')
    assert [json.loads(line)["who"] for line in collector.lines()] == ["half"]
    Path(f"{first}.1").unlink()
    assert not list(collector.lines())


def test_only_the_services_user_can_read_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    earlier = os.umask(0)
    try:
        monkeypatch.setattr("serve.audit.FILE_LIMIT", 2_000)
        path = open_audit(str(tmp_path / "a" / "audit"))
        for number in range(300):
            audit("who", f"GET /{number}", 200, {})
        close_audit()
    finally:
        os.umask(earlier)
    files = list(path.parent.iterdir())
    assert len(files) == 11
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert audit_folder("") == tmp_path / "home" / ".local" / "state" / "ceca" / "audit"


def test_a_folder_that_others_can_change_is_refused(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").write_text("")
    for name, says in (("theirs", "others can write"), ("link", "a link"), ("file", "set `audit`")):
        with pytest.raises(UserError, match=re.escape(says)):
            audit_folder(str(tmp_path / name))
    if os.geteuid() == 0:
        os.chown(tmp_path / "theirs", 12345, 12345)
        (tmp_path / "theirs").chmod(0o700)
        with pytest.raises(UserError, match="others can write"):
            audit_folder(str(tmp_path / "theirs"))
