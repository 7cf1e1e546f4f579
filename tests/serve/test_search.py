"""Searching over HTTP: a real Ray Serve over a small real dataset."""

from __future__ import annotations

import asyncio
import io
import json
import re
import time

import httpx
import pytest
import ray
from PIL import Image

from ceca.data import schema
from ceca.data.store import Store
from ceca.datasets.images import mime_type
from ceca.search.catalogue import Catalogue
from ceca.search.edition import find_edition
from tests.serve.conftest import TEXT_LIMIT, TOP_K_LIMIT, Running
from tests.serve.dataset import COLOURS, QUERY, draw_person, summarize

METRICS = ("ceca_stage_seconds", "ceca_requests", "ceca_batch_size", "ceca_requests_in_flight", "ceca_gallery_images")


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
    assert answer["gallery"] == running.searcher.edition.gallery
    assert answer["model"] == f"tiny@{running.searcher.edition.digest}"
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
    times = ["2026-03-01T08:30:00Z", "2026-03-08T09:30:00Z"]
    assert facets == {"split": ["test"], "camera": ["c0", "c1", "c2"], "upper_colour": sorted(COLOURS), "time": times}


def test_a_search_is_limited_to_ranges_of_time(running: Running) -> None:
    where = {"time": ["2026-03-02..2026-03-03", "2026-03-05T09"], "camera": ["c0", "c1"]}
    hits = running.search(query=QUERY, top_k=12, where=where)["hits"]
    assert {hit["source_path"] for hit in hits} == {f"{number:04d}.jpg" for number in (3, 4, 9)}
    parameters = {"where": json.dumps(where)}
    by_image = running.client.post("/v1/search/image", params=parameters, content=draw_person(3)).json()
    assert {hit["image_id"] for hit in by_image["hits"]} == {hit["image_id"] for hit in hits}


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
        (
            '{"query": "a man", "where": {"hat": ["cap"]}}',
            "where",
            "there are identity, split, camera, upper_colour, time",
        ),
        ('{"query": "a man", "where": {"time": ["noon"]}}', "where", "a range of time is written"),
        ('{"query": "a man", "where": {"camera": ["c9"]}}', "where", "there are c0, c1, c2"),
        ('{"query": "a man", "answers": {"hat": "cap"}}', "answers", "the candidates differ in upper_colour"),
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


def test_health_is_the_process_and_readiness_what_it_serves(running: Running) -> None:
    assert running.client.get("/healthz").json() == {"status": "ok"}
    assert running.client.get("/readyz").json() == {
        "model": f"tiny@{running.searcher.edition.digest}",
        "gallery": "gallery-1",
        "images": 16,
        "calibrated_omega": None,
        "rerank_seconds": None,
    }


def test_pages_of_results_join_without_a_gap(running: Running) -> None:
    whole = running.search(query=QUERY, top_k=12)["hits"]
    first = running.search(query=QUERY, top_k=5)
    second = running.search(query=QUERY, top_k=7, offset=first["next_offset"])
    assert first["hits"] + second["hits"] == whole
    assert second["next_offset"] is None  # behind the limit of this service
    answer = running.client.post("/v1/search", json={"query": QUERY, "top_k": 5, "offset": TOP_K_LIMIT})
    assert answer.status_code == 422


def test_an_image_finds_itself(running: Running) -> None:
    for number in (2, 4):
        content, kind = draw_person(number), "image/png" if number == 4 else "image/jpeg"
        answer = running.client.post(
            "/v1/search/image", params={"top_k": 3}, content=content, headers={"Content-Type": kind}
        )
        assert answer.json()["query"] is None
        assert answer.json()["hits"][0]["image_id"] == schema.image_id(f"{number:04d}.jpg")


def test_an_image_finds_only_those_that_the_filters_allow(running: Running) -> None:
    def search(where: str) -> httpx.Response:
        parameters = {"top_k": TOP_K_LIMIT, "where": where}
        return running.client.post("/v1/search/image", params=parameters, content=draw_person(2))

    found = search('{"camera": ["c1", "c2"]}').json()["hits"]
    everywhere = search("{}").json()["hits"]
    others = {schema.image_id(f"{number:04d}.jpg") for number in range(0, 1000, 3)}  # of camera c0
    best = [hit["image_id"] for hit in everywhere if hit["image_id"] not in others]
    assert len(best) > 0
    assert [hit["image_id"] for hit in found[: len(best)]] == best
    assert not {hit["image_id"] for hit in found} & others
    for wrong in ("", "camera", '["camera"]', '{"camera": []}', '{"shoe": ["c1"]}', '{"camera": ["c1"]'):
        assert search(wrong).status_code == 422, wrong


