"""The search service as users meet it: a real Ray Serve over a small real dataset, asked over HTTP."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pyarrow as pa
import pytest
import ray
import torch
import yaml
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, Page, expect
from ray import serve as ray_serve

from ceca import schema
from ceca.config import ModelConfig, ServeConfig
from ceca.datasets.images import decode_image, mime_type
from ceca.errors import UserError
from ceca.gallery import Searcher
from ceca.model.backbone import tokenize
from ceca.model.ceca import CECA
from ceca.model.weights import PublishedModel, publish_model, serialize
from ceca.store import Receipt, Store
from ceca.transforms import normalize
from serve.app import QUIET, application, build
from serve.catalogue import Catalogue, find_served

ROOT = Path(__file__).parents[2]
COLOURS = ("red", "green", "blue", "yellow", "purple", "black", "white", "orange")
TINY = ModelConfig(backbone="ceca-tiny", image_height=128, image_width=64, mixer_heads=4, local_dim=256)
QUERY = "a person in a red shirt and blue trousers"
TEXT_LIMIT, TOP_K_LIMIT = 300, 12


# --- a small dataset --------------------------------------------------------------------------------------


def draw_person(number: int) -> bytes:
    """A figure with coloured clothes, encoded as JPEG, or as PNG every fifth time."""
    image = Image.new("RGB", (64, 160), (200, 200 - 4 * number, 190))
    pen = ImageDraw.Draw(image)
    pen.ellipse((24, 10, 40, 30), fill="tan")
    pen.rectangle((16, 32, 48, 90), fill=COLOURS[number % len(COLOURS)])
    pen.rectangle((20, 90, 44, 150), fill=COLOURS[(3 * number + 1) % len(COLOURS)])
    content = io.BytesIO()
    image.save(content, "PNG" if number % 5 == 4 else "JPEG")
    return content.getvalue()


def summarize(number: int) -> str:
    upper, lower = COLOURS[number % len(COLOURS)], COLOURS[(3 * number + 1) % len(COLOURS)]
    return f"A person in a {upper} shirt & {lower} trousers <number {number}>."


def publish(store: Store, table: str, rows: pa.Table, stage: str, made_from: dict[str, str], notes: dict) -> str:
    """A table of two parts, published as a stage would."""
    version, middle = f"{table}-1", rows.num_rows // 2 + 1
    receipts = []
    for number, piece in enumerate((rows.slice(0, middle), rows.slice(middle))):
        receipts.append(Receipt({table: store.write_part(table, version, number, piece)}))
    store.publish(stage, version, (table,), receipts, made_from=made_from, config={}, notes=notes)
    return version


def publish_people(store: Store, count: int) -> None:
    """The tables images, captions and dialogues; the last image is of the training split."""
    ids = [schema.image_id(f"{number:04d}.jpg") for number in range(count)]
    images, captions, dialogues = [], [], []
    for number, image_id in enumerate(ids):
        split = "train" if number == count - 1 else "test"
        common = {"image_id": image_id, "identity": number // 2, "split": split}
        place = {"width": 64, "height": 160, "source_path": f"{number:04d}.jpg"}
        images.append({**common, **place, "camera": f"c{number % 3}", "image": draw_person(number)})
        captions.append({**common, "caption_id": schema.caption_id(image_id, 0), "text": summarize(number)})
        dialogues.append({"image_id": image_id, "turns": [], "summary": summarize(number), "model": "test"})
        dialogues[-1] |= {"flags": [], "attributes": {"upper_colour": COLOURS[number % len(COLOURS)]}}
        dialogues[-1] |= {"prompt_version": "1", "generation_settings": "{}"}
        dialogues[-1] |= {"prompt_tokens": 0, "cached_tokens": 0, "completion_tokens": 0}
    version = publish(store, "images", pa.Table.from_pylist(images, schema.IMAGES), "ingest", {}, {})
    made_from = {"images": version}
    publish(store, "captions", pa.Table.from_pylist(captions, schema.CAPTIONS), "ingest", made_from, {})
    publish(store, "dialogues", pa.Table.from_pylist(dialogues, schema.DIALOGUES), "dialogue", made_from, {})


def publish_tiny(store: Store, name: str, seed: int) -> tuple[CECA, PublishedModel]:
    torch.manual_seed(seed)
    model = CECA(TINY).eval()
    weights = serialize(model.state_dict())
    return model, publish_model(
        store, name, weights, model=TINY, config={}, training={}, made_from={}, version=f"{name}-1"
    )


@torch.inference_mode()
def publish_gallery(store: Store, model: CECA, published: PublishedModel, name: str, split: str = "test") -> None:
    images = store.current("images")
    rows = [row for row in store.read(images).to_pylist() if row["split"] == split]
    summaries = {row["image_id"]: row["summary"] for row in store.read(store.current("dialogues")).to_pylist()}
    gallery = []
    for row in rows:
        pixels = normalize(torch.from_numpy(decode_image(row["image"], 128, 64).copy())[None])
        parts = model.embed_gallery(pixels, tokenize([summaries[row["image_id"]]]))
        embedded = {key: part[0].half().numpy() for key, part in zip(("global", "local"), parts, strict=True)}
        known = {key: row[key] for key in ("image_id", "identity", "split")}
        gallery.append({**known, **embedded, "model_digest": published.digest})
    table = pa.Table.from_pylist(gallery, schema.gallery(published.global_dim, published.local_dim))
    made_from = {"model": published.digest, "images": images.version, "dialogues": store.current("dialogues").version}
    publish(store, "gallery", table, "index", made_from, {"model": name})


# --- the service ------------------------------------------------------------------------------------------


@dataclass
class Running:
    """A dataset, the service over it, a client of the service, and the same search without a cluster."""

    store: Store
    url: str
    client: httpx.Client
    searcher: Searcher
    keys: dict[str, str]  # of a second application below /closed, which needs them

    def search(self, **body: object) -> dict:
        response = self.client.post("/v1/search", json=body)
        assert response.status_code == 200, response.text
        return response.json()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(str(tmp_path_factory.mktemp("people")))
    publish_people(store, 17)
    model, published = publish_tiny(store, "tiny", seed=1)
    publish_gallery(store, model, published, "tiny")
    return store


KEYS = {"portal": ["search"], "loader": ["write"], "slow": ["search"]}


@pytest.fixture(scope="module")
def running(people: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    keys = {name: f"{name}-secret-of-the-test" for name in KEYS}
    entries = [
        {"name": name, "sha256": hashlib.sha256(keys[name].encode()).hexdigest(), "scopes": scopes}
        for name, scopes in KEYS.items()
    ]
    entries[-1]["per_minute"] = 2
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    file.write_text(yaml.safe_dump({"keys": entries}))
    port = free_port()
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="warning")
    try:
        ray_serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config=QUIET)
        config = ServeConfig(top_k_limit=TOP_K_LIMIT, text_limit=TEXT_LIMIT)
        ray_serve.run(application(find_served(people.uri), config), route_prefix="/", logging_config=QUIET)
        closed = application(find_served(people.uri), dataclasses.replace(config, keys=str(file)))
        ray_serve.run(closed, name="closed", route_prefix="/closed", logging_config=QUIET)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
            yield Running(people, f"http://127.0.0.1:{port}", client, Searcher(people), keys)
    finally:
        ray_serve.shutdown()
        ray.shutdown()


def similarities(hits: list[dict], kind: str = "similarity") -> list[float]:
    return [hit[kind] for hit in hits]


@pytest.mark.parametrize("omega", [0.0, 0.3, 1.0])
def test_search_equals_the_search_in_one_process(running: Running, omega: float) -> None:
    answer = running.search(query=QUERY, top_k=12, omega=omega)
    expected = running.searcher.search(QUERY, omega=omega, top_k=12)
    assert [hit["image_id"] for hit in answer["hits"]] == [hit.image_id for hit in expected]
    assert [hit["identity"] for hit in answer["hits"]] == [hit.identity for hit in expected]
    for kind in ("similarity", "global_similarity", "local_similarity"):
        assert similarities(answer["hits"], kind) == pytest.approx([getattr(hit, kind) for hit in expected], abs=1e-5)
    assert answer["query"] == QUERY
    assert answer["omega"] == omega
    assert answer["gallery"] == running.searcher.manifest.version
    assert answer["model"] == f"tiny@{running.searcher.model_digest}"
    assert answer["took_ms"] > 0


def test_omega_goes_from_global_to_local(running: Running) -> None:
    by_global = running.search(query=QUERY, top_k=12, omega=0)["hits"]
    by_local = running.search(query=QUERY, top_k=12, omega=1)["hits"]
    assert similarities(by_global) == pytest.approx(similarities(by_global, "global_similarity"), abs=1e-5)
    assert similarities(by_local) == pytest.approx(similarities(by_local, "local_similarity"), abs=1e-5)
    for hits in (by_global, by_local):
        assert similarities(hits) == sorted(similarities(hits), reverse=True)
    assert [hit["image_id"] for hit in by_global] != [hit["image_id"] for hit in by_local]


def test_defaults_and_summaries(running: Running) -> None:
    answer = running.search(query=f"  {QUERY}\n")
    assert answer["query"] == QUERY
    assert answer["omega"] == 0.3
    assert len(answer["hits"]) == 10
    summaries = {schema.image_id(f"{number:04d}.jpg"): summarize(number) for number in range(17)}
    for hit in answer["hits"]:
        assert hit["summary"] == summaries[hit["image_id"]]
        assert hit["image"] == f"/v1/images/{hit['image_id']}"


def test_conditions_apply_before_the_best_are_taken(running: Running) -> None:
    colours = COLOURS[:2]
    wanted = {
        schema.image_id(f"{number:04d}.jpg")
        for number in range(16)
        if number % 3 == 1 and COLOURS[number % len(COLOURS)] in colours
    }
    hits = running.search(query=QUERY, top_k=12, where={"camera": ["c1"], "upper_colour": colours})["hits"]
    assert {hit["image_id"] for hit in hits} == wanted
    expected = running.searcher.search(QUERY, omega=0.3, top_k=12, where={"camera": ["c1"], "upper_colour": colours})
    assert [hit["image_id"] for hit in hits] == [hit.image_id for hit in expected]
    facets = running.client.get("/v1/facets").json()
    assert facets == {"split": ["test"], "camera": ["c0", "c1", "c2"], "upper_colour": sorted(COLOURS)}


def test_images_are_the_bytes_that_came(running: Running) -> None:
    for number in (0, 4, 15):
        content = draw_person(number)
        response = running.client.get(f"/v1/images/{schema.image_id(f'{number:04d}.jpg')}")
        assert response.status_code == 200
        assert response.content == content
        assert response.headers["content-type"] == mime_type(content) == f"image/{'png' if number == 4 else 'jpeg'}"
        assert "max-age" in response.headers["cache-control"]
        again = running.client.get(response.url.path, headers={"If-None-Match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


def test_only_images_of_the_gallery_are_reachable(running: Running) -> None:
    for unknown in (schema.image_id("nobody.jpg"), schema.image_id("0016.jpg")):  # the last is of the training split
        response = running.client.get(f"/v1/images/{unknown}")
        assert response.status_code == 404
        assert unknown in response.json()["detail"]
    assert running.client.get("/v1/images/..%2Fimages-1%2Fmanifest.json").status_code in (404, 422)
    assert running.client.get("/v1/images/0").status_code == 422


@pytest.mark.parametrize(
    ("body", "field", "says"),
    [
        ('{"query": ""}', "query", "describe a person"),
        ('{"query": " \\n\\t "}', "query", "describe a person"),
        ('{"query": "%s"}' % ("x" * (TEXT_LIMIT + 1)), "query", f"at most {TEXT_LIMIT}"),
        ('{"query": "\\ud800"}', "query", "surrogate"),
        ('{"query": 7}', "query", "string"),
        ("{}", "query", "required"),
        ('{"query": "a man", "top_k": 0}', "top_k", "greater than or equal to 1"),
        ('{"query": "a man", "top_k": 13}', "top_k", f"at most {TOP_K_LIMIT}"),
        ('{"query": "a man", "top_k": "3"}', "top_k", "integer"),
        ('{"query": "a man", "top_k": true}', "top_k", "integer"),
        ('{"query": "a man", "omega": NaN}', "omega", ""),
        ('{"query": "a man", "omega": Infinity}', "omega", ""),
        ('{"query": "a man", "omega": 1.01}', "omega", "less than or equal to 1"),
        ('{"query": "a man", "weight": 1}', "weight", "not permitted"),
        ('{"query": "a man", "where": {"hat": ["cap"]}}', "where", "there are identity, split, camera, upper_colour"),
        ('{"query": "a man", "where": {"camera": ["c9"]}}', "where", "there are c0, c1, c2"),
        ('{"query": "a man"', None, "JSON"),
    ],
)
def test_what_is_not_valid_is_refused_with_a_reason(running: Running, body: str, field: str, says: str) -> None:
    response = running.client.post("/v1/search", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 422
    (problem,) = response.json()["detail"]
    assert problem["loc"][0] == "body"
    assert field is None or problem["loc"][1] == field
    assert says in problem["msg"]


@pytest.mark.parametrize("query", ["?!", "红衣服的女人", "\u200b", "<script>alert(1)</script>", "word " * 60])
def test_unusual_queries_are_answered(running: Running, query: str) -> None:
    answer = running.search(query=query, top_k=3)
    assert len(answer["hits"]) == 3


def test_many_at_once_get_what_each_gets_alone(running: Running) -> None:
    asked = [
        {"query": f"a person in {COLOURS[number % 8]} {'clothes ' * (number % 7)}", "top_k": 1 + number % 12}
        | {"omega": (0.0, 0.3, 1.0)[number % 3]}
        for number in range(120)
    ]

    async def ask_all() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=running.url, timeout=60) as client:
            return await asyncio.gather(*(client.post("/v1/search", json=body) for body in asked))

    for body, response in zip(asked, asyncio.run(ask_all()), strict=True):
        hits = response.json()["hits"]
        alone = running.searcher.search(body["query"], omega=body["omega"], top_k=body["top_k"])
        assert similarities(hits) == pytest.approx([hit.similarity for hit in alone], abs=1e-5)
        assert len({hit["image_id"] for hit in hits}) == body["top_k"]


def test_health(running: Running) -> None:
    assert running.client.get("/healthz").json() == {
        "status": "ok",
        "model": f"tiny@{running.searcher.model_digest}",
        "gallery": "gallery-1",
        "images": 16,
    }


def test_page_needs_nothing_from_elsewhere(running: Running) -> None:
    response = running.client.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    page = response.text
    assert not re.search(r"https?:|src\s*=\s*[\"']?//|@import|url\(|innerHTML|{{", page)
    assert f'data-top-k-limit="{TOP_K_LIMIT}"' in page
    assert len(page.splitlines()) < 400
    assert running.client.get("/docs").status_code == 404  # FastAPI's own pages load scripts from elsewhere


# --- keys -------------------------------------------------------------------------------------------------


def requests_of(running: Running) -> list[tuple[str, str]]:
    """A request of every route that the description lists, and of some that it does not."""
    bearer = {"Authorization": f"Bearer {running.keys['portal']}"}
    paths = running.client.get("/closed/openapi.json", headers=bearer).json()["paths"]
    listed = [(method.upper(), path) for path, methods in paths.items() for method in methods]
    filled = [(method, path.replace("{image_id}", schema.image_id("0000.jpg"))) for method, path in listed]
    return [*filled, ("GET", "/openapi.json"), ("GET", "/nowhere"), ("DELETE", "/v1/search"), ("POST", "/")]


def test_every_route_is_closed_without_the_right_key_but_those_that_tell_nothing_of_a_person(running: Running) -> None:
    asked = requests_of(running)
    assert ("POST", "/v1/search") in asked
    opened = []
    for method, path in asked:
        for key, status in ((None, 401), ("guessed", 401), (running.keys["loader"], 403)):
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            response = running.client.request(method, f"/closed{path}", headers=headers, content="{")
            if response.status_code != status:
                opened.append((method, path))
                break
            assert response.json()["detail"]
    assert sorted(opened) == [("GET", "/"), ("GET", "/healthz"), ("POST", "/v1/session")]


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
        assert visitor.get(picture).status_code == 200


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
    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        text = "".join(file.read_text() for file in logs.glob("worker-*.err"))
        lines = [json.loads(line) for line in text.splitlines() if line.startswith('{"time"')]
        mine = [line for line in lines if line.get("query") == hashlib.sha256(words.encode()).hexdigest()[:16]]
        if mine and any(line["status"] == 401 for line in lines):
            break
        time.sleep(0.2)
    assert mine[0]["who"] == "portal"
    assert mine[0]["images"] == [hit["image_id"] for hit in hits]
    assert any(line["status"] == 401 and line["action"] == "GET /v1/facets" for line in lines)
    assert words not in text
    assert not any(key in text for key in running.keys.values())


@pytest.mark.parametrize("size", [64 * 1024 + 1, 10_000_000])
def test_a_body_that_is_too_long_is_refused_before_it_is_read(running: Running, size: int) -> None:
    response = running.client.post("/v1/search", content=json.dumps({"query": "x" * size}))
    assert response.status_code == 413
    response = running.client.post("/v1/search", content=iter([b'{"query": "a man"}']))  # does not say how long it is
    assert response.status_code == 413


def test_others_are_not_let_in_by_mistake(people: Store) -> None:
    process = start(people.uri, "--host", "0.0.0.0")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.startswith("error: others can reach 0.0.0.0, and this searches for people: give --keys FILE")


# --- the page in a browser --------------------------------------------------------------------------------


LOADED = "document.images.length > 0 && [...document.images].every(image => image.complete && image.naturalWidth)"


def wait_until(page: Page, expression: str, value: object = True) -> None:
    """By asking again: the page's own policy forbids to evaluate strings in it, which Playwright would do to wait."""
    deadline = time.monotonic() + 10
    while (found := page.evaluate(expression)) != value:
        assert time.monotonic() < deadline, f"{expression} is {found}"
        time.sleep(0.05)


