"""Requests of every kind: those that Schemathesis makes from the service's own description, and hostile ones by hand.

Thousands go to the application in this process, over the real code without Ray; fewer to the real service over HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import http.client
import itertools
import json
import re
import socket
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import strategies as st
from schemathesis import Case, HookContext
from schemathesis.config import SchemathesisConfig
from schemathesis.core.failures import Failure
from schemathesis.core.transport import Response
from schemathesis.engine import Status, events, from_schema
from schemathesis.schemas import BaseSchema

from ceca.config import DialogueConfig, OpenAIConfig, ServeConfig
from ceca.data import schema as tables
from ceca.data.store import Store
from ceca.settings import to_mapping
from serve.access import Gate, Key
from serve.admission import HEADERS_LIMIT
from serve.api import make_api
from tests.serve.conftest import COUNT, TEXT_LIMIT, TOP_K_LIMIT, Changing, Running
from tests.serve.dataset import draw_person, publish_gallery, publish_people, publish_tiny
from tests.serve.inside import InProcess
from tests.serve.test_search import bomb

SECRET = "secret-of-the-test"
IMAGES = [draw_person(number) for number in range(100, 106)]  # none of the gallery
IDS = [tables.image_id(f"{number:04d}.jpg") for number in range(COUNT - 1)]
DELETED = "does not come back"  # said of an image that was deleted
GROWTH_BYTES = 8 * 1024 * 1024  # that a process may take more after 800 hostile requests

for kind in ("jpeg", "png", "webp", "bmp"):
    schemathesis.openapi.media_type(f"image/{kind}", st.sampled_from(IMAGES))


# --- from the description ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["open", pytest.param("closed", marks=pytest.mark.slow)])
def application(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    """The application over a dataset of its own, to which images can be added without a summary."""
    store = Store(str(tmp_path_factory.mktemp("fuzzed")))
    asked = DialogueConfig(engine="openai", openai=OpenAIConfig(base_url="http://nowhere.invalid/v1", model="chat"))
    publish_people(store, COUNT, to_mapping(asked, results_only=True))
    publish_gallery(store, *publish_tiny(store, "tiny", seed=1), "tiny")
    config = ServeConfig(
        top_k_limit=TOP_K_LIMIT,
        text_limit=TEXT_LIMIT,
        open=request.param == "open",
        engine_url="http://nowhere.invalid/v1",
    )
    key = Key("both", hashlib.sha256(SECRET.encode()).hexdigest(), ("search", "write", "admin"), 10**9)
    keys = (key,) if request.param == "closed" else ()
    return make_api(InProcess(store, config, keys), config, Gate(keys))


def settings(examples: int, key: str, *, answers: bool) -> dict[str, Any]:
    """Arguments of Schemathesis' loaders: the same cases at every run, `examples` of each route besides the edge cases.

    `answers`: cases take values from answers to others, such as a deleted image's id.
    """
    headers = {"Authorization": f"Bearer {key}"}
    phase = {"extra-data-sources": {"responses": answers}}
    found = {
        "seed": 1,
        "headers": headers,
        "continue-on-failure": True,
        "cache": {"enabled": False},
        "generation": {"max-examples": examples, "deterministic": True, "database": "none"},
        "phases": {"coverage": phase, "fuzzing": phase, "stateful": {"enabled": False}},
    }
    return {"config": SchemathesisConfig.from_dict(found), "headers": headers}


def fuzz(description: BaseSchema, *, erase: bool) -> Counter[int | None]:
    """How many cases were answered with each status; fails at the first that is not as the description says.

    Valid cases are often of what the gallery has; `erase`: images of it as well.
    """

    @description.hook
    def map_case(context: HookContext, case: Case) -> Case:
        if case.meta is None or not case.meta.generation.mode.is_positive:
            return case
        body = case.body if isinstance(case.body, dict) else {}
        for part in (case.path_parameters, body):
            if part and part.get("image_id") == "null":  # from another answer; Schemathesis takes it for a valid one
                part["image_id"] = "0" * 16
            number = int(part["image_id"], 16) if part and part.get("image_id") else 0
            if number % 3 and (erase or case.method != "DELETE"):
                part["image_id"] = IDS[number % len(IDS)]
        for name, known in (
            ("where", {"camera": ["c1"]}),
            ("answers", {"upper_colour": "red"}),
            ("facet", "upper_colour"),
        ):
            if body.get(name):  # the description cannot say which there are
                body[name] = known
        for given in (body, case.query or {}):
            given.pop("min_confidence", None)  # needs a model whose validation split was evaluated
        if (case.query or {}).get("where"):
            case.query["where"] = json.dumps({"camera": ["c1"]})
        return case

    @description.hook
    def filter_failure(context: HookContext, failure: Failure, case: Case, response: Response) -> bool:
        return DELETED not in response.text  # nor that an image was deleted by another case

    statuses: Counter[int | None] = Counter()
    problems = []
    for event in from_schema(description).execute():
        if isinstance(event, events.NonFatalError | events.FatalError):
            problems.append(str(getattr(event, "value", None) or event.exception))
        if not isinstance(event, events.ScenarioFinished):
            continue
        record = event.recorder
        for asked in record.interactions.values():
            statuses[asked.response.status_code if asked.response else None] += 1
        for case, checks in record.checks.items():
            for check in checks:
                if check.status == Status.FAILURE and check.failure_info:
                    answer = record.interactions[case].response
                    said = answer.content[:300] if answer else b""
                    info = check.failure_info
                    problems.append(f"{event.label} {check.name}: {info.failure}\n{info.code_sample[:600]}\n{said!r}")
    assert not problems, "\n\n".join([f"{len(problems)} problems", *problems[:5]])
    return statuses


def test_hundreds_of_cases_are_answered_as_described(application: FastAPI) -> None:
    description = schemathesis.openapi.from_asgi("/openapi.json", application, **settings(20, SECRET, answers=True))
    statuses = fuzz(description, erase=True)
    assert statuses.total() > 600
    assert {200, 202, 404, 405, 422} <= set(statuses)
    assert not {None, 400, 500, 503} & set(statuses)


def fuzz_over_http(running: Running, changing: Changing, examples: int, *prefixes: str) -> int:
    """Fuzz the applications below these prefixes; return the number of cases. Images that were added are taken out."""
    total = 0
    for prefix in prefixes:
        given = settings(examples, running.keys["both"], answers=False)
        description = schemathesis.openapi.from_url(f"{running.url}{prefix}/openapi.json", **given)
        if not prefix:  # whose gallery other tests rely on
            description = description.exclude(method=["POST", "DELETE"], path_regex="^/v1/images")
        statuses = fuzz(description, erase=False)
        assert {200, 404, 405, 422} <= set(statuses)
        assert not {None, 400, 429, 500, 503} & set(statuses)
        total += statuses.total()
    for content in IMAGES:
        answer = changing.client.post("/v1/images", content=content)
        if DELETED in answer.text:
            continue
        done = changing.finished(answer.json()["job"])
        assert done["status"] == "done", done  # whatever was said of it, it came in
        gone = changing.client.delete(f"/v1/images/{done['image_id']}")
        assert gone.status_code == 202, gone.text
        assert changing.finished(gone.json()["job"])["status"] == "done"
    return total


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_thousands_of_cases_over_http_are_answered_as_described(running: Running, changing: Changing) -> None:
    assert fuzz_over_http(running, changing, 250, "", "/closed") > 3_000


# --- by hand ----------------------------------------------------------------------------------------------

TO_JSON = "Content-Type: application/json"


def raw(
    method: str,
    target: str | bytes,
    body: bytes = b"",
    *headers: str | bytes,
    length: str | None = None,
    host: bytes = b"localhost",
) -> bytes:
    """A request as it goes over the wire, however wrong. `length` "" leaves Content-Length out."""
    lines = [b"Host: " + host, *(header if isinstance(header, bytes) else header.encode() for header in headers)]
    if length != "":
        lines.append(b"Content-Length: " + (length or str(len(body))).encode())
    path = target if isinstance(target, bytes) else target.encode()
    return b"\r\n".join([method.encode() + b" " + path + b" HTTP/1.1", *lines, b"Connection: close", b"", body])


def search(body: str | bytes, *headers: str | bytes) -> bytes:
    content = body if isinstance(body, bytes) else body.encode()
    return raw("POST", "/v1/search", content, TO_JSON, *headers)


def man(**more: str) -> bytes:
    """A search with more members, whose values are JSON, or what looks like it."""
    members = ['"query": "a man"', *(f'"{name}": {value}' for name, value in more.items())]
    return search("{" + ", ".join(members) + "}")


def upload(query: str | bytes = "", content: bytes = IMAGES[0], path: str = "/v1/search/image") -> bytes:
    return raw("POST", path.encode() + b"?" + (query if isinstance(query, bytes) else query.encode()), content)


GARBAGE = b"\xff\xfe\xc3\x28"
NUMBERS = [
    "NaN",
    "Infinity",
    "-Infinity",
    "1e999",
    "-1",
    "1" + "0" * 400,
    "9" * 5_000,
    "true",
    '"3"',
    "[]",
    "{}",
    "1.5",
]
NUMBERS_IN_QUERY = ["NaN", "inf", "-inf", "1e999", "-1", "9" * 5_000, "0x1", "", "%00", "%ff", "%E0%A5%AA", "1&{}=x"]
PATHS = ["/v1/images/../../etc/passwd", "/v1/images/..%2f..%2fetc%2fpasswd", "/v1/images/%2e%2e/%2e%2e/etc/passwd"]
PATHS += [
    "/page.js/../../api.py",
    "/..%00/",
    "/v1/images/%00",
    f"/v1/images/{'0' * 16}%00",
    f"/v1/images/{'0' * 16}%0a",
]
PATHS += [
    "/v1/jobs/delete-..%2f..%2fx",
    "/v1/jobs/delete-%00",
    "//v1/facets",
    "/v1/images/%ff%fe",
    "/%",
    "/v1/\\..\\..",
]
PATHS += [f"/v1/images/{'0' * 20_000}", "/v1/facets;x", "/closed/../v1/facets", "/closed/%2e%2e/v1/facets"]

# Refused by the service, in JSON.
REFUSED: dict[str, bytes] = {
    "10 MB of text": search('{"query": "%s"}' % ("x" * 10_000_000)),
    "60 kB of text": search('{"query": "%s"}' % ("x" * 60_000)),
    "60 kB of spaces": search('{"query": "%s"}' % (" " * 60_000)),
    "10,000 lists": search("[" * 10_000 + "]" * 10_000),
    "10,000 objects": search('{"a":' * 10_000 + "1" + "}" * 10_000),
    "10,000 lists never closed": search("[" * 10_000),
    "10,000 lists in a condition": man(where="[" * 10_000 + "]" * 10_000),
    "500 lists in a condition": man(where="[" * 500 + "]" * 500),
    "half a pair as query": search(r'{"query": "\ud800"}'),
    "half a pair as member": search(r'{"query": "a man", "\udc00": 1}'),
    "half a pair as facet": man(where=r'{"\udc00": ["x"]}'),
    "half a pair as value": man(where=r'{"camera": ["\udc00"]}'),
    "half a pair in an answer": man(answers=r'{"\udc00": "\udc00"}'),
    "null byte in JSON": search(b'{"query": "a\0man"}'),
    "null character as facet": man(where=r'{"\u0000": ["c1"]}'),
    "not UTF-8": search(b'{"query": "\xff\xfe"}'),
    "unknown facet": man(where='{"hat": ["cap"]}'),
    "unknown value": man(where='{"camera": ["c9"]}'),
    "unknown answer": man(answers='{"hat": "cap"}'),
    "no values": man(where='{"camera": []}'),
    "null as value": man(where='{"camera": [null]}'),
    "unknown member": man(weight="1"),
    "a member twice, the last one wrong": search('{"query": "a man", "query": 7}'),
    "a form": raw("POST", "/v1/search", b"query=a+man", "Content-Type: application/x-www-form-urlencoded"),
    "XML": raw("POST", "/v1/search", b"<query/>", "Content-Type: text/xml"),
    "no type": raw("POST", "/v1/search", b'{"query": "a man"}'),
    "garbage as type": raw("POST", "/v1/search", b'{"query": "a man"}', b"Content-Type: \xff/;;=;charset=\xff"),
    "an image as JSON": search(IMAGES[0]),
    "JSON as an image": upload(content=b'{"query": "a man"}'),
    "compressed": search(b"\x1f\x8b\x08", "Content-Encoding: gzip"),
    **{f"{body or 'nothing'} as body": search(body) for body in ("", "null", "[]", '"a man"', "1", "NaN")},
    "longer than it says": raw("POST", "/v1/search", b'{"query": "a man"}', TO_JSON, length="5"),
    "10 GB to come": raw("POST", "/v1/search", b"{", TO_JSON, length=str(10**10)),
    "chunks": raw("POST", "/v1/search", b"2\r\n{}\r\n0\r\n\r\n", TO_JSON, "Transfer-Encoding: chunked", length=""),
    **{f"top_k {value[:9]} {len(value)}": man(top_k=value) for value in [*NUMBERS, "-0", "1e300"]},
    **{f"offset {value[:9]} {len(value)}": man(offset=value) for value in NUMBERS},
    **{f"omega {value[:9]} {len(value)}": man(omega=value) for value in NUMBERS},
    **{f"?top_k={value[:9]} {len(value)}": upload(f"top_k={value}".format("top_k")) for value in NUMBERS_IN_QUERY},
    **{f"?omega={value[:9]} {len(value)}": upload(f"omega={value}".format("omega")) for value in NUMBERS_IN_QUERY},
    "?identity=2**53": upload(f"summary=a&identity={2**53}", path="/v1/images"),
    "?name= of 301": upload(f"summary=a&name={'x' * 301}", path="/v1/images"),
    "?camera=": upload("summary=a&camera=", path="/v1/images"),
    "?time=noon": upload("summary=a&time=noon", path="/v1/images"),
    "?time= before the year 1": upload("summary=a&time=0001-01-01T00:00%2B05:00", path="/v1/images"),
    "a range of time that ends before it begins": man(where='{"time": ["2027..2026"]}'),
    "no image": upload(content=b""),
    "the start of an image": upload(content=IMAGES[0][:20]),
    "half an image": upload(content=IMAGES[0][: len(IMAGES[0]) // 2]),
    "half an image to add": upload("summary=a", IMAGES[4][: len(IMAGES[4]) // 2], "/v1/images"),
    "another format": upload(content=b"GIF89a" + bytes(100)),
    "a bomb": upload(content=bomb()),
    "a bomb to add": upload("summary=a", bomb(), "/v1/images"),
    **{f"{method} /v1/search": raw(method, "/v1/search") for method in ("GET", "PUT", "PATCH", "DELETE", "OPTIONS")},
    **{f"{method} /v1/search": raw(method, "/v1/search") for method in ("TRACE", "CONNECT", "PROPFIND")},
    "PUT an image": raw("PUT", f"/v1/images/{'0' * 16}"),
    "a header of 100 kB": raw("GET", "/v1/facets", b"", "X-Long: " + "x" * 100_000),
    "5,000 headers": raw("GET", "/v1/facets", b"", *(f"X-{number}: x" for number in range(5_000))),
    "a cookie of 100 kB": raw("GET", "/v1/facets", b"", "Cookie: " + "a=b; " * 20_000),
    **{path[:40]: raw("GET", path) for path in PATHS},
    "garbage as tag of an image": raw("GET", f"/v1/images/{'0' * 16}", b"", b'If-None-Match: \xff"""*'),
    "garbage as key": raw("GET", "/closed/v1/facets", b"", b"Authorization: Bearer " + GARBAGE),
    "empty key": raw("GET", "/closed/v1/facets", b"", "Authorization:"),
    "a password": raw("GET", "/closed/v1/facets", b"", "Authorization: Basic Zm9vOmJhcg=="),
    "a key of 20 kB": raw("GET", "/closed/v1/facets", b"", "Authorization: Bearer " + "x" * 20_000),
    "garbage as cookies": raw(
        "GET", "/closed/v1/facets", b"", b'Cookie: \xff=;;"=\\777; ceca_key="\\3\\999\xff"; =; $'
    ),
    "another host": raw("GET", "/closed/v1/facets", host=b"evil/healthz?"),
    **{f"host {host!r}": raw("GET", "/v1/facets", host=host) for host in (b"[", b"a b", b"\xff", b"x:99999999")},
    "a session of Chinese": raw("POST", "/v1/session", '{"key": "钥匙"}'.encode(), TO_JSON),
    "a session of half a pair": raw("POST", "/closed/v1/session", rb'{"key": "\ud800"}', TO_JSON),
    "a session with a header": raw("POST", "/v1/session", rb'{"key": "a\r\nSet-Cookie: x=y"}', TO_JSON),
}
# Refused by the HTTP server, in its own words, before the service sees them.
NO_HTTP: dict[str, bytes] = {
    **{
        f"length {value}": raw("POST", "/v1/search", b"{}", TO_JSON, length=value)
        for value in ("x", "-5", "9" * 30, "²")
    },
    "length twice": raw("POST", "/v1/search", b"{}", TO_JSON, "Content-Length: 3"),
    "length and chunks": raw("POST", "/v1/search", b"0\r\n\r\n", TO_JSON, "Transfer-Encoding: chunked", length="5"),
    "no chunk": raw("POST", "/v1/search", b"zz\r\n", TO_JSON, "Transfer-Encoding: chunked", length=""),
    "unknown method": raw("FOO", "/v1/search"),
    "null byte in the path": raw("GET", b"/v1/images/\0"),
    "null byte in a header": raw("GET", "/closed/v1/facets", b"", b"Authorization: Bearer a\0b"),
    "bytes in the query": raw("GET", b"/v1/facets?\xff=\xfe"),
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
}
# Strange and yet right.
ANSWERED: dict[str, bytes] = {
    "right to left": search('{"query": "\u202eرجل\u202c بمعطف أحمر"}'),
    "zero width": search('{"query": "\u200b\u200d\ufeff"}'),
    "four bytes": search('{"query": "👩‍👩‍👧‍👦 𝕏"}'),
    "escaped pair": search(r'{"query": "\ud83d\udc69"}'),
    "combining": search('{"query": "a%s"}' % ("\u0316" * 200)),
    "null character": search(r'{"query": "a\u0000man"}'),
    "not a character": search('{"query": "\uffff\ufdd0"}'),
    "a member twice": search('{"query": "x", "query": "a man", "top_k": 0, "top_k": 2}'),
    **{f"omega {value}": man(omega=value) for value in ("-0", "-0.0", "1e-999", "1", "10E-1")},
    **{f"offset {value}": man(offset=value) for value in ("-0", "-0.0", "2.0")},
    "?omega=-0": upload("omega=-0&offset=-0"),
    "unknown parameters": upload("&" * 1_000 + "x=%00&top_k[]=1"),
    "garbage as key where none is needed": raw("GET", "/v1/facets", b"", b"Authorization: Bearer " + GARBAGE),
    "garbage as cookie where none is needed": raw("GET", "/v1/facets", b"", b'Cookie: \xff=;;"=\\777; =; $'),
}


