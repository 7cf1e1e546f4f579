"""The service's client, over plain HTTP: what serve/api.py answers, as small Python values.

    with Client("http://localhost:8000", key=os.environ["KEY"]) as client:
        for hit in client.search("a woman in a red coat").hits:
            print(hit.similarity, hit.summary)

Every request may be made twice, for the service adds images by content and changes nothing when it searches. So one
that the service had no room for, or whose connection was lost, is made again until `timeout_s` is over.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import quote

import httpx

from ceca.errors import UserError

T = TypeVar("T")

AGAIN = {429, 502, 503, 504}  # the service or a gateway before it has no room, or no replica, just now
PAUSE_S, LONGEST_PAUSE_S = 0.2, 2.0  # between attempts that nobody named a time for, and between looks at a job
PAGE = 10  # images; every service gives as many at a time

HINTS = {
    401: "give Client(…, key=…) a key that the service's file of keys holds",
    403: "use a key with this scope",
    413: "send a smaller image, or a shorter query",
}

Conditions = Mapping[str, str | Sequence[str]]
Image = str | Path | bytes


class ClientError(UserError):
    """A request was not answered as hoped; `status` is the HTTP status, None where there was no answer."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Hit:
    """One image. `identity` is None where nobody said whose image it is, `belief` (0 … 1) where no conversation is
    held, `summary` where it has no dialogue; `image` is its path on the service."""

    image_id: str
    identity: int | None
    similarity: float
    global_similarity: float
    local_similarity: float
    belief: float | None
    summary: str | None
    image: str


@dataclasses.dataclass(frozen=True)
class Question:
    """The question whose answer would tell most, and its answers with the share of the belief that each has."""

    facet: str
    text: str
    values: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Answer:
    """The best images, best first, and what they were ranked with. `next_offset` is None behind the last page,
    `query` where an image was searched with."""

    query: str | None
    omega: float
    model: str
    gallery: str
    took_ms: float
    hits: tuple[Hit, ...]
    next_offset: int | None
    question: Question | None


@dataclasses.dataclass(frozen=True)
class Word:
    """A word of a query, and by how much the similarity falls without it."""

    word: str
    contribution: float


@dataclasses.dataclass(frozen=True)
class Sentence:
    """What was said of an image, in its `summary` or in answer to the question `source`."""

    source: str
    text: str
    similarity: float


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Why an image was found: the query's words in order, and what was said of the image, the closest first."""

    query: str
    image_id: str
    omega: float
    model: str
    gallery: str
    similarity: float
    global_similarity: float
    local_similarity: float
    words: tuple[Word, ...]
    sentences: tuple[Sentence, ...]


@dataclasses.dataclass(frozen=True)
class Job:
    """An image that is added or erased. `status` is waiting, done or failed; `detail` says why it failed or waits."""

    job: str
    status: str
    image_id: str | None
    detail: str


@dataclasses.dataclass(frozen=True)
class Ready:
    """What is served."""

    model: str
    gallery: str
    images: int


@dataclasses.dataclass(frozen=True)
class Status(Ready):
    """Why a newer gallery is not served (`following`), what keeps images from being added or erased (`intake`), and how
    many wait for that."""

    following: str
    intake: str
    arrivals: int
    erasures: int


