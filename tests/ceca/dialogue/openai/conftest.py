"""A real HTTP server that answers as it is told, and an engine that asks it."""

import asyncio
import io
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import Request
from fastapi.responses import JSONResponse, Response
from PIL import Image

from ceca.config import OpenAIConfig
from ceca.dialogue.conversation import Answer, Subject
from ceca.dialogue.openai import OpenAIEngine
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