def exchange(running: Running, request: bytes) -> tuple[int, str, bytes]:
    """Status, content type and body of the answer."""
    where = urlsplit(running.url)
    with socket.create_connection((where.hostname, where.port), timeout=30) as connection:
        with contextlib.suppress(OSError):  # refused while it was sent; the answer says why
            connection.sendall(request)
        answer = http.client.HTTPResponse(connection, method=request.split(b" ", 1)[0].decode("latin-1"))
        answer.begin()
        return answer.status, answer.headers.get_content_type(), answer.read()


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_hostile_is_refused_with_a_reason(running: Running, name: str) -> None:
    status, kind, body = exchange(running, REFUSED[name])
    assert status in (401, 403, 404, 405, 413, 422, 431), body
    assert kind == "application/json"
    detail = json.loads(body)["detail"]
    said = [problem["msg"] for problem in detail] if isinstance(detail, list) else [detail]
    assert said
    assert all(said)


@pytest.mark.parametrize("name", NO_HTTP)
def test_what_is_no_http_is_refused(running: Running, name: str) -> None:
    status, _, body = exchange(running, NO_HTTP[name])
    assert status == 400
    assert body


@pytest.mark.parametrize("name", ANSWERED)
def test_what_is_strange_is_answered(running: Running, name: str) -> None:
    status, kind, body = exchange(running, ANSWERED[name])
    assert (status, kind) == (200, "application/json"), body
    json.loads(body)


