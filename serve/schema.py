"""The HTTP interface's records: what a client sends and what it gets. /openapi.json is generated from them.

The Python client (`serve.client`) returns these records too, so this module imports neither Ray nor FastAPI.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

# --- requests ---------------------------------------------------------------------------------------------


def _words(text: str) -> str:
    text = text.strip()
    if not text:
        raise ValueError("the query is empty: describe a person, e.g. 'a woman in a red coat'")
    return _characters(text)


def _characters(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):  # JSON can spell it, UTF-8 cannot
        raise ValueError("this holds half of a surrogate pair, which is not a character")
    return text


def _moment(text: str) -> str:
    if not re.match(r"\d{4}-\d\d-\d\d", text, re.ASCII):
        raise ValueError("a time is written 2026-01-31 or 2026-01-31T12:30, and may have seconds and a zone")
    time = datetime.fromisoformat(text)
    try:
        return (time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)).isoformat()
    except OverflowError:
        raise ValueError("in UTC the time is before the year 1 or after the year 9999") from None


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value  # 3.0 is an integer in JSON


# Python strips slightly more characters as white space than the regular expressions of JSON Schema do.
PATTERN = r"[^\s\u0085\u001c-\u001f]"
Words = Annotated[str, AfterValidator(_words), Field(json_schema_extra={"pattern": PATTERN})]
Text = Annotated[str, AfterValidator(_characters)]
Moment = Annotated[str, AfterValidator(_moment), Field(json_schema_extra={"format": "date-time"})]
ImageId = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
TopK = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
Offset = Annotated[int, Field(ge=0), BeforeValidator(_whole)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Values = Annotated[list[Text], Field(min_length=1, max_length=100)]
Conditions = Annotated[dict[Text, Values], Field(max_length=20)]


class Rerank(BaseModel):
    """Have the service's multimodal engine look at the best images, and rank them again by what it says.

    `seconds`: most time that this may add to the search. What the engine has not said by then does not count; if it has
    said nothing, the order is that of a search without. `images`: number of best images that it looks at. `margin`: ask
    only where the similarities of the first two images differ by at most this; null asks always.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    images: Annotated[int, Field(ge=2), BeforeValidator(_whole)] = 10
    margin: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class SearchRequest(BaseModel):
    """A description of a person, and which of the best images to return.

    `top_k`: number of images. `offset`: number of best images to skip. `omega`: ω, the weight of the local similarity;
    null uses the service's own. `where`: facets and values; an image must have one of the values of each facet, and a
    time in one of the ranges of `time`, which are written 2026-01-31, 2026-01-01..2026-02-15, 2026-01.. or ..2026.
    `answers`: the user's answers by facet, null if the user does not know; images that agree come first. `suggest`:
    also return the question whose answer would tell most. `min_confidence`: least probability that the most similar
    image shows this person; below it no image is returned, because probably nobody in the gallery does. `rerank`: also
    let an engine look at the best images; null does not.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    query: Words
    top_k: TopK = 10
    offset: Offset = 0
    omega: Share | None = None
    where: Conditions = {}
    answers: Annotated[dict[Text, Text | None], Field(max_length=40)] = {}
    suggest: bool = False
    min_confidence: Share = 0.0
    rerank: Rerank | None = None


class WordsRequest(BaseModel):
    """What the searcher says in their own words of the person they look for.

    `facet`: what they were asked about, as in `question`; null if they speak unasked. `image_id`: the picture that they
    were shown, with which a comparison is. `seconds`: most time that the service's multimodal engine has to read the
    words beside that picture; null reads them without it.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    words: Words
    facet: Annotated[Text, Field(min_length=1)] | None = None
    image_id: ImageId | None = None
    seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None


