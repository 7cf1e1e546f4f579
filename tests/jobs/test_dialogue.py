"""The dialogue stage against endpoints of every temper: nothing is lost, nothing done twice, nothing wasted."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from ceca.config import DialogueConfig, OpenAIConfig, OracleConfig, VLLMConfig
from ceca.data.store import Store
from ceca.dialogue.attributes import UNKNOWN
from ceca.dialogue.conversation import EngineError
from ceca.errors import UserError
from ceca.settings import to_mapping
from jobs.dialogue import dialogue
from jobs.dialogues.engine import engine_workers
from jobs.dialogues.worker import DialogueWorker
from jobs.ingest import ingest
from jobs.pipeline import recipe_config
from tests.endpoint import ChatServer, completion, digest_of
from tests.jobs.conftest import SMALL
from tests.stages import in_this_process

IMAGES = 24


@pytest.fixture(scope="module")
def ingested(drawn, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("asked")
    with in_this_process():
        ingest(str(data), recipe_config(SMALL[1], "ingest", source=str(drawn), limit=IMAGES))
    return data


@pytest.fixture
def data(ingested: Path, tmp_path: Path) -> Path:
    """A dataset of its own without dialogues."""
    shutil.copytree(ingested, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def serve() -> Iterator[Callable[..., ChatServer]]:
    servers: list[ChatServer] = []

    def start(reply: Any) -> ChatServer:
        servers.append(ChatServer(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def asking(server: ChatServer, data: Path, *arguments: object) -> tuple[object, ...]:
    engine = ("--engine", "openai", "--openai.base-url", server.url, "--openai.model", "m")
    return ("--data", data, *engine, "--images-per-part", 6, "--conversations", 4, *arguments)


def rows(store: Store) -> list[dict[str, Any]]:
    return store.read(store.current("dialogues")).to_pylist()


def rejected(store: Store) -> dict[str, str]:
    table = store.read(store.current("rejects/dialogue"))
    return {row["key"]: row["reason"] for row in table.to_pylist()} if table.num_rows else {}


def image_ids(store: Store) -> list[str]:
    return store.read(store.current("images"), ["image_id"])["image_id"].to_pylist()


@pytest.mark.slow
def test_each_image_is_completed_or_rejected_by_an_endpoint_that_misbehaves_in_every_way(run, serve, data):
    faults = itertools.cycle(["", "", "busy", "", "", "error", "", "", "garbage", "", "", "nothing", ""])

    async def reply(body: dict[str, Any], request: Request) -> Response:
        fault = next(faults)
        if fault == "nothing":
            await asyncio.sleep(30)
        if fault == "garbage":
            return HTMLResponse("<h1>It works!</h1>")
        if fault:
            return JSONResponse({"error": fault}, 429 if fault == "busy" else 500, {"Retry-After": "0.1"})
        return completion(f"about {digest_of(body)}", prompt_tokens=50, completion_tokens=5)

    settings = ("--openai.timeout-s", 1, "--openai.retries", 4, "--no-canary")
    started = time.monotonic()
    finished = run("dialogue", *asking(serve(reply), data, *settings))
    assert time.monotonic() - started < 120
    store = Store(str(data))
    done, refused = [row["image_id"] for row in rows(store)], rejected(store)
    assert sorted([*done, *refused]) == sorted(image_ids(store))
    assert set(refused.values()) == {"endpoint_error"}
    assert done
    words = " ".join(finished.stdout.split())
    for said in ("tokens/s", "of prompts from cache", "conversations in flight on average", "seconds per 1,000 images"):
        assert said in words


@pytest.mark.slow
def test_only_missing_asks_about_the_others_alone_and_publishes_both(run, drawn, serve, data):
    refusing = True
    asked: list[str] = []

    async def reply(body: dict[str, Any], request: Request) -> Response:
        name = digest_of(body)
        asked.append(name)
        if refusing and name < "8":
            return JSONResponse({"error": {"message": "unsafe"}}, 400)
        return completion(f"about {name}", prompt_tokens=50, completion_tokens=5)

    server, store = serve(reply), Store(str(data))
    run("dialogue", *asking(server, data))
    first, refused = rows(store), rejected(store)
    assert first
    assert refused
    refusing = False
    asked.clear()
    run("dialogue", *asking(server, data, "--only-missing", "--no-canary"))
    assert len(asked) == 6 * len(refused)
    assert {name < "8" for name in asked} == {True}
    both = rows(store)
    assert both[: len(first)] == first
    assert sorted(row["image_id"] for row in both) == sorted(image_ids(store))
    asked.clear()
    again = DialogueConfig(
        engine="openai",
        only_missing=True,
        images_per_part=6,
        openai=OpenAIConfig(base_url=server.url, model="m"),
    )
    assert dialogue(str(data), again)["dialogues"] == store.current("dialogues")  # none is missing
    with pytest.raises(UserError, match="answer_tokens: 48 there, 9 here"):
        dialogue(str(data), dataclasses.replace(again, answer_tokens=9))
    # Images that were taken out leave dialogues that hold for the rest.
    run("ingest", *SMALL, "--source", drawn, "--data", data, "--limit", IMAGES - 4)
    fewer = dialogue(str(data), again)["dialogues"]
    assert fewer.made_from["images"] == store.current("images").version
    assert rows(store) == both
    assert not asked


# --- one worker, in this process --------------------------------------------------------------------------


def make_worker(data: Path, config: DialogueConfig, canaries: int = 0, **known: Any) -> tuple[DialogueWorker, dict]:
    """A worker on a dataset, and all its images as one unit of work."""
    store = Store(str(data))
    images = store.current("images")
    work, checked = ({"images": [[0, count]]} for count in (images.rows, canaries))
    options = {"vocabulary": None, "choices": None, **known}
    return DialogueWorker(store.uri, images, to_mapping(config), canaries=checked, **options), work


def through(server: ChatServer) -> DialogueConfig:
    return DialogueConfig(engine="openai", openai=OpenAIConfig(base_url=server.url, model="m"))


def test_a_model_that_does_not_see_the_images_is_found_out_at_once(serve, ingested):
    count = 0

    async def reply(body: dict[str, Any], request: Request) -> Response:
        nonlocal count
        count += 1
        return completion("I cannot see images, but I am happy to help.")

    with pytest.raises(EngineError, match="gives the same description of 4 different images"):
        make_worker(ingested, through(serve(reply)), canaries=4)
    assert count == 4


def test_thoughts_refusals_and_odd_characters_reach_no_table(serve, ingested):
    def mood(body: dict[str, Any]) -> str:
        return ("refuses", "refuses once", "thinks", "half", "filtered")[int(digest_of(body), 16) % 5]

    async def reply(body: dict[str, Any], request: Request) -> Response:
        if "max_tokens" in body:
            return JSONResponse({"error": {"message": "Unsupported parameter: 'max_tokens'"}}, 400)
        turn, kind = len(body["messages"]) // 2, mood(body)
        if kind == "refuses" or (kind == "refuses once" and turn == 0):
            return completion("I'm sorry, but I can't help with that.")
        if kind == "half":
            content = rb'{"choices": [{"message": {"content": "a \ud83d man"}}]}'
            return Response(content, media_type="application/json")
        if kind == "filtered" and turn == 3:
            return completion(None, "content_filter")
        return completion(f"<think>{turn}</think>about {digest_of(body)}" if kind == "thinks" else "about one")

    worker, work = make_worker(ingested, through(serve(reply)))
    output = worker(work)
    table = output.tables["dialogues"].to_pylist()
    assert {reject.reason for reject in output.rejects} == {"refused"}
    assert len(table) + len(output.rejects) == IMAGES
    flags = {flag: [row for row in table if flag in row["flags"]] for flag in ("answer_refused", "thoughts_removed")}
    assert all(row["turns"][0]["answer"].startswith("I'm sorry") for row in flags["answer_refused"])
    assert all(row["summary"].startswith("about") for row in flags["thoughts_removed"])
    assert {row["summary"] for row in table if row["flags"] == ["repeated"]} == {"a \ufffd man"}
    assert all(flags.values())


def test_a_model_that_refuses_every_image_is_found_out_at_once(serve, ingested):
    async def reply(body: dict[str, Any], request: Request) -> Response:
        return completion(f"<think>No.</think>I'm sorry, I can't describe {digest_of(body)}.")

    with pytest.raises(EngineError, match=r"m refuses to describe 4 of 4 images \(\"I'm sorry, I can't describe"):
        make_worker(ingested, through(serve(reply)), canaries=4)


def test_thoughts_do_not_make_equal_descriptions_different(serve, ingested):
    async def reply(body: dict[str, Any], request: Request) -> Response:
        return completion(f"<think>{digest_of(body)}</think>A person.")

    with pytest.raises(EngineError, match="gives the same description of 4 different images"):
        make_worker(ingested, through(serve(reply)), canaries=4)


def test_a_summary_that_most_images_share_is_flagged(serve, ingested):
    async def reply(body: dict[str, Any], request: Request) -> Response:
        return completion("a person" if digest_of(body) > "3" else f"about {digest_of(body)}", "length")

    worker, work = make_worker(ingested, through(serve(reply)))
    output = worker(work)
    for row in output.tables["dialogues"].to_pylist():
        assert ("repeated" in row["flags"]) == (row["summary"] == "a person")
        assert "summary_cut_off" in row["flags"]
    assert 0 < output.counts["flag_repeated"] < output.counts["flag_summary_cut_off"] == IMAGES


def test_structured_answers_follow_the_vocabulary_of_the_dataset(ingested):
    store = Store(str(ingested))
    attributes = store.current("attributes")
    vocabulary = {name: tuple(values) for name, values in attributes.notes["vocabulary"].items()}
    config = DialogueConfig(engine="oracle", attributes=True, oracle=OracleConfig(error_rate=0))
    worker, work = make_worker(ingested, config, vocabulary=vocabulary, choices=vocabulary)
    known = {row["image_id"]: dict(row["attributes"]) for row in store.read(attributes).to_pylist()}
    for row in worker(work).tables["dialogues"].to_pylist():
        assert row["attributes"]
        assert dict(row["attributes"]).items() <= known[row["image_id"]].items()
        assert UNKNOWN not in dict(row["attributes"]).values()


@pytest.mark.parametrize(
    ("values", "units"),
    [
        ({"engine": "oracle"}, 2),  # 64 conversations of 128 images
        ({"engine": "oracle", "images_per_part": 16}, 5),
        ({"engine": "openai", "conversations": 300}, 4),
        ({"engine": "vllm"}, 9),  # 1,024 conversations
        ({"engine": "vllm", "vllm": VLLMConfig(sequences=100)}, 2),
        ({"engine": "vllm", "vllm": VLLMConfig(gpus=0)}, 2),
    ],
)
def test_a_worker_gets_enough_units_for_its_conversations(values, units):
    config = DialogueConfig(**values)
    assert engine_workers(config, config.images_per_part).units_at_once == units