def test_a_client_that_goes_away_is_none_of_the_others_business(running: Running) -> None:
    where = urlsplit(running.url)
    for number in range(50):
        with socket.create_connection((where.hostname, where.port), timeout=30) as connection:
            connection.sendall(raw("POST", "/v1/search", b'{"query"', TO_JSON, length=str(100 + number)))
    assert running.search(query="a man", top_k=1)["hits"]


def direct(application: FastAPI, path: str, query: bytes, **headers: bytes) -> int:
    """The status of a request as no HTTP server would let it through."""
    scope = {"type": "http", "method": "GET", "path": path, "query_string": query, "scheme": "http", "root_path": ""}
    scope["headers"] = [(name.replace("_", "-").encode(), value) for name, value in headers.items()]
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(application(scope, receive, send))
    return sent[0]["status"]


def test_the_application_does_not_rely_on_the_http_server(application: FastAPI) -> None:
    key, closed = b"Bearer " + SECRET.encode(), "securitySchemes" in application.openapi()["components"]
    for length in ("²".encode("latin-1"), b"9" * 5_000, b"-1", b"1e3", b"0x1"):
        assert direct(application, "/v1/facets", b"", authorization=key, content_length=length) == 413
    assert direct(application, "/v1/facets", b"", authorization=key, content_length=b"0" * 5_000) == 200
    assert direct(application, "/v1/facets", b"", authorization=key, x=b"x" * HEADERS_LIMIT) == 431
    for host in (b"[", b"evil/healthz?", b"\xff", b""):
        assert direct(application, "/v1/facets", b"\xff=\xfe", authorization=key, host=host) == 200
        assert direct(application, "/v1/facets", b"", host=host) == (401 if closed else 200)


