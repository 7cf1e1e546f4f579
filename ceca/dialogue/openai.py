"""Dialogue engine for any endpoint with OpenAI's chat-completions API and image input."""

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
from ceca.datasets.images import ImageError, mime_type, plain_image
from ceca.dialogue.attributes import Choices, json_schema
from ceca.dialogue.conversation import Answer, DialogueError, EngineError, Subject, Turn, chat_messages, one_line

LONGEST_WAIT_S = 120.0  # longest wait before a retry, in seconds
REFUSED = (401, 402, 403, 404, 405)  # HTTP statuses that a retry or another image cannot change
TEMPORARY = (408, 409, 425, 429)  # HTTP statuses below 500 for which a retry may help


class OpenAIEngine:
    """Engine that calls an endpoint over HTTP.

    Temporary failures are retried with back-off, or after the time in a Retry-After header.

    Args:
        config: settings of the endpoint.
        temperature: sampling temperature; 0 is greedy.
        seed: sampling seed.

    Raises:
        EngineError: the settings name no model.
    """

    def __init__(self, config: OpenAIConfig, temperature: float, seed: int):
        if not config.model:
            raise EngineError("the openai engine needs a model name: pass --openai.model")
        self.config, self.temperature, self.seed = config, temperature, seed
        self.model = config.model
        self.url = config.base_url.rstrip("/")
        self.client: httpx.AsyncClient | None = None
        self.key = ""
        self.successes = 0

    async def start(self) -> None:
        self.key = os.environ.get(self.config.api_key_variable, "").strip()
        if not self.key.isascii():
            raise EngineError(
                f"${self.config.api_key_variable} contains characters that are not allowed in a key; set it again"
            )
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        # No limit here: the worker already limits the number of conversations in flight.
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.AsyncClient(headers=headers, timeout=self.config.timeout_s, limits=limits)
        try:  # only checks that a server listens; the response does not matter, because some endpoints list no models
            await self.client.get(f"{self.url}/models")
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            await self.close()
            raise EngineError(
                f"nothing answers at {self.url} ({type(error).__name__}: {error}); start the endpoint or correct "
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
        completion = await self._post(body)
        try:
            choice, usage = completion["choices"][0], completion.get("usage") or {}
            return Answer(
                text=str(choice["message"]["content"] or ""),
                prompt_tokens=int(usage.get("prompt_tokens") or 0),
                cached_tokens=int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0),
                completion_tokens=int(usage.get("completion_tokens") or 0),
                cut_off=choice.get("finish_reason") == "length",
            )
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            problem = self._hide(f"not a chat completion ({error!r}): {completion!r:.200}")
            raise DialogueError("endpoint_error", problem) from None

    async def _post(self, body: dict[str, Any]) -> Any:
        """Send a request, with retries, and return the JSON of the response.

        Raises:
            DialogueError: the endpoint refuses this request, or fails at it while it answers other requests.
            EngineError: the endpoint refuses all requests, or every attempt failed.
        """
        assert self.client is not None, "start() was not called"
        url = f"{self.url}/chat/completions"
        successes_before, problem, busy = self.successes, "", True
        for attempt in range(self.config.retries + 1):
            wait = min(LONGEST_WAIT_S, 0.5 * 2**attempt) * (0.5 + random.random())
            try:
                response = await self.client.post(url, json=body)
            except httpx.TransportError as error:
                problem = self._hide(f"{type(error).__name__} {error}".strip())
                busy = not isinstance(error, httpx.ReadTimeout)
            else:
                if response.is_success:
                    self.successes += 1
                    return _json(response)
                problem = self._hide(f"HTTP {response.status_code}: {one_line(response.text):.200}")
                busy = response.status_code != 500
                self._check_retry(response, problem, url)
                wait = _retry_after(response.headers.get("retry-after")) or wait
            if attempt < self.config.retries:
                await asyncio.sleep(wait)
        # If other requests succeeded meanwhile and the endpoint was not busy, only this image causes the failure.
        if not busy and self.successes > successes_before:
            raise DialogueError("endpoint_error", f"failed {self.config.retries + 1} times; last failure: {problem}")
        raise EngineError(
            f"{url} failed {self.config.retries + 1} times; last failure: {problem}; check that the endpoint runs, "
            "then start the same command again: finished images are kept"
        )

    def _check_retry(self, response: httpx.Response, problem: str, url: str) -> None:
        """Raise an error if a retry cannot help after this response."""
        status = response.status_code
        if status in REFUSED or response.is_redirect:
            raise EngineError(
                f"{url} refuses ({problem}); check --openai.base-url, --openai.model and the key in "
                f"${self.config.api_key_variable}"
            )
        if status not in TEMPORARY and status < 500:
            too_long = "context_length" in response.text or "context length" in response.text
            raise DialogueError("conversation_too_long" if too_long else "endpoint_error", problem)

    def _hide(self, text: str) -> str:
        """Remove the key from a text: an endpoint may repeat it in its response."""
        return text.replace(self.key, "***") if self.key else text


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return response.text  # the caller reports that it is not a chat completion


def _messages(subject: Subject, history: Sequence[Turn], question: str) -> list[dict[str, Any]]:
    """Write the conversation as chat messages.

    Raises:
        DialogueError: the image cannot be decoded.
    """
    try:
        image = plain_image(subject.image)
    except ImageError as error:
        raise DialogueError(error.reason, error.detail) from None
    url = f"data:{mime_type(image)};base64,{base64.b64encode(image).decode()}"
    return chat_messages(history, question, {"type": "image_url", "image_url": {"url": url}}, plain_answers=True)


def _retry_after(value: str | None) -> float | None:
    """Convert a Retry-After header (a number of seconds or a date) to seconds; None if it is missing or invalid."""
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