def test_a_person_searches_with_the_page(running: Running, browser: Browser) -> None:
    page, problems = browser.new_page(viewport={"width": 1200, "height": 2000}), []
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(running.url)
    expect(page.get_by_text("16 images")).to_be_visible()
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("/")
    page.keyboard.type(QUERY)
    page.keyboard.press("Enter")
    cards = page.locator("#grid .card")
    expect(cards).to_have_count(10)
    expect(page.locator("#status")).to_contain_text("10 images, best first")
    wait_until(page, LOADED)
    expected = [hit.identity for hit in running.searcher.search(QUERY, omega=0.3, top_k=10)]
    shown = "[...document.querySelectorAll('#grid .card')].map(card => Number(card.dataset.identity))"
    assert page.evaluate(shown) == expected

    page.locator("#omega").fill("1")
    local = [hit.identity for hit in running.searcher.search(QUERY, omega=1.0, top_k=10)]
    wait_until(page, shown, local)
    cards.first.locator("summary").click()
    expect(cards.first.locator("details p")).to_contain_text("A person in a")
    page.go_back()  # to the empty search
    page.set_viewport_size({"width": 360, "height": 700})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert not problems


def test_the_page_asks_for_the_key_that_a_service_needs(running: Running, browser: Browser) -> None:
    page = browser.new_page(viewport={"width": 1200, "height": 2000})
    page.goto(f"{running.url}/closed/")
    page.get_by_role("button", name="red").first.click()
    page.get_by_label("Key").fill("guessed")
    page.get_by_role("button", name="Continue").click()
    expect(page.get_by_text("This key is not known")).to_be_visible()
    page.get_by_label("Key").fill(running.keys["portal"])
    page.get_by_role("button", name="Continue").click()
    expect(page.locator("#grid .card")).to_have_count(10)
    wait_until(page, LOADED)