def processes() -> dict[str, list[psutil.Process]]:
    """The processes of this service by what they are, such as `CecaIngress`; others may run on this machine."""
    found: dict[str, list[psutil.Process]] = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            title = (process.cmdline() or [""])[0]
            if name := re.match(r"ray::(?:ServeReplica:[^:]*:)?(\w+)", title):
                found.setdefault(name[1], []).append(process)
    return found


@pytest.mark.slow
def test_hostile_requests_leave_no_memory_behind(running: Running) -> None:
    requests = [request for name, request in (REFUSED | NO_HTTP).items() if name != "10 MB of text"]

    def ask(count: int) -> Iterator[int]:
        with ThreadPoolExecutor(4) as threads:
            many = itertools.islice(itertools.cycle(requests), count)
            yield from threads.map(lambda request: exchange(running, request)[0], many)

    def resident() -> dict[str, list[int]]:
        return {name: [process.memory_info().rss for process in of] for name, of in processes().items()}

    assert set(ask(200)) <= {400, 401, 403, 404, 405, 413, 422, 431}  # warms up
    before = resident()
    assert len(before["CecaIngress"]) == 2
    assert {"ProxyActor", "ServeController", "QueryEncoder"} <= before.keys()
    assert set(ask(800)) <= {400, 401, 403, 404, 405, 413, 422, 431}
    after = resident()
    grown = {name: sum(after.get(name, [])) - sum(before[name]) for name in before if name != "IDLE"}
    assert max(grown.values()) < 2 * GROWTH_BYTES, grown
