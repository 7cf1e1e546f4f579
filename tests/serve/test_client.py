"""The client against a real service, and the examples of docs/service.md as they are written."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ceca.data import schema
from ceca.datasets.images import check_image
from ceca.errors import UserError
from serve.client import Answer, Client, ClientError, Hit, Job, Ready
from tests.serve.conftest import ROOT, TEXT_LIMIT, TOP_K_LIMIT, Changing, Running
from tests.serve.dataset import COLOURS, QUERY, draw_person, summarize
from tests.serve.test_changes import picture

NOBODY = "0" * 16


@pytest.fixture
def client(running: Running) -> Iterator[Client]:
    with Client(f"{running.url}/") as opened:
        yield opened


@pytest.fixture
def writer(changing: Changing, running: Running) -> Iterator[Client]:
    with Client(f"{running.url}/closed", running.keys["both"], job_timeout_s=60) as opened:
        yield opened


# --- searching --------------------------------------------------------------------------------------------


def test_a_search_gives_what_the_service_says(client: Client, running: Running) -> None:
    answer = client.search(QUERY, 3, omega=0.5, offset=1)
    expected = running.search(query=QUERY, top_k=3, omega=0.5, offset=1)
    assert isinstance(answer, Answer)
    assert [vars(hit) for hit in answer.hits] == expected["hits"]
    assert (answer.omega, answer.gallery, answer.next_offset) == (0.5, expected["gallery"], 4)
    assert answer.question is None
    found = client.search(QUERY, 5, where={"camera": "c1", "upper_colour": COLOURS[:2]})
    expected = running.search(query=QUERY, top_k=5, where={"camera": ["c1"], "upper_colour": COLOURS[:2]})
    assert [hit.image_id for hit in found.hits] == [hit["image_id"] for hit in expected["hits"]]


def test_all_pages_to_the_limit(client: Client) -> None:
    whole = client.search(QUERY, TOP_K_LIMIT).hits
    assert tuple(client.search_all(QUERY, page=5)) == whole
    assert next(client.search_all(QUERY)) == whole[0]
    assert [hit.summary for hit in client.search_all(QUERY, where={"camera": "c1", "upper_colour": "green"})] == [
        summarize(1)
    ]


def test_a_conversation(client: Client) -> None:
    question = client.search("a person", suggest=True).question
    assert question is not None
    assert sum(question.values.values()) == pytest.approx(1)
    told = client.search("a person", 2, answers={question.facet: "red"})
    assert all("red shirt" in (hit.summary or "") for hit in told.hits)
    assert all(hit.belief for hit in told.hits)


def test_an_image_and_one_of_the_gallery_find_those_like_them(client: Client, tmp_path: Path) -> None:
    image_id, content = schema.image_id("0002.jpg"), draw_person(2)
    (tmp_path / "person.jpg").write_bytes(content)
    by_file = client.search_image(tmp_path / "person.jpg", 2)
    assert by_file.hits == client.search_image(str(tmp_path / "person.jpg"), 2).hits
    assert by_file.hits == client.search_image(content, 2).hits
    assert by_file.query is None
    assert by_file.hits[0].image_id == image_id
    assert client.search_image(content, 1, omega=0, offset=1).omega == 0
    assert client.search_image(content, 3, where={"split": "test"}).hits[0].image_id == image_id
    assert client.search_like(image_id, 3, where={"split": "test"}).hits[0].image_id == image_id
    assert client.image(image_id) == content
    with pytest.raises(ClientError, match="cannot read the image"):
        client.search_image(tmp_path / "absent.jpg")
    with pytest.raises(ClientError, match="422: image: not a usable image"):
        client.search_image(b"GIF89a")


def test_an_explanation(client: Client) -> None:
    (hit,) = client.search(QUERY, 1).hits
    told = client.explain(QUERY, hit.image_id, omega=0.3)
    assert [word.word for word in told.words] == QUERY.split()
    assert {sentence.text for sentence in told.sentences} == {hit.summary}
    assert told.similarity == pytest.approx(hit.similarity, abs=1e-3)


def test_what_is_served(client: Client, running: Running) -> None:
    assert client.ready() == Ready(model=f"tiny@{running.searcher.edition.digest}", gallery="gallery-1", images=16)
    assert client.facets()["camera"] == ["c0", "c1", "c2"]


def test_what_is_refused_is_said_in_words(client: Client, running: Running) -> None:
    for ask, status, says in (
        (lambda: client.search(""), 422, "query: the query is empty: describe a person"),
        (lambda: client.search("x" * (TEXT_LIMIT + 1)), 422, f"at most {TEXT_LIMIT}"),
        (lambda: client.search(QUERY, where={"hat": "cap"}), 422, "no facet 'hat' to filter by; there are"),
        (lambda: client.search_like(NOBODY), 404, f"no image {NOBODY} in this gallery"),
        (lambda: client.explain(QUERY, NOBODY), 404, f"no image {NOBODY} in this gallery"),
        (lambda: client.image(NOBODY), 404, f"GET {running.url}/v1/images/{NOBODY} was answered 404: no image"),
        (lambda: client.image("../facets"), None, ""),
        (lambda: client.remove(NOBODY), 404, "no image"),
        (lambda: client.job(f"add-{NOBODY}"), 404, "no job"),
        (lambda: client.add(bytes(9_000_000)), 413, "send a smaller image"),
    ):
        with pytest.raises(ClientError) as refused:
            ask()
        assert status in (None, refused.value.status)
        assert says in str(refused.value)
        assert isinstance(refused.value, UserError)


def test_a_key_that_does_not_open_is_said_and_not_shown(running: Running) -> None:
    url = f"{running.url}/closed"
    for key, status, says in (
        (None, 401, "a key is needed"),
        ("guessed", 401, "not known"),
        ("loader", 403, "this needs"),
    ):
        with Client(url, running.keys.get(key or "", key)) as other, pytest.raises(ClientError) as refused:
            other.search(QUERY)
        assert refused.value.status == status
        assert says in str(refused.value)
        assert not key or key == "loader" or key not in str(refused.value)
        assert running.keys["loader"] not in str(refused.value)
    with Client(url, running.keys["portal"]) as portal:
        assert portal.search(QUERY).hits
        with pytest.raises(ClientError, match="this needs write"):
            portal.remove(schema.image_id("0000.jpg"))
    for key in ("", "two words", "schlüssel", "a\nb"):
        with pytest.raises(ClientError, match="the key is empty or holds"):
            Client(url, key)
    for wrong in ("localhost:8000", "", "http://[::1"):
        with pytest.raises(ClientError, match="no address"):
            Client(wrong)


# --- changing the gallery ---------------------------------------------------------------------------------


def test_an_image_is_added_found_and_removed(writer: Client) -> None:
    content = picture("darkorchid")
    taken = datetime(2031, 5, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    job = writer.add(content, identity=91, camera="c7", time=taken, name="desk/1.jpg", summary="A person in orchid.")
    assert isinstance(job, Job)
    assert (job.status, job.job) == ("done", f"add-{job.image_id}")
    assert job.image_id is not None
    (hit,) = writer.search(QUERY, where={"camera": "c7"}).hits
    assert isinstance(hit, Hit)
    assert (hit.image_id, hit.identity, hit.summary) == (job.image_id, 91, "A person in orchid.")
    assert hit.source_path == "desk/1.jpg"
    assert writer.search(QUERY, where={"time": "2031-05-01T10"}).hits[0].image_id == job.image_id
    assert writer.image(job.image_id) == content
    gone = writer.remove(job.image_id)
    assert (gone.status, gone.image_id) == ("done", job.image_id)
    assert writer.job(gone.job).status == "done"
    with pytest.raises(ClientError, match="404"):
        writer.image(job.image_id)
    with pytest.raises(ClientError, match="422: summary: this image was deleted"):
        writer.add(content, summary="A person in orchid.")


def test_an_image_that_is_not_added_or_not_yet_is_an_error(
    writer: Client, changing: Changing, running: Running
) -> None:
    content = picture("darkkhaki")
    changing.describer.broken = True
    try:
        acknowledged = writer.add(content, wait=False)
        assert acknowledged.status == "waiting"
        assert changing.finished(acknowledged.job)["status"] == "failed"
        with pytest.raises(ClientError, match=rf"image {acknowledged.image_id} was not added: .*answered nothing"):
            writer.add(content)
    finally:
        changing.describer.broken = False
    changing.describer.seconds = 0.5
    try:
        hasty = Client(writer.url, running.keys["both"], job_timeout_s=0.5)
        with hasty, pytest.raises(ClientError, match="it is not lost"):
            hasty.add(content)
    finally:
        changing.describer.seconds = 0.0
    added = writer.add(content)
    assert added.image_id is not None
    writer.remove(added.image_id)


# --- asking again -----------------------------------------------------------------------------------------


class Moody:
    """A server that answers what it is told to, one after the other: a status with headers, None: it hangs up."""

    def __init__(self, *moods: tuple[int, dict[str, str], object] | None):
        self.moods, self.asked = list(moods), []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                outer.asked.append((time.monotonic(), self.command, body))
                mood = outer.moods.pop(0)
                if mood is None:
                    self.close_connection = True
                    return
                status, headers, told = mood
                content = told if isinstance(told, bytes) else json.dumps(told).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_DELETE = answer

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> Moody:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


BUSY = (503, {"Retry-After": "1"}, {"detail": "too many requests wait"})
FACETS = (200, {}, {"camera": ["c0"]})
ACKNOWLEDGED = (202, {}, {"job": f"add-{NOBODY}", "status": "done", "image_id": NOBODY, "detail": "", "new": 1})


def test_what_the_service_has_no_room_for_is_asked_again_when_it_says() -> None:
    limited = (429, {"Retry-After": "1"}, {"detail": "this key may ask 600 times a minute"})
    with Moody(BUSY, limited, FACETS) as server, Client(server.url) as client:
        assert client.facets() == {"camera": ["c0"]}
    times = [at for at, *_ in server.asked]
    assert all(after - before >= 0.99 for before, after in itertools.pairwise(times))


def test_a_lost_connection_is_asked_again_with_all_that_was_sent() -> None:
    gateway = (502, {}, b"<html>Bad Gateway</html>")
    with Moody(None, gateway, ACKNOWLEDGED) as server, Client(server.url) as client:
        assert client.add(b"image", summary="x").image_id == NOBODY
    assert [(method, body) for _, method, body in server.asked] == [("POST", b"image")] * 3


def test_a_service_on_this_machine_is_asked_past_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "socks5://127.0.0.1:9")
    with Moody(FACETS) as server, Client(server.url) as client:
        assert client.facets() == {"camera": ["c0"]}
    with pytest.raises(ClientError, match="through the proxy"):
        Client("http://search.example")
    for name in ("http_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://me:secret@127.0.0.1:9")
    with Client("http://search.example", timeout_s=0.1) as client, pytest.raises(ClientError) as lost:
        client.facets()
    assert "through the proxy http://***@127.0.0.1:9 of $http_proxy" in str(lost.value)


def test_asking_again_ends_with_the_time() -> None:
    began = time.monotonic()
    says = r"answered 503: too many requests wait; given up after 1.5 s"
    server = Moody(BUSY, BUSY, BUSY)
    with server, Client(server.url, timeout_s=1.5) as client, pytest.raises(ClientError, match=says) as given_up:
        client.facets()
    assert given_up.value.status == 503
    assert len(server.asked) == 2
    with Client(server.url, timeout_s=0.5) as client, pytest.raises(ClientError, match="is the service running there"):
        client.facets()  # nobody listens
    assert time.monotonic() - began < 4


def test_json_of_another_service_is_said_to_be_no_answer() -> None:
    says = r"gave JSON that is no Job \(status: .*'waiting', 'done' or 'failed'"
    server = Moody((200, {}, {"job": "add-1", "status": "melted"}))
    with server, Client(server.url) as client, pytest.raises(ClientError, match=says):
        client.job("add-1")


def test_the_client_needs_neither_ray_nor_fastapi_nor_the_service() -> None:
    code = "import sys; from serve.client import Client; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {"serve.client", "serve.schema"} <= loaded
    assert not {"ray", "fastapi", "starlette", "torch", "pyarrow", "serve.app", "serve.api"} & loaded


def test_what_will_not_get_better_is_not_asked_again() -> None:
    elsewhere = (307, {"Location": "https://elsewhere/"}, b"")
    gone = (404, {}, {"detail": f"no image {NOBODY} in this gallery"})
    server = Moody((500, {}, b"oops"), elsewhere, (200, {}, b"<html>"), None, gone)
    with server, Client(server.url) as client:
        for says in ("500: Internal Server Error", "307: it is at https://elsewhere/", "is this the service"):
            with pytest.raises(ClientError, match=says):
                client.facets()
        with pytest.raises(ClientError, match="an attempt whose answer was lost may have removed it"):
            client.remove(NOBODY)
    assert not server.moods


# --- the guide --------------------------------------------------------------------------------------------


def test_every_example_of_the_guide_works_as_it_is_written(
    writer: Client, changing: Changing, running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that begin with curl, by bash, and those of Python, in their order."""
    text = (ROOT / "docs" / "service.md").read_text()
    examples = re.findall(r"^```(bash\n(?=curl)|python\n)(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(examples) >= 16
    job = writer.add(picture("goldenrod"), summary="A person in gold.")
    assert job.image_id is not None
    (tmp_path / "photo.jpg").write_bytes(picture("cornflowerblue"))
    (tmp_path / ".curlrc").write_text("silent\nshow-error\nfail-with-body\n")
    given = {"URL": writer.url, "KEY": running.keys["both"], "IMAGE": job.image_id, "JOB": job.job}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for kind, example in examples:
        if kind.startswith("python"):
            exec(compile(example.replace("http://localhost:8000", writer.url), example, "exec"), names)
            continue
        done = subprocess.run(
            ["bash", "-euc", example], capture_output=True, text=True, env={**os.environ, "CURL_HOME": str(tmp_path)}
        )
        assert done.returncode == 0, f"{example}\n{done.stdout}\n{done.stderr}"
        for line in filter(None, done.stdout.splitlines()):
            assert json.loads(line), example
    check_image((tmp_path / "person.jpg").read_bytes(), 10_000_000)
    with pytest.raises(ClientError, match="404"):
        writer.image(job.image_id)  # the guide ends by deleting what was added
    spoken = set(re.findall(r'"(?:\$URL)?(/v1/[^"?$]*|/readyz|/healthz)', text))
    paths = {path.split("{")[0] for path in changing.client.get("/openapi.json").json()["paths"]} - {"/v1/session"}
    assert paths <= {path.split("$")[0] for path in spoken}