# --- starting ---------------------------------------------------------------------------------------------


def start(data: str, *options: str) -> subprocess.Popen:
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "serve", "--data", data, *options]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_no_gallery_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    process = start(str(tmp_path))
    out, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out == ""
    assert error.startswith("error: no table 'gallery'")
    assert "index" in error
    assert error.count("\n") == 1


def test_what_cannot_be_served_is_found_before_anything_is_deployed(people: Store, tmp_path: Path) -> None:
    publish_tiny(people, "other", seed=2)
    with pytest.raises(UserError, match="the gallery was made by model"):
        build({"data": people.uri, "model": "other", "open": True})
    with pytest.raises(UserError, match=r"no published model 'absent'.*there: other, tiny"):
        build({"data": people.uri, "model": "absent", "open": True})
    with pytest.raises(UserError, match="needs keys=FILE"):
        build({"data": people.uri})
    with pytest.raises(UserError, match="needs data=URI"):
        build({})
    with pytest.raises(UserError, match="http_options"):
        build({"data": people.uri, "port": "8001"})
    with pytest.raises(UserError, match="unknown key 'omg'"):
        build({"data": people.uri, "omg": "0.5"})
    with pytest.raises(UserError, match="omega"):
        build({"data": people.uri, "omega": "1.5"})


