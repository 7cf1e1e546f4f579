"""OpenAI engine against a real HTTP server that fails on request."""

import asyncio
import base64
import email.utils
import io
import json
import time
from typing import Any

import numpy as np
import pytest
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from PIL import Image

from ceca.config import OpenAIConfig
from ceca.dialogue.conversation import QUESTIONS, SUMMARY_REQUEST, Answer, DialogueError, EngineError, Subject, converse
from ceca.dialogue.openai import LONGEST_WAIT_S, OpenAIEngine, _retry_after
from tests.ceca.dialogue.openai.conftest import SUBJECT, ask, encode, make, refusal, use
from tests.endpoint import completion

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


def message(finish_reason: str = "stop", **fields: Any) -> JSONResponse:
    """Response with a message that has these fields."""
    return JSONResponse({"choices": [{"message": {"role": "assistant", **fields}, "finish_reason": finish_reason}]})


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thoughts_that_an_endpoint_keeps_apart_are_known_of(endpoint, field):
    endpoint.replies = [message(content="a man", **{field: "Is it a man?"})]
    assert ask(make(endpoint)) == Answer("a man", thought=True)


def test_content_in_parts_is_joined_without_its_thoughts(endpoint):
    parts = [{"type": "thinking", "thinking": [{"text": "Is it?"}]}, {"type": "text", "text": "a"}, "man"]
    endpoint.replies = [message(content=parts)]
    assert ask(make(endpoint)) == Answer("a man", thought=True)


@pytest.mark.parametrize(
    "reply",
    [
        message(content=None, refusal="I can't help with that."),
        message(content=[{"type": "refusal", "refusal": "I can't help with that."}]),
        message("content_filter", content="A man in"),
        message("content_filter", content=None),
        message("SAFETY", content=""),
        JSONResponse({"error": {"code": "content_filter", "message": "The response was filtered"}}, 400),
        JSONResponse({"error": {"message": "your prompt was flagged: usage policy"}}, 400),
        JSONResponse({"error": {"message": "requires moderation and your input was flagged"}}, 403),
    ],
)
def test_a_refusal_beside_the_text_rejects_the_image(endpoint, reply):
    endpoint.replies = [reply]
    limits = {"questions": 1, "answer_tokens": 48, "summary_tokens": 128}
    with pytest.raises(DialogueError) as caught:
        use(make(endpoint), lambda engine: converse(engine, SUBJECT, **limits))
    assert caught.value.reason == "refused"
    assert len(endpoint.bodies) == 1


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (rb'{"choices": [{"message": {"content": "half \ud83d of a face"}}]}', "half \ud83d of a face"),
        (b'{"choices": [{"message": {"content": "caf\xe9"}}]}', "caf\ufffd"),
        (b'\xef\xbb\xbf{"choices": [{"message": {"content": "a man"}}]}', "a man"),
    ],
)
def test_a_body_with_damaged_characters_is_read(endpoint, body, text):
    endpoint.replies = [Response(body, media_type="application/json")]
    assert ask(make(endpoint)).text == text


@pytest.mark.parametrize("count", [float("inf"), -1, 10**30, "many", [1]])
def test_a_number_of_tokens_that_is_none_counts_as_nothing(endpoint, count):
    body = json.dumps({"choices": [{"message": {"content": "a man"}}], "usage": {"prompt_tokens": count}})
    endpoint.replies = [Response(body, media_type="application/json")]
    assert ask(make(endpoint)) == Answer("a man")


def test_a_body_nested_without_end_rejects_the_image(endpoint):
    endpoint.replies = [Response(b"[" * 100_000, media_type="application/json")]
    with pytest.raises(DialogueError, match="not a chat completion"):
        ask(make(endpoint))


# --- what a model does not take ---------------------------------------------------------------------------


def not_taken(text: str, status: int = 400, **fields: Any) -> JSONResponse:
    return JSONResponse({"error": {"message": text, **fields}}, status)


OTHER_NAME = (
    "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
)


def test_a_model_that_wants_the_other_name_of_the_limit_is_asked_again_and_it_is_remembered(endpoint, waits):
    endpoint.replies = [not_taken(OTHER_NAME, param="max_tokens", code="unsupported_parameter"), completion()]

    async def twice(engine: OpenAIEngine) -> list[str]:
        return [(await engine.answer(SUBJECT, (), "Who?", 48)).text for _ in range(2)]

    assert use(make(endpoint, retries=0), twice) == ["a man", "a man"]
    assert [body.get("max_tokens") for body in endpoint.bodies] == [48, None, None]
    assert [body.get("max_completion_tokens") for body in endpoint.bodies] == [None, 48, 48]
    assert not waits


@pytest.mark.parametrize(
    ("reply", "left_out"),
    [
        (
            not_taken(
                "Unsupported value: 'temperature' does not support 0.0 with this model. Only the default (1) value is "
                "supported.",
                param="temperature",
            ),
            "temperature",
        ),
        (not_taken("`temperature` is deprecated for this model."), "temperature"),
        (not_taken("Unrecognized request argument supplied: seed"), "seed"),
        (
            JSONResponse({"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}, 422),
            "seed",
        ),
    ],
)
def test_what_a_model_does_not_take_is_left_out(endpoint, caplog, reply, left_out):
    endpoint.replies = [reply, completion()]
    assert ask(make(endpoint)).text == "a man"
    assert left_out in endpoint.bodies[0]
    assert endpoint.bodies[1] == {name: value for name, value in endpoint.bodies[0].items() if name != left_out}
    assert f"does not take {left_out} and is asked without" in caplog.text


def test_several_parameters_are_left_out_one_after_the_other(endpoint):
    taken = {"model", "messages"}

    async def strict(body: dict[str, Any]) -> Response:
        other = sorted(body.keys() - taken)
        return not_taken(f"Unknown parameter: '{other[0]}'.", param=other[0]) if other else completion()

    endpoint.replies = [strict]
    assert ask(make(endpoint, retries=0)).text == "a man"
    assert endpoint.bodies[-1].keys() == taken


def test_a_limit_that_is_too_large_is_no_unknown_parameter(endpoint):
    endpoint.replies = [not_taken("max_tokens is too large: 48. This model supports at most 32 tokens.")]
    with pytest.raises(DialogueError, match="too large"):
        ask(make(endpoint))
    assert len(endpoint.bodies) == 1


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
