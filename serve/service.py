"""What the HTTP routes need of the service. `serve.ingress.Ingress` provides it; nothing here knows of Ray."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from ceca.datasets.images import Size
from ceca.dialogue.verdicts import Verdict
from ceca.search.catalogue import Picture
from ceca.search.ranking import Hit
from serve.query import Query
from serve.schema import Job, Proposed, Reranking, Sentence, Status, Understood, Word, WordsRequest
from serve.snapshot import Snapshot

if TYPE_CHECKING:  # it imports Ray
    from serve.metrics import Metrics


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """Hits of one edition. In a conversation also the belief in each hit, and the next question.

    `summaries` and `paths` are those of the hits from the query's offset on.
    `confidence` in the most similar image; None if there is none (`ceca.search.confidence`).
    `reranking` says whether an engine ranked the best hits; None if nobody asked for that. `verdicts`: image id →
    attribute → verdict.
    """

    snapshot: Snapshot
    hits: list[Hit]
    beliefs: Sequence[float] | None = None
    question: Proposed | None = None
    summaries: Sequence[str | None] = ()
    paths: Sequence[str | None] = ()
    confidence: float | None = None
    reranking: Reranking | None = None
    verdicts: Mapping[str, Mapping[str, Verdict]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Why a query returns an image: similarities, and the contributions of words and sentences."""

    snapshot: Snapshot
    similarity: float
    global_similarity: float
    local_similarity: float
    words: tuple[Word, ...]
    sentences: tuple[Sentence, ...]


@dataclasses.dataclass(frozen=True)
class NewImage:
    """An image to add, and what its sender says about it.

    Args:
        content: the encoded image.
        size: its width and height in pixels.
        identity: number of the person, if known.
        camera: the camera that took it, if known.
        time: when it was taken, ISO 8601, if known.
        name: where the image came from.
        summary: description of the person; if empty, the dialogue engine is asked.
    """

    content: bytes
    size: Size
    identity: int | None = None
    camera: str | None = None
    time: str | None = None
    name: str = ""
    summary: str = ""


class Service(Protocol):
    """The methods are documented in `serve.ingress` and `serve.changes`. Each may raise Overloaded."""

    metrics: Metrics

    @property
    def snapshot(self) -> Snapshot: ...

    @property
    def ready(self) -> bool: ...

    async def search(self, query: Query) -> SearchResult: ...

    async def explain(self, text: str, image_id: str, omega: float) -> Explanation | None: ...

    async def understand(self, said: WordsRequest) -> Understood: ...

    async def picture(self, image_id: str) -> Picture | None: ...

    async def add(self, image: NewImage) -> Job: ...

    async def remove(self, image_id: str) -> Job | None: ...

    async def job(self, job: str) -> Job | None: ...

    async def status(self) -> Status: ...

    async def tell_ended(self) -> None: ...

    async def keep_following(self) -> None: ...