class Client:
    """A service at a URL. May be shared by threads. Every method raises ClientError.

    Args:
        url: such as `http://localhost:8000`, with the route prefix where there is one.
        key: an API key; None where the service has none.
        timeout_s: that a request may take in all, attempts and pauses included.
        job_timeout_s: that `add` and `remove` wait for their job: the first image starts a dialogue engine.
    """

    def __init__(self, url: str, key: str | None = None, timeout_s: float = 30, *, job_timeout_s: float = 600):
        if not url.startswith(("http://", "https://")):
            raise ClientError(f"{url!r} is no address of a service; it begins with http:// or https://")
        if key is not None and not (key and key.isascii() and key.isprintable() and " " not in key):
            raise ClientError("the key is empty or holds characters that no key has; see `python -m serve.access`")
        self.url, self.timeout_s, self.job_timeout_s = url.rstrip("/"), timeout_s, job_timeout_s
        try:
            self._http = httpx.Client(headers={"Authorization": f"Bearer {key}"} if key else {})
            httpx.URL(self.url)
        except httpx.InvalidURL as error:
            raise ClientError(f"{url!r} is no address of a service: {error}") from None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Let the connections go."""
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
        offset: int = 0,
    ) -> Answer:
        """The images that a description fits best.

        Args:
            omega: 0 (whole picture) … 1 (details); None: the service's own.
            where: facets, each with a value or several, one of which an image must have.
            answers: what is known of the person by facet, None where the user does not know.
            suggest: propose the question that would tell most.
            offset: so many best images are skipped.
        """
        body = {"query": query, "answers": dict(answers or {}), "suggest": suggest}
        return self._search("/v1/search", body, top_k, omega, offset, where)

    def search_all(
        self,
        query: str,
        *,
        omega: float | None = None,
        where: Conditions | None = None,
        answers: Mapping[str, str | None] | None = None,
        page: int = PAGE,
    ) -> Iterator[Hit]:
        """All images that the service gives for a description, best first, so many at a time as they are needed.

        An image that comes twice, because the gallery changed between two pages, is given once.
        """
        seen: set[str] = set()
        offset: int | None = 0
        while offset is not None:
            answer = self.search(query, page, omega=omega, where=where, answers=answers, offset=offset)
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
        """The images most like one: a file, or its bytes (JPEG, PNG, WebP or BMP)."""
        params: dict[str, Any] = {"top_k": top_k, "offset": offset, "where": json.dumps(_conditions(where))}
        params |= {} if omega is None else {"omega": omega}
        return _answer(self._json("POST", "/v1/search/image", params=params, content=_content(image)))

    def search_like(
        self,
        image_id: str,
        top_k: int = 10,
        *,
        omega: float | None = None,
        where: Conditions | None = None,
        offset: int = 0,
    ) -> Answer:
        """The images most like one of the gallery, which is the first of them."""
        return self._search("/v1/search/like", {"image_id": image_id}, top_k, omega, offset, where)

    def explain(self, query: str, image_id: str, *, omega: float | None = None) -> Explanation:
        """Why an image was found by a query."""
        found = self._json("POST", "/v1/explain", json={"query": query, "image_id": image_id, "omega": omega})
        words = tuple(_make(Word, word) for word in found["words"])
        return _make(
            Explanation, found, words=words, sentences=tuple(_make(Sentence, told) for told in found["sentences"])
        )

    def image(self, image_id: str) -> bytes:
        """An image of the gallery as it came."""
        return self._request("GET", f"/v1/images/{quote(image_id, safe='')}").content

    def facets(self) -> dict[str, list[str]]:
        """What `where` can name: facets and their values."""
        return self._json("GET", "/v1/facets")

    # --- changing the gallery -----------------------------------------------------------------------------

    def add(
        self,
        image: Image,
        *,
        identity: int | None = None,
        camera: str | None = None,
        name: str = "",
        summary: str = "",
        wait: bool = True,
    ) -> Job:
        """Add an image: a file, or its bytes. With `wait` it is searchable when this returns.

        Args:
            identity: whose image it is, a number. camera: which one took it. name: where it came from.
            summary: what the person looks like; empty: the service asks its multimodal model, if it has one.
        """
        about = {"identity": identity, "camera": camera, "name": name, "summary": summary}
        params = {name: value for name, value in about.items() if value not in (None, "")}
        return self._finished(self._json("POST", "/v1/images", params=params, content=_content(image)), wait)

    def remove(self, image_id: str, wait: bool = True) -> Job:
        """Take an image out of search and have it erased. With `wait` it is erased when this returns."""
        return self._finished(self._json("DELETE", f"/v1/images/{quote(image_id, safe='')}"), wait)

    def job(self, job: str) -> Job:
        """How far an image is that is added or removed."""
        return _make(Job, self._json("GET", f"/v1/jobs/{quote(job, safe='')}"))

    # --- the service --------------------------------------------------------------------------------------

    def ready(self) -> Ready:
        """What is served. Waits up to `timeout_s` until every replica has loaded it."""
        return _make(Ready, self._json("GET", "/readyz"))

    def status(self) -> Status:
        """What is served, what waits, and what went wrong. Needs a key with the scope `admin`."""
        return _make(Status, self._json("GET", "/v1/status"))

    # --- how it is asked ----------------------------------------------------------------------------------

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
        return _answer(self._json("POST", path, json=body))

    def _finished(self, acknowledged: dict[str, Any], wait: bool) -> Job:
        """The job as it was acknowledged, or with `wait` when it is done."""
        job = _make(Job, acknowledged)
        deadline, pause = time.monotonic() + self.job_timeout_s, PAUSE_S
        while wait and job.status == "waiting":
            if time.monotonic() + pause > deadline:
                raise ClientError(
                    f"{job.job} still waits after {self.job_timeout_s:g} s{f' ({job.detail})' if job.detail else ''}; "
                    f"it is not lost: ask job({job.job!r}) later"
                )
            time.sleep(pause)
            pause = min(1.5 * pause, LONGEST_PAUSE_S)
            job = dataclasses.replace(self.job(job.job), image_id=job.image_id)
        if job.status == "failed":
            raise ClientError(f"image {job.image_id} was not added: {job.detail}; mend that and add it again")
        return job

    def _json(self, method: str, path: str, **request: Any) -> Any:
        response = self._request(method, path, **request)
        try:
            return response.json()
        except ValueError:
            kind = response.headers.get("content-type", "something")
            raise ClientError(f"{method} {self.url}{path} gave {kind}, not JSON; is this the service?") from None

    def _request(self, method: str, path: str, **request: Any) -> httpx.Response:
        """The response, of status 2xx; asks again where that may help."""
        deadline, pause = time.monotonic() + self.timeout_s, PAUSE_S
        where, lost = f"{method} {self.url}{path}", False
        while True:
            left = max(deadline - time.monotonic(), 0.001)
            status: int | None = None
            try:
                response = self._http.request(method, self.url + path, timeout=left, **request)
            except (httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
                raise ClientError(f"{where} cannot be asked: {error}") from None
            except httpx.RequestError as error:
                found, wait, lost = str(error) or type(error).__name__, pause, True
            else:
                if response.is_success:
                    return response
                status, found = response.status_code, f"{response.status_code}: {_detail(response)}"
                if status not in AGAIN:
                    hint = f"; {HINTS[status]}" if status in HINTS else ""
                    if lost and status == 404 and method == "DELETE":
                        hint = "; an attempt whose answer was lost may have removed it"
                    raise ClientError(f"{where} was answered {found}{hint}", status)
                wait = _retry_after(response, pause)
            if time.monotonic() + wait > deadline:
                begun = "was answered" if status else "was not answered:"
                raise ClientError(
                    f"{where} {begun} {found}; given up after {self.timeout_s:g} s (timeout_s): is the service running "
                    "there, and has it room?",
                    status,
                )
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE_S)


def _make(kind: type[T], found: Mapping[str, Any], **instead: Any) -> T:
    """A value from what the service answered; what a newer service says besides is left out."""
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: found[name] for name in names if name not in instead}, **instead)


def _answer(found: dict[str, Any]) -> Answer:
    question = None if found["question"] is None else _make(Question, found["question"])
    return _make(Answer, found, hits=tuple(_make(Hit, hit) for hit in found["hits"]), question=question)


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
    """What the service says is wrong, in words: `where: what` where it names places."""
    try:
        detail = response.json()["detail"]
        if isinstance(detail, str):
            return detail
        return "; ".join(f"{problem['loc'][-1]}: {problem['msg']}" for problem in detail)
    except (ValueError, TypeError, KeyError, IndexError):  # a gateway's page, or another service
        where = response.headers.get("location")
        return f"it is at {where}" if where else response.reason_phrase


def _retry_after(response: httpx.Response, otherwise: float) -> float:
    """Seconds after which to come again."""
    said = response.headers.get("retry-after", "")
    return max(float(said), PAUSE_S) if said.isascii() and said.isdigit() else otherwise
