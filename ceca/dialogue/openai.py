"""Dialogue engine for any endpoint with OpenAI's chat-completions API and image input."""

from __future__ import annotations

import asyncio
import base64
import email.utils
import json
import logging
import os
import random
import re
import time
from collections.abc import Sequence
from typing import Any

import httpx

from ceca.config import OpenAIConfig
from ceca.datasets.images import ImageError, mime_type, plain_image
from ceca.dialogue.answers import one_line
from ceca.dialogue.attributes import Choices, json_schema
from ceca.dialogue.conversation import Answer, DialogueError, EngineError, Subject, Turn, chat_messages
from ceca.environment import find_proxy, on_this_machine

log = logging.getLogger(__name__)

LONGEST_WAIT_S = 120.0  # longest wait before a retry, in seconds
REFUSED = (401, 402, 403, 404, 405)  # HTTP statuses that a retry or another image cannot change
TEMPORARY = (408, 409, 425, 429)  # HTTP statuses below 500 for which a retry may help
NO_URL = (httpx.UnsupportedProtocol, httpx.InvalidURL)
# Parameters that some models do not take, in the order of trying, and the name that is tried in their place.
OPTIONAL = {
    "max_tokens": "max_completion_tokens",
    "max_completion_tokens": "",
    "temperature": "",
    "seed": "",
    "response_format": "",
}
# Words of an error about a parameter as such, unlike one about its value, such as a length beyond the context.
NOT_TAKEN = re.compile(
    r"unsupported|not support|n't support|unrecogni[sz]ed|unknown|unexpected|not permitted|not allowed|deprecated|"
    r"extra_forbidden|only the default|use 'max_completion_tokens'",
    re.IGNORECASE,
)
# Words of an error about the content of a request.
FILTERED = re.compile(
    r"content[ _-]?(?:filter|policy|management)|usage polic|safety|moderation|flagged|responsibleai", re.IGNORECASE
)
FILTERS = (400, 403, 422, 451)  # HTTP statuses of such errors
STOPPED_BY_FILTER = ("content_filter", "refusal", "safety", "prohibited_content")  # finish reasons