def test_build_reads_strings_as_the_command_line_gives_them(people: Store) -> None:
    built = build({"data": people.uri, "omega": "0.5", "batch": "8", "recipe": "tiny", "open": "true"})
    assert isinstance(built, ray_serve.Application)


def test_command_serves_until_it_is_interrupted(people: Store) -> None:
    port = free_port()
    process = start(people.uri, "--port", str(port))
    try:
        assert process.stdout is not None
        lines = [process.stdout.readline().strip() for _ in range(2)]
        assert lines[1] == f"http://127.0.0.1:{port}", process.communicate(timeout=5)[1]
        answer = httpx.post(f"{lines[1]}/v1/search", json={"query": QUERY}, timeout=30)
        assert len(answer.json()["hits"]) == 10
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=30)
        assert process.returncode == 0
        assert out.strip() == "stopping"
        assert "Traceback" not in error
    finally:
        process.kill()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/healthz")


def test_taken_port_is_one_line_and_exit_code_2(people: Store) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        process = start(people.uri, "--port", str(taken.getsockname()[1]))
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.startswith("error: cannot listen on 127.0.0.1")


def test_pictures_are_kept_up_to_a_size(people: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {number: len(draw_person(number)) for number in range(16)}
    monkeypatch.setattr("serve.catalogue.CACHE_BYTES", sizes[0] + sizes[1] + 1)
    catalogue = Catalogue(find_served(people.uri))
    ids = [schema.image_id(f"{number:04d}.jpg") for number in range(3)]
    for image_id in (*ids[:2], ids[0], ids[2]):
        assert catalogue.picture(image_id) is not None
    assert catalogue.cached(ids[1]) is None  # the one that was not asked for longest
    assert catalogue.cached(ids[2]) is not None
