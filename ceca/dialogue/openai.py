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
from ceca.dialogue.attributes import Choices, json_schema
from ceca.dialogue.conversation import Answer, DialogueError, EngineError, Subject, Turn

LONGEST_WAIT_S = 120.0


class OpenAIEngine:
    """Asks an endpoint over HTTP; passing faults are tried again, and a Retry-After is honoured."""

    def __init__(self, config: OpenAIConfig, temperature: float, seed: int):
        if not config.model:
            raise EngineError("no model named for the openai engine: pass --openai.model")
        self.config, self.temperature, self.seed = config, temperature, seed
        self.model = config.model
        self.url = config.base_url.rstrip("/")
        self.client: httpx.AsyncClient | None = None
        self.key = ""
        self.successes = 0

    async def start(self) -> None:
        self.key = os.environ.get(self.config.api_key_variable, "").strip()
        if not self.key.isascii():
            raise EngineError(f"${self.config.api_key_variable} holds characters that no key has; set it again")
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        # The worker bounds the conversations in flight, so the pool need not.
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.AsyncClient(headers=headers, timeout=self.config.timeout_s, limits=limits)
        try:  # does anything listen there; what it says is no matter, for some endpoints do not list models
            await self.client.get(f"{self.url}/models")
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            await self.close()
            raise EngineError(
                f"nothing answers at {self.url} ({type(error).__name__}: {error}); start the endpoint or mend "
                "--openai.base-url, e.g. http://localhost:8000/v1"
            ) from None
        except httpx.HTTPError:
            pass

    async def close(self) -> None:
        if self.client is not None:
            await self.client.aclose()

    async def answer(
        self, subject: Subject, history: Sequence[Turn], question: str, max_tokens: int, choices: Choices | None = None
    ) -> Answer:
        body: dict[str, Any] = {
            "model": self.config.model,
            "messages": _messages(subject, history, question),
            "max_tokens": max_tokens,
            "temperature": self.temperature,
            "seed": self.seed,
        }
        if choices:
            schema = {"name": "attributes", "schema": json_schema(choices), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        found = await self._post(body)
        try:
            choice, usage = found["choices"][0], found.get("usage") or {}
            return Answer(
                text=str(choice["message"]["content"] or ""),
                prompt_tokens=int(usage.get("prompt_tokens") or 0),
                cached_tokens=int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0),
                completion_tokens=int(usage.get("completion_tokens") or 0),
                cut_off=choice.get("finish_reason") == "length",
            )
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            problem = self._hide(f"not a chat completion ({error!r}): {found!r:.200}")
            raise DialogueError("endpoint_error", problem) from None

    async def _post(self, body: dict[str, Any]) -> Any:
        assert self.client is not None, "start() comes first"
        url = f"{self.url}/chat/completions"
        before, problem, busy = self.successes, "", True
        for attempt in range(self.config.retries + 1):
            wait = min(LONGEST_WAIT_S, 0.5 * 2**attempt) * (0.5 + random.random())
            try:
                response = await self.client.post(url, json=body)
            except httpx.TransportError as error:
                problem = self._hide(f"{type(error).__name__} {error}".strip())
                busy = not isinstance(error, httpx.ReadTimeout)
            else:
                status = response.status_code
                problem = self._hide(f"HTTP {status}: {' '.join(response.text.split()):.200}")
                busy = status != 500
                if response.is_success:
                    self.successes += 1
                    return _json(response)
                if status in (401, 402, 403, 404, 405) or response.is_redirect:
                    raise EngineError(
                        f"{url} refuses ({problem}); check --openai.base-url, --openai.model and the key in "
                        f"${self.config.api_key_variable}"
                    )
                if status not in (408, 409, 425, 429) and status < 500:
                    too_long = "context_length" in response.text or "context length" in response.text
                    raise DialogueError("conversation_too_long" if too_long else "endpoint_error", problem)
                wait = _retry_after(response.headers.get("retry-after")) or wait
            if attempt < self.config.retries:
                await asyncio.sleep(wait)
        if not busy and self.successes > before:  # it answered others meanwhile: only this image makes it fail
            raise DialogueError("endpoint_error", f"failed {self.config.retries + 1} times, last with {problem}")
        raise EngineError(
            f"{url} failed {self.config.retries + 1} times, last with {problem}; check that the endpoint runs, then "
            "start the same command again: finished images are kept"
        )

    def _hide(self, text: str) -> str:
        """`text` without the key, which an endpoint may repeat in its answer."""
        return text.replace(self.key, "***") if self.key else text


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return response.text  # then not a chat completion, which the caller says


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