class LikeRequest(BaseModel):
    """An image of the gallery. Other images are compared with it by their embeddings."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image_id: ImageId
    top_k: TopK = 10
    offset: Offset = 0
    omega: Share | None = None
    where: Conditions = {}


class ExplainRequest(BaseModel):
    """A query and one of the images that it returned."""

    model_config = ConfigDict(extra="forbid", strict=True)

    query: Words
    image_id: ImageId
    omega: Share | None = None


class Session(BaseModel):
    """An API key for the browser to keep."""

    model_config = ConfigDict(extra="forbid", strict=True)

    # Only characters that a header can carry unchanged: a cookie with others could not be set.
    key: Annotated[str, Field(pattern="^[!-~]{1,200}$")]


# --- responses --------------------------------------------------------------------------------------------


class Record(BaseModel):
    """What the service returns. It cannot be changed, and ignores fields that a newer service adds."""

    model_config = ConfigDict(frozen=True)


class SearchHit(Record):
    """One image of the gallery.

    `identity` is null if nobody has said whose image it is, `belief` (0 … 1) is null outside a conversation, `summary`
    is null if the image has no dialogue. `source_path` is the image's path in its source, or the name that it was added
    with; empty if nobody said. `image` is a path on this service. `verdicts` are those of the engine by attribute, if
    the search was re-ranked by them; null for an image that has none.
    """

    image_id: str
    identity: int | None
    similarity: float
    global_similarity: float
    local_similarity: float
    belief: float | None
    summary: str | None
    source_path: str = ""
    image: str
    verdicts: dict[str, Literal["fits", "differs", "unseen"]] | None = None


class Reranking(Record):
    """Whether an engine's verdicts ranked the best images, and what was asked.

    `by` is `engine` if they did; then an image's place is by its similarity + `weight` · (claims that fit - claims that
    differ). It is `plain` if the order is that of a search without. `reason` says why, or which verdicts are missing;
    empty if none are. `seconds` is the time that it took. `claims` are the attributes that the description states, with
    their values. `questions` is their number times that of the images, `known` the number of verdicts that had been
    asked before, `answered` that of all verdicts.
    """

    by: Literal["engine", "plain"]
    reason: str
    seconds: float
    weight: float
    claims: dict[str, str]
    questions: int
    known: int
    answered: int


class Proposed(Record):
    """The question whose answer would tell most.

    `text` is its wording. `values` are the possible answers with the belief that each is true, most probable first.
    """

    facet: str
    text: str
    values: dict[str, float]


class Understood(Record):
    """What was understood of the searcher's words.

    `answers` can be added to those of the next search; empty if nothing was understood. `by` is `engine` if it read
    them too, else `words`: they were compared with a vocabulary. `reason` says why the engine did not, if it was asked
    to. `seconds` is the time that it took.
    """

    answers: dict[str, str]
    by: Literal["engine", "words"]
    reason: str
    seconds: float


class SearchResponse(Record):
    """The best images, best first, and what ranked them.

    `query` is null for a search by image. `next_offset` is null after the last page. `confidence` is the probability
    that the most similar image shows the person described, answers and verdicts aside; null for a search by image,
    without images, and where the model was not calibrated for this ω. `approximate` is true if the service searches
    approximately: it may have missed some of the best images. `reranking` is null if the request did not ask for it.
    """

    query: str | None
    omega: float
    model: str
    gallery: str
    took_ms: float
    hits: tuple[SearchHit, ...]
    next_offset: int | None
    question: Proposed | None
    confidence: float | None = None
    approximate: bool = False
    reranking: Reranking | None = None


class Word(Record):
    """A word of the query, and by how much the similarity falls without it."""

    word: str
    contribution: float


class Sentence(Record):
    """A sentence about an image, and its similarity to the query.

    `source` is `summary`, or the question that the sentence answers.
    """

    source: str
    text: str
    similarity: float


class ExplainResponse(Record):
    """Why a query returned an image: its similarities, the words of the query in order, and the sentences about the
    image, most similar first."""

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


class Job(Record):
    """An image that is being added or erased. `detail` says why it failed or what it waits for."""

    job: str
    status: Literal["waiting", "done", "failed"]
    image_id: str | None = None
    detail: str = ""


class Refused(Record):
    """Why a request was refused. For 422, `detail` lists each problem and its place in the request."""

    detail: str


class Health(Record):
    status: Literal["ok"] = "ok"


class Ready(Record):
    """What is served. `calibrated_omega`: ω of the searches that have a confidence; null if there are none.
    `rerank_seconds`: most seconds that a search can give the engine; null if the service has none."""

    model: str
    gallery: str
    images: int
    calibrated_omega: float | None = None
    rerank_seconds: float | None = None


class Status(Ready):
    """The state of the service, for its operators.

    `following` says why a newer gallery is not served, `intake` what keeps images from being added or erased.
    `arrivals` and `erasures` are the numbers of images waiting for that. `reranking` says why the engine that looks at
    hits is not there; empty if it is, or if nobody has asked for it.
    """

    following: str
    intake: str
    arrivals: int
    erasures: int
    reranking: str = ""