class OpenAIEngine:
    """Engine that calls an endpoint over HTTP.

    Temporary failures are retried with back-off, or after the time in a Retry-After header. If the model does not take
    a parameter, the request is sent again without it, and so are all later ones.

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
        self.not_taken: set[str] = set()  # parameters of OPTIONAL that the model does not take
        self.through = ""  # words about the proxy that requests go through, for errors

    async def start(self) -> None:
        self.key = os.environ.get(self.config.api_key_variable, "").strip()
        if not self.key.isascii():
            raise EngineError(
                f"${self.config.api_key_variable} contains characters that are not allowed in a key; set it again"
            )
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        # No limit here: the worker already limits the number of conversations in flight.
        limits = httpx.Limits(max_connections=None)
        # An endpoint on this machine is asked directly: the pictures show people, and a proxy would see them.
        directly = on_this_machine(self.url)
        if not directly and (proxy := find_proxy(self.url)):
            self.through = f" through the proxy {proxy.address} of ${proxy.variable}"
            log.warning("pictures go to %s%s", self.url, self.through)
        try:
            self.client = httpx.AsyncClient(
                headers=headers,
                timeout=self.config.timeout_s,
                limits=limits,
                trust_env=not directly,
                verify=httpx.create_ssl_context(),
            )
        except (ImportError, ValueError, OSError, httpx.InvalidURL) as error:
            raise EngineError(
                f"cannot ask {self.url}{self.through}: {error}; correct the proxy's variable, no_proxy, SSL_CERT_FILE, "
                "SSL_CERT_DIR or SSLKEYLOGFILE"
            ) from None
        try:  # only checks that a server listens; the response does not matter, because some endpoints list no models
            await self.client.get(f"{self.url}/models")
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError, *NO_URL) as error:
            await self.close()
            raise EngineError(
                f"nothing answers at {self.url}{self.through} ({type(error).__name__}: {error}); start the endpoint or "
                "correct --openai.base-url, e.g. http://localhost:8000/v1"
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
            message = choice["message"]
            text, thought, refusal = _read_content(message.get("content"))
            refusal = str(message.get("refusal") or refusal or "")
            if str(choice.get("finish_reason")).lower() in STOPPED_BY_FILTER:
                refusal = refusal or f"the endpoint's filter stopped the answer {text!r:.100}"
            return Answer(
                text=text,
                prompt_tokens=_tokens(usage.get("prompt_tokens")),
                cached_tokens=_tokens((usage.get("prompt_tokens_details") or {}).get("cached_tokens")),
                completion_tokens=_tokens(usage.get("completion_tokens")),
                cut_off=choice.get("finish_reason") == "length",
                thought=thought or bool(message.get("reasoning_content") or message.get("reasoning")),
                refusal=self._hide(one_line(refusal)),
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
        successes_before, problem, busy, attempt = self.successes, "", True, 0
        while attempt <= self.config.retries:
            wait = min(LONGEST_WAIT_S, 0.5 * 2**attempt) * (0.5 + random.random())
            sent = self._without_what_is_not_taken(body)
            try:
                response = await self.client.post(url, json=sent)
            except httpx.TransportError as error:
                problem = self._hide(f"{type(error).__name__} {error}{self.through}".strip())
                busy = not isinstance(error, httpx.ReadTimeout)
            else:
                if response.is_success:
                    self.successes += 1
                    return _json(response)
                if self._learn(response, sent):
                    continue
                problem = self._hide(f"HTTP {response.status_code}{self.through}: {one_line(response.text):.200}")
                busy = response.status_code != 500
                self._check_retry(response, problem, url)
                wait = _retry_after(response.headers.get("retry-after")) or wait
            if attempt < self.config.retries:
                await asyncio.sleep(wait)
            attempt += 1
        # If other requests succeeded meanwhile and the endpoint was not busy, only this image causes the failure.
        if not busy and self.successes > successes_before:
            raise DialogueError("endpoint_error", f"failed {self.config.retries + 1} times; last failure: {problem}")
        raise EngineError(
            f"{url} failed {self.config.retries + 1} times; last failure: {problem}; check that the endpoint runs, "
            "then start the same command again: finished images are kept"
        )

    def _without_what_is_not_taken(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body of a request with what the model takes: some parameters have another name, some are left out."""
        sent = dict(body)
        for name, other in OPTIONAL.items():
            if name in self.not_taken and name in sent:
                value = sent.pop(name)
                if other:
                    sent[other] = value
        return sent

    def _learn(self, response: httpx.Response, sent: dict[str, Any]) -> bool:
        """Whether the response refuses a parameter of the request. If so, no later request has it."""
        if response.status_code not in (400, 422) or _is_too_long(response):
            return False
        text = response.text
        if not NOT_TAKEN.search(text):
            return False
        named = [name for name in OPTIONAL if name in sent and re.search(rf"(?<!\w){name}(?!\w)", text)]
        if not named:
            return False
        about = _parameter(response)  # an error about one parameter may mention another
        name = about if about in named else named[0]
        if name not in self.not_taken:
            other = OPTIONAL[name]
            log.warning(
                "%s does not take %s and is asked %s", self.model, name, f"with {other}" if other else "without"
            )
            self.not_taken.add(name)
        return True

    def _check_retry(self, response: httpx.Response, problem: str, url: str) -> None:
        """Raise an error if a retry cannot help after this response."""
        status = response.status_code
        if status in FILTERS and FILTERED.search(response.text):
            raise DialogueError("refused", problem)
        if status in REFUSED or response.is_redirect:
            raise EngineError(
                f"{url} refuses ({problem}); check --openai.base-url, --openai.model and the key in "
                f"${self.config.api_key_variable}"
            )
        if status not in TEMPORARY and status < 500:
            raise DialogueError("conversation_too_long" if _is_too_long(response) else "endpoint_error", problem)

    def _hide(self, text: str) -> str:
        """Remove the key from a text: an endpoint may repeat it in its response."""
        return text.replace(self.key, "***") if self.key else text


def _json(response: httpx.Response) -> Any:
    """The JSON of a response; bytes that are no UTF-8 become U+FFFD."""
    for content in (response.content, response.content.decode("utf-8-sig", "replace")):
        try:
            return json.loads(content)
        except (ValueError, RecursionError):
            continue
    return response.text  # the caller reports that it is not a chat completion


def _read_content(content: Any) -> tuple[str, bool, str]:
    """Text, whether there are thoughts, and refusal of a message's content, which may be a list of parts."""
    if not isinstance(content, list):
        return str(content or ""), False, ""
    parts = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in content]
    texts = [str(part.get("text") or "") for part in parts if part.get("type") in ("text", "output_text")]
    refusals = [str(part.get("refusal") or "") for part in parts if part.get("type") == "refusal"]
    thought = any(part.get("type") in ("thinking", "reasoning", "redacted_thinking") for part in parts)
    return " ".join(texts), thought, " ".join(refusals)


def _tokens(count: Any) -> int:
    """A number of tokens; 0 if the endpoint does not count them, or counts nonsense."""
    return int(count) if isinstance(count, int | float) and 0 <= count < 2**31 else 0


def _is_too_long(response: httpx.Response) -> bool:
    return "context_length" in response.text or "context length" in response.text


def _parameter(response: httpx.Response) -> str:
    """Name of the parameter that an error is about, as OpenAI's API and pydantic give it; empty if there is none."""
    try:
        problem = response.json()
        if "error" in problem:
            return str(problem["error"].get("param") or "")
        return str(problem["detail"][0]["loc"][-1])
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return ""


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