def bomb() -> bytes:
    """A picture of a gigapixel in a megabyte."""
    content = io.BytesIO()
    Image.new("1", (40_000, 25_000)).save(content, "PNG")
    return content.getvalue()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "not_an_image"),
        (b"GIF89a" + bytes(100), "not_an_image"),
        (draw_person(1)[:-300], "truncated_image"),
        (bomb(), "image_too_large"),
    ],
    ids=["nothing", "another format", "truncated", "bomb"],
)
def test_what_is_no_usable_image_is_refused_with_a_reason(running: Running, content: bytes, says: str) -> None:
    for path in ("/v1/search/image", "/v1/images?summary=a+man"):
        answer = running.client.post(path, content=content, headers={"Content-Type": "image/jpeg"})
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["type"] == says
    assert running.client.post("/v1/images", content=bytes(9_000_000)).status_code == 413


def test_an_explanation_is_computed_from_the_embeddings(running: Running) -> None:
    hit = running.search(query=QUERY, top_k=1)["hits"][0]
    answer = running.client.post("/v1/explain", json={"query": QUERY, "image_id": hit["image_id"], "omega": 0.3}).json()
    for kind in ("similarity", "global_similarity", "local_similarity"):
        assert answer[kind] == pytest.approx(hit[kind], abs=1e-3)
    words = QUERY.split()
    assert [word["word"] for word in answer["words"]] == words
    for place in (3, 7):  # by how much the similarity falls without the word
        without = " ".join(words[:place] + words[place + 1 :])
        found = {h.image_id: h.similarity for h in running.searcher.search(without, omega=0.3, top_k=16)}
        fall = hit["similarity"] - found[hit["image_id"]]
        assert answer["words"][place]["contribution"] == pytest.approx(fall, abs=1e-3)
    likeness = [sentence["similarity"] for sentence in answer["sentences"]]
    assert likeness == sorted(likeness, reverse=True)
    assert {sentence["text"] for sentence in answer["sentences"]} == {hit["summary"]}
    nobody = running.client.post("/v1/explain", json={"query": QUERY, "image_id": "0" * 16})
    assert nobody.status_code == 404


def test_an_answer_brings_those_that_agree_to_the_front(running: Running) -> None:
    alone = running.search(query="a person", top_k=12, suggest=True)
    asked = alone["question"]
    assert asked["facet"] == "upper_colour"
    assert sum(asked["values"].values()) == pytest.approx(1)
    assert sum(hit["belief"] for hit in alone["hits"]) <= 1 + 1e-6
    colour = min(asked["values"], key=asked["values"].get)
    told = running.search(query="a person", top_k=2, answers={"upper_colour": colour})
    assert all(f"{colour} shirt" in hit["summary"] for hit in told["hits"])
    assert told["question"] is None  # nothing else is known of these people
    unknown = running.search(query="a person", top_k=12, answers={"upper_colour": None})
    assert [hit["image_id"] for hit in unknown["hits"]] == [hit["image_id"] for hit in alone["hits"]]
    nobody = {"camera": ["c2"], "upper_colour": ["green"]}  # each is there, and no image has both
    assert running.search(query="a person", where=nobody, suggest=True)["hits"] == []
    assert running.search(query="a person", where=nobody, answers={"upper_colour": "red"})["hits"] == []
    for answers, says in (({"hat": "cap"}, "upper_colour"), ({"upper_colour": "mauve"}, "red")):
        refused = running.client.post("/v1/search", json={"query": "a person", "answers": answers})
        assert refused.status_code == 422
        assert says in refused.json()["detail"][0]["msg"]


def test_pictures_are_kept_up_to_a_size(people: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {number: len(draw_person(number)) for number in range(16)}
    monkeypatch.setattr("ceca.search.catalogue.CACHE_BYTES", sizes[0] + sizes[1] + 1)
    catalogue = Catalogue(find_edition(people))
    ids = [schema.image_id(f"{number:04d}.jpg") for number in range(3)]
    for image_id in (*ids[:2], ids[0], ids[2]):
        assert catalogue.picture(image_id) is not None
    assert catalogue.cached(ids[1]) is None  # the one that was not asked for longest
    assert catalogue.cached(ids[2]) is not None


def test_prometheus_learns_of_latencies_batches_and_requests(running: Running) -> None:
    running.search(query=QUERY)
    (node,) = ray.nodes()
    deadline = time.monotonic() + 30
    while True:  # Ray's exporter gathers every few seconds
        text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=30).text
        counted = re.search(r'ceca_requests.*{.*route="POST /v1/search".*status="200".*} (\d+)', text)
        missing = [name for name in METRICS if f"ray_{name}" not in text]
        if counted and not missing:
            break
        assert time.monotonic() < deadline, missing
        time.sleep(0.5)
    assert float(counted[1]) >= 1
    assert 'stage="encode"' in text
    assert 'stage="gallery"' in text
