"""OpenAI engine against a real HTTP server that fails on request."""

import asyncio
import base64
import email.utils
import io
import logging
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fastapi import Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from PIL import Image

from ceca.config import OpenAIConfig
from ceca.dialogue.conversation import QUESTIONS, SUMMARY_REQUEST, Answer, DialogueError, EngineError, Subject, converse
from ceca.dialogue.openai import LONGEST_WAIT_S, OpenAIEngine, _retry_after
from tests.endpoint import ChatServer, completion

KEY = "sk-test-1234567890"


def encode(form: str) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 16), "red").save(content, form)
    return content.getvalue()


SUBJECT = Subject("one", encode("JPEG"))


def refusal(status: int, message: str = "no", **headers: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message}}, status, headers)


class Endpoint(ChatServer):
    """Server that gives `replies` in order and repeats the last one. It records bodies and keys."""

    def __init__(self) -> None:
        self.replies: list[Response | Callable[[dict[str, Any]], Any]] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        super().__init__(self.next_reply)

    async def next_reply(self, body: dict[str, Any], request: Request) -> Response:
        self.bodies.append(body)
        self.keys.append(request.headers.get("authorization"))
        reply = self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]
        return await reply(body) if callable(reply) and not isinstance(reply, Response) else reply


@pytest.fixture(scope="module")
def server() -> Iterator[Endpoint]:
    served = Endpoint()
    yield served
    served.close()


@pytest.fixture
def endpoint(server: Endpoint) -> Endpoint:
    server.replies, server.bodies, server.keys = [completion()], [], []
    return server


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Waits between the attempts in seconds. The engine does not really wait."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        await asyncio.sleep(0)

    monkeypatch.setattr("ceca.dialogue.openai.asyncio", SimpleNamespace(sleep=sleep))
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return slept


def make(endpoint: Endpoint, **settings: Any) -> OpenAIEngine:
    return OpenAIEngine(OpenAIConfig(base_url=endpoint.url, model="tiny", **settings), temperature=0.0, seed=7)


def use(engine: OpenAIEngine, act: Callable[[OpenAIEngine], Any]) -> Any:
    async def run() -> Any:
        await engine.start()
        try:
            return await act(engine)
        finally:
            await engine.close()

    return asyncio.run(run())


def ask(engine: OpenAIEngine, subject: Subject = SUBJECT) -> Answer:
    return use(engine, lambda engine: engine.answer(subject, (), "Who?", 48))


# --- requests ---------------------------------------------------------------------------------------------


def test_a_conversation_sends_the_image_once_and_every_earlier_turn(endpoint):
    endpoint.replies = [completion(f"a{n}") for n in range(6)]
    limits = {"questions": 5, "answer_tokens": 48, "summary_tokens": 128}
    dialogue = use(make(endpoint), lambda engine: converse(engine, SUBJECT, **limits))
    assert [turn.answer for turn in dialogue.turns] == ["a0", "a1", "a2", "a3", "a4"]
    assert dialogue.summary == "a5"
    for position, body in enumerate(endpoint.bodies):
        roles = [message["role"] for message in body["messages"]]
        assert roles == ["user", "assistant"] * position + ["user"]
        texts = [message["content"][-1]["text"] for message in body["messages"][::2]]
        assert texts == [*QUESTIONS, SUMMARY_REQUEST][: position + 1]
        assert [message["content"] for message in body["messages"][1::2]] == [f"a{n}" for n in range(position)]
        images = [part for message in body["messages"][::2] for part in message["content"] if part["type"] != "text"]
        assert images == [body["messages"][0]["content"][0]]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP"])
def test_the_image_is_sent_unchanged(endpoint, form):
    content = encode(form)
    ask(make(endpoint), Subject("one", content))
    url = endpoint.bodies[0]["messages"][0]["content"][0]["image_url"]["url"]
    assert url == f"data:image/{form.lower()};base64,{base64.b64encode(content).decode()}"


