"""The service's Python client, over plain HTTP. It returns the records of `serve.schema`.

    with Client("http://localhost:8000", key=os.environ["KEY"]) as client:
        for hit in client.search("a woman in a red coat").hits:
            print(hit.similarity, hit.summary)

Every request may be sent twice: a search changes nothing, and an image is added by its content. So the client sends a
request again if the service had no capacity or the connection was lost, until `timeout_s` is over. It needs neither
Ray nor FastAPI.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from ceca.environment import find_proxy, on_this_machine
from ceca.errors import UserError
from serve.schema import (
    ExplainResponse,
    Job,
    Proposed,
    Ready,
    Rerank,
    Reranking,
    SearchHit,
    SearchResponse,
    Sentence,
    Status,
    Understood,
    Word,
)

__all__ = [
    "Answer",
    "Client",
    "ClientError",
    "Explanation",
    "Hit",
    "Job",
    "Question",
    "Ready",
    "Rerank",
    "Reranking",
    "Sentence",
    "Status",
    "Understood",
    "Word",
]

# Short names of the records for users of the client.
Answer = SearchResponse
Explanation = ExplainResponse
Hit = SearchHit
Question = Proposed

Record = TypeVar("Record", bound=BaseModel)

AGAIN = {429, 502, 503, 504}  # the service, or a gateway before it, has no room or no replica at the moment
# Pauses between attempts when the response names no time, and between two looks at a job.
PAUSE_S, LONGEST_PAUSE_S = 0.2, 2.0
PAGE = 10  # images per request of `search_all`; every service allows this number

HINTS = {
    401: "give Client(…, key=…) a key that is in the service's file of keys",
    413: "send a smaller image, or a shorter query",
}

Conditions = Mapping[str, str | Sequence[str]]
Image = str | Path | bytes


class ClientError(UserError):
    """A request failed. `status` is the HTTP status; None if there was no response."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


