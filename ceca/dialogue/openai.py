"""Any endpoint that speaks OpenAI's chat completions with images."""

from __future__ import annotations

import asyncio
import base64
import email.utils
import os
import random
import time
from collections.abc import Sequence
from typing import Any

import httpx

from ceca.config import OpenAIConfig
from ceca.datasets.images import ImageError, check_image, mime_type
from ceca.dialogue.conversation import Answer, DialogueError, EngineError, Subject, Turn

LONGEST_WAIT_S = 120.0


class OpenAIEngine:
    """Asks an endpoint over HTTP; passing faults are tried again, and a Retry-After is honoured."""

    def __init__(self, config: OpenAIConfig, temperature: float, seed: int):
        if not config.model:
            raise EngineError("no model named for the openai engine: pass --openai.model")
        self.config, self.temperature, self.seed = config, temperature, seed
        self.model = config.model
        self.client: httpx.AsyncClient | None = None

    async def start(self) -> None:
        key = os.environ.get(self.config.api_key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        # The worker bounds the conversations in flight, so the pool need not.
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.AsyncClient(headers=headers, timeout=self.config.timeout_s, limits=limits)

    async def close(self) -> None:
        if self.client is not None:
            await self.client.aclose()

    async def answer(self, subject: Subject, history: Sequence[Turn], question: str, max_tokens: int) -> Answer:
        found = await self._post(
            {
                "model": self.config.model,
                "messages": _messages(subject, history, question),
                "max_tokens": max_tokens,
                "temperature": self.temperature,
                "seed": self.seed,
            }
        )
        try:
            choice, usage = found["choices"][0], found.get("usage") or {}
            return Answer(
                text=choice["message"]["content"] or "",
                prompt_tokens=usage.get("prompt_tokens", 0),
                cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
                completion_tokens=usage.get("completion_tokens", 0),
                cut_off=choice.get("finish_reason") == "length",
            )
        except (KeyError, IndexError, TypeError) as error:
            raise DialogueError("endpoint_error", f"not a chat completion ({error!r}): {found!r:.200}") from None

    async def _post(self, body: dict[str, Any]) -> Any:
        assert self.client is not None, "start() comes first"
        url = f"{self.config.base_url.rstrip('/')}/chat/completions"
        problem = ""
        for attempt in range(self.config.retries + 1):
            wait = min(LONGEST_WAIT_S, 0.5 * 2**attempt) * (0.5 + random.random())
            try:
                response = await self.client.post(url, json=body)
            except httpx.TransportError as error:
                problem = f"{type(error).__name__} {error}".strip()
            else:
                if response.is_success:
                    return response.json()
                problem = f"HTTP {response.status_code}: {response.text:.200}"
                if response.status_code in (401, 403, 404):
                    raise EngineError(
                        f"{url} refuses ({problem}); check --openai.base-url, --openai.model and the key in "
                        f"${self.config.api_key_variable}"
                    )
                if response.status_code not in (408, 409, 425, 429) and response.status_code < 500:
                    raise DialogueError("endpoint_error", problem)
                wait = _retry_after(response.headers.get("retry-after")) or wait
            if attempt < self.config.retries:
                await asyncio.sleep(wait)
        raise EngineError(
            f"{url} failed {self.config.retries + 1} times, last with {problem}; check that the endpoint runs, then "
            "start the same command again: finished images are kept"
        )


def _messages(subject: Subject, history: Sequence[Turn], question: str) -> list[dict[str, Any]]:
    """The conversation so far and the next question; the image stands in the first turn."""
    try:
        check_image(subject.image)
    except ImageError as error:
        raise DialogueError(error.reason, error.detail) from None
    url = f"data:{mime_type(subject.image)};base64,{base64.b64encode(subject.image).decode()}"
    asked = [*(turn.question for turn in history), question]
    messages: list[dict[str, Any]] = []
    for position, text in enumerate(asked):
        image = [{"type": "image_url", "image_url": {"url": url}}] if position == 0 else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": text}]})
        if position < len(history):
            messages.append({"role": "assistant", "content": history[position].answer})
    return messages


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait by a Retry-After header, which is a number or a date."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return min(LONGEST_WAIT_S, max(0.0, seconds))