def test_an_image_that_endpoints_misread_is_sent_as_a_viewer_shows_it(endpoint):
    infrared = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    content = io.BytesIO()
    Image.fromarray(infrared).save(content, "PNG")
    ask(make(endpoint), Subject("one", content.getvalue()))
    url = endpoint.bodies[0]["messages"][0]["content"][0]["image_url"]["url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    assert (np.asarray(sent.convert("L")) == infrared // 257).all()


def test_model_length_temperature_and_seed_are_sent(endpoint):
    ask(make(endpoint))
    sent = {name: endpoint.bodies[0][name] for name in ("model", "max_tokens", "temperature", "seed")}
    assert sent == {"model": "tiny", "max_tokens": 48, "temperature": 0.0, "seed": 7}


def test_an_undecodable_image_is_rejected_and_not_sent(endpoint):
    with pytest.raises(DialogueError) as caught:
        ask(make(endpoint), Subject("one", b"nope"))
    assert caught.value.reason == "not_an_image"
    assert endpoint.bodies == []


# --- responses --------------------------------------------------------------------------------------------


def test_tokens_come_from_the_usage_and_the_length_limit_is_reported(endpoint):
    details = {"cached_tokens": 64}
    endpoint.replies = [
        completion("a man", "length", prompt_tokens=100, completion_tokens=48, prompt_tokens_details=details)
    ]
    assert ask(make(endpoint)) == Answer(
        "a man", prompt_tokens=100, cached_tokens=64, completion_tokens=48, cut_off=True
    )


@pytest.mark.parametrize("usage", [{}, {"prompt_tokens": None, "prompt_tokens_details": None}])
def test_an_endpoint_need_not_count_tokens(endpoint, usage):
    endpoint.replies = [completion("a man", **usage)]
    assert ask(make(endpoint)) == Answer("a man")


@pytest.mark.parametrize(
    "reply",
    [HTMLResponse("<p>Welcome"), JSONResponse([1]), JSONResponse({"choices": []}), JSONResponse({"choices": [{}]})],
    ids=["html", "list", "no choice", "no message"],
)
def test_something_other_than_a_completion_rejects_the_image(endpoint, reply):
    endpoint.replies = [reply]
    with pytest.raises(DialogueError, match="not a chat completion") as caught:
        ask(make(endpoint))
    assert caught.value.reason == "endpoint_error"


# --- temporary failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_a_temporary_failure_is_retried(endpoint, waits, status):
    endpoint.replies = [refusal(status), refusal(status), completion()]
    assert ask(make(endpoint)).text == "a man"
    assert len(waits) == 2


def test_waits_double_with_jitter_up_to_a_limit(endpoint, waits):
    endpoint.replies = [*(refusal(503) for _ in range(9)), completion()]
    ask(make(endpoint, retries=9))
    for attempt, seconds in enumerate(waits):
        middle = min(LONGEST_WAIT_S, 0.5 * 2**attempt)
        assert 0.5 * middle <= seconds <= 1.5 * middle


def test_retry_after_in_seconds_is_honoured(endpoint, waits):
    endpoint.replies = [refusal(429, **{"retry-after": "7"}), completion()]
    ask(make(endpoint))
    assert waits == [7.0]


def test_retry_after_as_a_date_is_honoured(endpoint, waits):
    date = email.utils.formatdate(time.time() + 30, usegmt=True)
    endpoint.replies = [refusal(503, **{"retry-after": date}), completion()]
    ask(make(endpoint))
    assert waits[0] == pytest.approx(30, abs=5)


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(None, None), ("soon", None), ("-3", 0.0), ("86400", LONGEST_WAIT_S), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0)],
)
def test_a_retry_after_is_never_negative_or_too_long(value, seconds):
    assert _retry_after(value) == seconds


def test_a_slow_answer_is_retried(endpoint):
    async def slow(_: dict[str, Any]) -> Response:
        await asyncio.sleep(0.5)
        return completion("too late")

    endpoint.replies = [slow, completion("in time")]
    assert ask(make(endpoint, timeout_s=0.2)).text == "in time"


# --- permanent failures -----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_endpoint_that_keeps_failing_ends_the_run(endpoint, status):
    endpoint.replies = [refusal(status, "overloaded")]
    with pytest.raises(EngineError, match=rf"failed 3 times; last failure: HTTP {status}.*overloaded.*finished images"):
        ask(make(endpoint, retries=2))
    assert len(endpoint.bodies) == 3