class Client:
    """A connection to a service. Threads may share it. Every method can raise ClientError.

    Args:
        url: the service's address, such as `http://localhost:8000`, with the route prefix if there is one.
        key: an API key; None if the service has none.
        timeout_s: time limit of a request, with all its attempts and pauses.
        job_timeout_s: time limit for `add` and `remove` to wait for their job. The first image starts a dialogue
            engine, which takes minutes.
    """

    def __init__(self, url: str, key: str | None = None, timeout_s: float = 30, *, job_timeout_s: float = 600):
        if not url.startswith(("http://", "https://")):
            raise ClientError(f"{url!r} is no address of a service: it must begin with http:// or https://")
        if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
            raise ClientError("the key is empty or holds characters that no key can have; see `python -m serve.access`")
        self.url, self.timeout_s, self.job_timeout_s = url.rstrip("/"), timeout_s, job_timeout_s
        try:
            self._http = httpx.Client(
                headers={"Authorization": f"Bearer {key}"} if key else {},
                trust_env=not on_this_machine(self.url),  # a service on this machine is asked directly, past any proxy
                verify=httpx.create_ssl_context(),
            )
            httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise ClientError(f"{url!r} is no address of a service: {error}") from None
        except (ImportError, ValueError) as error:  # a kind of proxy that cannot be used
            raise ClientError(f"cannot ask {url} through the proxy of the environment: {error}") from None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # --- searching ----------------------------------------------------------------------------------------

    def search(
        self,
        query: str,
        top_k: int = 10,
        *,
        omega: float | None = None,
        where: Conditions | None = None,
        answers: Mapping[str, str | None] | None = None,
        suggest: bool = False,
        min_confidence: float = 0.0,
        rerank: Rerank | None = None,
        offset: int = 0,
    ) -> Answer:
        """The images that fit a description best.

        Args:
            query: the description.
            top_k: number of images.
            omega: ω, from 0 (whole picture) to 1 (details); None uses the service's own.
            where: facets with one or several values; an image must have one of the values of each facet.
            answers: the user's answers by facet; None if the user does not know.
            suggest: also return the question whose answer would tell most.
            min_confidence: least probability, 0 to 1, that the most similar image shows this person; below it the
                answer has no hits, because probably nobody in the gallery does.
            rerank: let the service's engine look at the best images, within seconds; the answer's `reranking` says
                whether it did.
            offset: number of best images to skip.
        """
        body: dict[str, Any] = {"query": query, "answers": dict(answers or {}), "suggest": suggest}
        # Sent only if it is asked for: an older service does not know it.
        body |= {"min_confidence": min_confidence} if min_confidence else {}
        body |= {"rerank": rerank.model_dump()} if rerank is not None else {}
        return self._search("/v1/search", body, top_k, omega, offset, where)

    def search_all(
        self,
        query: str,
        *,
        omega: float | None = None,
        where: Conditions | None = None,
        answers: Mapping[str, str | None] | None = None,
        min_confidence: float = 0.0,
        page: int = PAGE,
    ) -> Iterator[Hit]:
        """All images that the service returns for a description, best first. Pages are requested as they are read.

        An image that is on two pages, because the gallery changed between them, is returned once.

        Args:
            query: the description.
            omega: as in `search`.
            where: as in `search`.
            answers: as in `search`.
            min_confidence: as in `search`.
            page: images per request.
        """
        seen: set[str] = set()
        offset: int | None = 0
        while offset is not None:
            wanted: dict[str, Any] = {
                "omega": omega,
                "where": where,
                "answers": answers,
                "min_confidence": min_confidence,
            }
            answer = self.search(query, page, offset=offset, **wanted)
            yield from (hit for hit in answer.hits if hit.image_id not in seen)
            seen |= {hit.image_id for hit in answer.hits}
            offset = answer.next_offset

    def search_image(
        self,
        image: Image,
        top_k: int = 10,
        *,
        omega: float | None = None,
        where: Conditions | None = None,
        offset: int = 0,
    ) -> Answer:
        """The images most similar to an image: a file, or its bytes (JPEG, PNG, WebP or BMP)."""
        params: dict[str, Any] = {"top_k": top_k, "offset": offset, "where": json.dumps(_conditions(where))}
        params |= {} if omega is None else {"omega": omega}
        return self._record(Answer, "POST", "/v1/search/image", params=params, content=_content(image))

    def search_like(
        self,
        image_id: str,
        top_k: int = 10,
        *,
        omega: float | None = None,
        where: Conditions | None = None,
        offset: int = 0,
    ) -> Answer:
        """The images most similar to an image of the gallery, which comes first itself."""
        return self._search("/v1/search/like", {"image_id": image_id}, top_k, omega, offset, where)

    def explain(self, query: str, image_id: str, *, omega: float | None = None) -> Explanation:
        """Why a query returned an image."""
        body = {"query": query, "image_id": image_id, "omega": omega}
        return self._record(Explanation, "POST", "/v1/explain", json=body)

    def understand(
        self, words: str, *, facet: str | None = None, image_id: str | None = None, seconds: float | None = None
    ) -> Understood:
        """What somebody says in their own words, as `answers` of a search.

        Args:
            words: what they say of the person they look for.
            facet: what they were asked about; None if they speak unasked.
            image_id: the picture that they were shown.
            seconds: most time that the service's engine has to read the words beside that picture; None reads them
                without it.
        """
        body = {"words": words, "facet": facet, "image_id": image_id, "seconds": seconds}
        return self._record(Understood, "POST", "/v1/understand", json=body)

    def image(self, image_id: str) -> bytes:
        """The file of an image of the gallery, unchanged."""
        return self._request("GET", f"/v1/images/{quote(image_id, safe='')}").content

    def facets(self) -> dict[str, list[str]]:
        """The facets and values that `where` can name."""
        return self._json("GET", "/v1/facets")

    # --- changing the gallery -----------------------------------------------------------------------------

    def add(
        self,
        image: Image,
        *,
        identity: int | None = None,
        camera: str | None = None,
        time: datetime | None = None,
        name: str = "",
        summary: str = "",
        wait: bool = True,
    ) -> Job:
        """Add an image to the gallery.

        Args:
            image: a file, or its bytes.
            identity: number of the person in the image.
            camera: the camera that took it.
            time: when it was taken; in UTC without a zone.
            name: where the image came from.
            summary: description of the person; if empty, the service asks its multimodal model, if it has one.
            wait: return when the image is searchable; else as soon as it is acknowledged.
        """
        taken = None if time is None else time.isoformat()
        about = {"identity": identity, "camera": camera, "time": taken, "name": name, "summary": summary}
        params = {name: value for name, value in about.items() if value not in (None, "")}
        return self._finished(self._record(Job, "POST", "/v1/images", params=params, content=_content(image)), wait)

    def remove(self, image_id: str, wait: bool = True) -> Job:
        """Remove an image from search and erase it. With `wait`, return when it is erased."""
        return self._finished(self._record(Job, "DELETE", f"/v1/images/{quote(image_id, safe='')}"), wait)

    def job(self, job: str) -> Job:
        """The state of an image that is being added or erased."""
        return self._record(Job, "GET", f"/v1/jobs/{quote(job, safe='')}")

    # --- the service --------------------------------------------------------------------------------------

    def ready(self) -> Ready:
        """What is served. Waits up to `timeout_s` until every replica has loaded it."""
        return self._record(Ready, "GET", "/readyz")

    def status(self) -> Status:
        """What is served, what waits, and what went wrong. Needs a key with the scope `admin`."""
        return self._record(Status, "GET", "/v1/status")

    # --- requests -----------------------------------------------------------------------------------------

    def _search(
        self,
        path: str,
        body: dict[str, Any],
        top_k: int,
        omega: float | None,
        offset: int,
        where: Conditions | None,
    ) -> Answer:
        body |= {"top_k": top_k, "omega": omega, "offset": offset, "where": _conditions(where)}
        return self._record(Answer, "POST", path, json=body)

    def _finished(self, job: Job, wait: bool) -> Job:
        """The acknowledged job; with `wait`, the same job when it is done.

        Raises:
            ClientError: the job failed, or still waits after `job_timeout_s`.
        """
        deadline, pause = time.monotonic() + self.job_timeout_s, PAUSE_S
        while wait and job.status == "waiting":
            if time.monotonic() + pause > deadline:
                raise ClientError(
                    f"{job.job} still waits after {self.job_timeout_s:g} s{f' ({job.detail})' if job.detail else ''}; "
                    f"it is not lost: ask job({job.job!r}) later"
                )
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE_S)
            job = self.job(job.job).model_copy(update={"image_id": job.image_id})
        if job.status == "failed":
            raise ClientError(f"image {job.image_id} was not added: {job.detail}; mend that and add it again")
        return job

    def _record(self, kind: type[Record], method: str, path: str, **request: Any) -> Record:
        """The response's JSON as a record."""
        content = self._json(method, path, **request)
        try:
            return kind.model_validate(content)
        except ValidationError as error:
            problem = f"{'.'.join(map(str, error.errors()[0]['loc']))}: {error.errors()[0]['msg']}"
            raise ClientError(
                f"{method} {self.url}{path} gave JSON that is no {kind.__name__} ({problem}); is this the service, and "
                "as new as this client?"
            ) from None

    def _json(self, method: str, path: str, **request: Any) -> Any:
        response = self._request(method, path, **request)
        try:
            return response.json()
        except ValueError:
            kind = response.headers.get("content-type", "something")
            raise ClientError(f"{method} {self.url}{path} gave {kind}, not JSON; is this the service?") from None

    def _request(self, method: str, path: str, **request: Any) -> httpx.Response:
        """Send a request, again if that may help. The response has a status 2xx."""
        deadline, pause = time.monotonic() + self.timeout_s, PAUSE_S
        name, connection_lost = f"{method} {self.url}{path}", False
        while True:
            left = max(deadline - time.monotonic(), 0.001)
            status: int | None = None
            try:
                response = self._http.request(method, self.url + path, timeout=left, **request)
            except (httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
                raise ClientError(f"{name} cannot be sent: {error}") from None
            except httpx.RequestError as error:
                problem, wait, connection_lost = str(error) or type(error).__name__, pause, True
                if not on_this_machine(self.url) and (proxy := find_proxy(self.url)):
                    problem += f" (through the proxy {proxy.address} of ${proxy.variable})"
            else:
                if response.is_success:
                    return response
                status, problem = response.status_code, f"{response.status_code}: {_detail(response)}"
                if status not in AGAIN:
                    hint = f"; {HINTS[status]}" if status in HINTS else ""
                    if connection_lost and status == 404 and method == "DELETE":
                        hint = "; an attempt whose answer was lost may have removed it"
                    raise ClientError(f"{name} was answered {problem}{hint}", status)
                wait = _retry_after(response, pause)
            if time.monotonic() + wait > deadline:
                result = "was answered" if status else "was not answered:"
                raise ClientError(
                    f"{name} {result} {problem}; given up after {self.timeout_s:g} s (timeout_s): is the service "
                    "running there, and does it have capacity?",
                    status,
                )
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE_S)


def _conditions(where: Conditions | None) -> dict[str, list[str]]:
    return {name: [values] if isinstance(values, str) else list(values) for name, values in (where or {}).items()}


def _content(image: Image) -> bytes:
    if isinstance(image, bytes):
        return image
    try:
        return Path(image).read_bytes()
    except OSError as error:
        raise ClientError(f"cannot read the image {image}: {error.strerror}") from None


def _detail(response: httpx.Response) -> str:
    """The service's explanation of an error: its words, or `place: problem` for each problem that it lists."""
    try:
        detail = response.json()["detail"]
        if isinstance(detail, str):
            return detail
        return "; ".join(f"{problem['loc'][-1]}: {problem['msg']}" for problem in detail)
    except (ValueError, TypeError, KeyError, IndexError):  # a gateway's page, or another service
        location = response.headers.get("location")
        return f"it is at {location}" if location else response.reason_phrase


def _retry_after(response: httpx.Response, otherwise: float) -> float:
    """Seconds to wait before the next attempt."""
    seconds = response.headers.get("retry-after", "")
    return max(float(seconds), PAUSE_S) if seconds.isascii() and seconds.isdigit() else otherwise
