"""Answers in the searcher's own words: by the vocabulary, by an engine beside the picture shown, or why not by that."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request
from fastapi.responses import Response
from playwright.sync_api import Browser, expect
from starlette.testclient import TestClient

from ceca.config import OpenAIConfig, ServeConfig
from ceca.data import schema
from ceca.data.store import Store
from serve.access import Gate
from serve.api import make_api
from serve.client import Client, ClientError
from tests.endpoint import ChatServer, completion, digest_of
from tests.serve.conftest import COUNT, Running
from tests.serve.dataset import COLOURS, publish_gallery, publish_people, publish_tiny
from tests.serve.inside import InProcess, InThisProcess, WithEngine
from tests.serve.looks import Looks, wears

HERE = "http://localhost:8000"
SHOWN = 3  # the person in the picture that the searcher was shown
IMAGE = schema.image_id(f"{SHOWN:04d}.jpg")
OTHER = COLOURS[(SHOWN + 5) % len(COLOURS)]  # what "the other colour" means of that picture


class Reads(Looks):
    """Reply of a chat server that understands "the other colour" of the person in the picture."""

    def __init__(self) -> None:
        super().__init__(COUNT)
        self.heard: list[str] = []

    async def __call__(self, body: dict[str, Any], request: Request) -> Response:
        number = self.people[digest_of(body)]
        (asked,) = (part["text"] for part in body["messages"][-1]["content"] if part["type"] == "text")
        self.heard.append(asked)
        if self.away:
            return Response("no backend", 503)
        await asyncio.sleep(self.seconds)
        known = "the other colour" in asked and wears(number)["upper_colour"] == wears(SHOWN)["upper_colour"]
        facets = body["response_format"]["json_schema"]["schema"]["properties"]
        return completion(
            json.dumps({**dict.fromkeys(facets, "unknown"), **({"upper_colour": OTHER} if known else {})})
        )


@pytest.fixture(scope="module")
def endpoint() -> Iterator[ChatServer]:
    server = ChatServer(Reads())
    yield server
    server.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    folder = tmp_path_factory.mktemp("understood")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CECA_CACHE", str(folder / "cache"))
        store = Store(str(folder / "data"))
        publish_people(store, COUNT)
        publish_gallery(store, *publish_tiny(store, "tiny", seed=0), "tiny")
        yield store


@pytest.fixture(scope="module")
def service(store: Store, endpoint: ChatServer) -> Iterator[TestClient]:
    asked = OpenAIConfig(base_url=endpoint.url, model="chat", retries=0)
    config = ServeConfig(rerank_engine="openai", openai=asked, timeout_s=60, rerank_seconds_limit=25)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("serve.judge.OnDemand", InThisProcess)
        patch.setattr("serve.engine.RETRY_S", 0.0)
        with TestClient(make_api(WithEngine(store, config), config, Gate(())), HERE) as client:
            yield client


def understood(client: TestClient, words: str, **body: Any) -> dict[str, Any]:
    answer = client.post("/v1/understand", json={"words": words, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def by_engine(client: TestClient, words: str, **body: Any) -> dict[str, Any]:
    """What is understood once the engine has started."""
    deadline = time.monotonic() + 30
    while "is starting" in (read := understood(client, words, image_id=IMAGE, **{"seconds": 25, **body}))["reason"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return read


def test_an_engine_reads_the_words_beside_the_picture_that_was_shown(service: TestClient, endpoint: ChatServer):
    endpoint.reply = reads = Reads()
    read = by_engine(service, "no, the other colour", facet="upper_colour")
    assert (read["answers"], read["by"], read["reason"]) == ({"upper_colour": OTHER}, "engine", "")
    assert 0 < read["seconds"] < 25
    assert '"no, the other colour"' in reads.heard[-1]
    assert "What colour are the clothes on the upper body?" in reads.heard[-1]
    found = service.post("/v1/search", json={"query": "a person", "answers": read["answers"], "top_k": 16}).json()
    first = wears(next(n for n in range(COUNT) if schema.image_id(f"{n:04d}.jpg") == found["hits"][0]["image_id"]))
    assert first["upper_colour"] == OTHER


def test_what_the_vocabulary_reads_stays_where_the_engine_is_not_sure(service: TestClient, endpoint: ChatServer):
    endpoint.reply = Reads()
    read = by_engine(service, "a red shirt")
    assert (read["answers"], read["by"]) == ({"upper_colour": "red"}, "engine")


def test_a_slow_or_absent_engine_leaves_the_words_and_says_so(service: TestClient, endpoint: ChatServer):
    endpoint.reply = reads = Reads()
    by_engine(service, "the other colour")
    reads.seconds = 30.0
    late = understood(service, "a red shirt", image_id=IMAGE, seconds=0.3)
    assert (late["answers"], late["by"]) == ({"upper_colour": "red"}, "words")
    assert late["reason"] == "the engine has not read the words within 0.3 s"
    assert late["seconds"] < 10
    reads.seconds, reads.away = 0.0, True
    away = understood(service, "a red shirt", image_id=IMAGE, seconds=25)
    assert (away["answers"], away["by"]) == ({"upper_colour": "red"}, "words")
    assert "HTTP 503: no backend" in away["reason"]
    reads.away = False
    assert by_engine(service, "the other colour")["by"] == "engine"


def test_the_engine_is_asked_only_within_seconds_and_beside_a_picture(service: TestClient, endpoint: ChatServer):
    endpoint.reply = reads = Reads()
    assert understood(service, "red", facet="upper_colour", image_id=IMAGE)["answers"] == {"upper_colour": "red"}
    unseen = understood(service, "red", facet="upper_colour", seconds=5)
    assert (unseen["answers"], unseen["by"]) == ({"upper_colour": "red"}, "words")
    assert unseen["reason"].endswith("name one by image_id")
    assert reads.heard == []


def test_a_service_without_an_engine_reads_the_words(store: Store):
    config = ServeConfig(rerank_seconds_limit=3.0)
    with TestClient(make_api(InProcess(store, config, ()), config, Gate(())), HERE) as client:
        read = understood(client, "no, red", facet="upper_colour", image_id=IMAGE, seconds=2)
        assert (read["answers"], read["by"]) == ({"upper_colour": "red"}, "words")
        assert read["reason"].endswith("without rerank_engine")
        assert understood(client, "a person in boots")["answers"] == {}  # the gallery's images are not known for shoes
        for body, status, says in (
            ({"words": " "}, 422, "the query is empty"),
            ({"words": "x" * 2001}, 422, "the text has 2001 characters"),
            ({"words": "red", "facet": "identity"}, 422, "people are asked about upper_colour"),
            ({"words": "red", "seconds": 4}, 422, "seconds is too large: this service gives an engine 3"),
            ({"words": "red", "seconds": 0}, 422, "greater than 0"),
            ({"words": "red", "image_id": "0" * 16}, 404, "no image 0000000000000000"),
            ({"words": "red", "image_id": "../x"}, 422, "match pattern"),
            ({"words": "red", "colour": "x"}, 422, "Extra inputs are not permitted"),
        ):
            refused = client.post("/v1/understand", json=body)
            assert (refused.status_code, says in refused.text) == (status, True), refused.text


def test_what_was_understood_can_be_answered_though_no_image_is_known_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CECA_CACHE", str(tmp_path / "cache"))
    store, config = Store(str(tmp_path / "data")), ServeConfig()
    publish_people(store, 4, structured=False)
    publish_gallery(store, *publish_tiny(store, "tiny", seed=0), "tiny")
    with TestClient(make_api(InProcess(store, config, ()), config, Gate(())), HERE) as client:
        read = understood(client, "a cap", facet="hat")
        assert read["answers"] == {"hat": "cap"}
        plain, told = (
            client.post("/v1/search", json={"query": "a person", **body}).json()["hits"]
            for body in ({}, {"answers": read["answers"], "suggest": True})
        )
        assert [hit["image_id"] for hit in told] == [hit["image_id"] for hit in plain]


def test_the_client_and_the_page_hold_a_conversation_in_own_words(running: Running, browser: Browser) -> None:
    with Client(running.url) as client:
        asked = client.search("a person", suggest=True)
        assert asked.question is not None
        read = client.understand("It was red.", facet=asked.question.facet, image_id=asked.hits[0].image_id)
        assert read.answers == {"upper_colour": "red"}
        with pytest.raises(ClientError, match="people are asked about upper_colour"):
            client.understand("It was red.", facet="mood")
    page = browser.new_page()
    page.goto(f"{running.url}/#q=a person&talk=1")
    words = page.get_by_label("Or in your own words")
    words.fill("it was of some colour")
    words.press("Enter")
    expect(page.locator("#talk")).to_contain_text("None of that was understood")
    words.fill("No, red!")
    page.get_by_role("button", name="Tell").click()
    expect(page.get_by_role("button", name="Remove upper colour: red")).to_be_visible()
    expect(page.get_by_text("No further question would help")).to_be_visible()
    assert re.search("answer.upper_colour=red", page.url)
    page.get_by_label("In your own words").fill("it was green")  # unasked, and of what?
    page.get_by_role("button", name="Tell").click()
    expect(page.locator("#talk")).to_contain_text("None of that was understood")
    page.close()