def test_only_the_image_that_causes_failures_is_rejected(endpoint):
    other_is_answered = asyncio.Event()

    async def reply(body: dict[str, Any]) -> Response:
        if "poison" in body["messages"][0]["content"][-1]["text"]:
            await other_is_answered.wait()
            return refusal(500, "internal error")
        return completion()

    async def both(engine: OpenAIEngine) -> Any:
        poison = asyncio.ensure_future(engine.answer(SUBJECT, (), "poison", 48))
        while not endpoint.bodies:
            await asyncio.sleep(0.01)
        good = await engine.answer(SUBJECT, (), "Who?", 48)
        endpoint.server.servers[0].get_loop().call_soon_threadsafe(other_is_answered.set)
        return good, (await asyncio.gather(poison, return_exceptions=True))[0]

    endpoint.replies = [reply]
    good, bad = use(make(endpoint, retries=1), both)
    assert good.text == "a man"
    assert isinstance(bad, DialogueError)
    assert bad.reason == "endpoint_error"


@pytest.mark.parametrize("status", [401, 402, 403, 404, 405])
def test_a_refused_key_or_unknown_model_ends_the_run_at_once(endpoint, status):
    endpoint.replies = [refusal(status, "not for you")]
    with pytest.raises(EngineError, match=rf"HTTP {status}.*not for you.*--openai.base-url.*\$OPENAI_API_KEY"):
        ask(make(endpoint))
    assert len(endpoint.bodies) == 1


def test_a_redirect_is_not_followed_with_the_key(endpoint):
    endpoint.replies = [RedirectResponse("http://127.0.0.1:9/elsewhere")]
    with pytest.raises(EngineError, match="HTTP 307"):
        ask(make(endpoint))


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_refused_request_rejects_its_image_at_once(endpoint, status):
    endpoint.replies = [refusal(status, "image too odd")]
    with pytest.raises(DialogueError, match=f"HTTP {status}.*image too odd") as caught:
        ask(make(endpoint))
    assert caught.value.reason == "endpoint_error"
    assert len(endpoint.bodies) == 1


def test_a_conversation_over_the_context_length_has_its_own_reason(endpoint):
    endpoint.replies = [refusal(400, "This model's maximum context length is 1024 tokens.")]
    with pytest.raises(DialogueError) as caught:
        ask(make(endpoint))
    assert caught.value.reason == "conversation_too_long"


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/v1", "127.0.0.1:9/v1", "http://[::1/v1"])
def test_a_missing_endpoint_is_an_error_at_the_start(url):
    engine = OpenAIEngine(OpenAIConfig(base_url=url, model="tiny"), temperature=0.0, seed=0)
    with pytest.raises(EngineError, match=r"nothing answers at .*--openai\.base-url"):
        asyncio.run(engine.start())


# --- the key ----------------------------------------------------------------------------------------------


def test_the_key_comes_from_the_named_variable(endpoint, monkeypatch):
    monkeypatch.setenv("MY_KEY", f"{KEY}-mine\n")
    ask(make(endpoint, api_key_variable="MY_KEY"))
    assert endpoint.keys == [f"Bearer {KEY}-mine"]


def test_a_key_is_optional(endpoint, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    ask(make(endpoint))
    assert endpoint.keys == [None]


@pytest.mark.parametrize("status", [400, 401, 500])
def test_the_key_is_in_no_message_even_if_the_endpoint_repeats_it(endpoint, caplog, status):
    endpoint.replies = [refusal(status, f"bad key {KEY}")]
    with caplog.at_level(logging.DEBUG), pytest.raises((DialogueError, EngineError)) as caught:
        ask(make(endpoint, retries=0))
    assert "bad key ***" in str(caught.value)
    assert KEY not in str(caught.value) + caplog.text
    assert caught.value.__cause__ is None


def test_an_invalid_key_is_refused_without_repeating_it(endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}…")
    with pytest.raises(EngineError, match=r"\$OPENAI_API_KEY") as caught:
        ask(make(endpoint))
    assert KEY not in str(caught.value)
