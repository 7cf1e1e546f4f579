"""Chat-completions server in this process, for tests of the openai engine. The replies are up to the test."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response


def completion(text: Any = "a man", finish_reason: str = "stop", **usage: Any) -> JSONResponse:
    """Response with one chat completion."""
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    return JSONResponse({"choices": [choice], "usage": usage})


class ChatServer:
    """Server on a free port of this machine.

    Args:
        reply: coroutine function (body, request) → response.
    """

    def __init__(self, reply: Callable[[dict[str, Any], Request], Any]):
        self.reply = reply
        app = FastAPI()
        app.post("/v1/chat/completions")(self._complete)
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        port = self.server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"

    async def _complete(self, request: Request) -> Response:
        return await self.reply(await request.json(), request)

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(5)


class Describer:
    """Reply that depends on the image and the turn, after a delay. It counts the questions about each image.

    Args:
        seconds: delay of a reply.
    """

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.asked: Counter[str] = Counter()  # digest of the image → number of questions

    async def __call__(self, body: dict[str, Any], request: Request) -> Response:
        name = digest_of(body)
        self.asked[name] += 1
        await asyncio.sleep(self.seconds)
        turn = sum(message["role"] == "user" for message in body["messages"])
        return completion(f"turn {turn} about {name}", prompt_tokens=100 * turn, completion_tokens=8)


def digest_of(body: dict[str, Any]) -> str:
    """Digest of the image in a request."""
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    return hashlib.sha256(base64.b64decode(url.split(",", 1)[1])).hexdigest()[:12]
