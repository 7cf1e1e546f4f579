"""What a client may send over HTTP and what it gets: the models that the description at /openapi.json is made of."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

# --- what is sent -----------------------------------------------------------------------------------------


def _words(text: str) -> str:
    text = text.strip()
    if not text:
        raise ValueError("the query is empty: describe a person, e.g. 'a woman in a red coat'")
    return _characters(text)


def _characters(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):  # JSON can spell it, UTF-8 cannot
        raise ValueError("this holds half of a surrogate pair, which is not a character")
    return text


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value  # 3.0 is an integer in JSON


# Not only white space, which is a little more in Python than in the regular expressions of JSON Schema.
PATTERN = r"[^\s\u0085\u001c-\u001f]"
Words = Annotated[str, AfterValidator(_words), Field(json_schema_extra={"pattern": PATTERN})]
Text = Annotated[str, AfterValidator(_characters)]
ImageId = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
TopK = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
Offset = Annotated[int, Field(ge=0), BeforeValidator(_whole)]
Omega = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Values = Annotated[list[Text], Field(min_length=1, max_length=100)]
Conditions = Annotated[dict[Text, Values], Field(max_length=20)]


class SearchRequest(BaseModel):
    """A description of a person, and which of the images found are wanted.

    `omega`: ω, null: the service's own. `where`: facets with the values of which an image must have one. `offset`: so
    many best images are skipped. `answers`: what is known of the person by facet, null where the user does not know;
    images that agree come first. `suggest`: propose the question that would tell most.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    query: Words
    top_k: TopK = 10
    offset: Offset = 0
    omega: Omega | None = None
    where: Conditions = {}
    answers: Annotated[dict[Text, Text | None], Field(max_length=40)] = {}
    suggest: bool = False


class LikeRequest(BaseModel):
    """An image of the gallery, to which others are compared by their embeddings."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image_id: ImageId
    top_k: TopK = 10
    offset: Offset = 0
    omega: Omega | None = None
    where: Conditions = {}


class ExplainRequest(BaseModel):
    """A query and one of the images that it found."""

    model_config = ConfigDict(extra="forbid", strict=True)

    query: Words
    image_id: ImageId
    omega: Omega | None = None


class Session(BaseModel):
    """A key, to be kept by the browser."""

    model_config = ConfigDict(extra="forbid", strict=True)

    # What a header can carry as it is: a cookie of other characters could not be set.
    key: Annotated[str, Field(pattern="^[!-~]{1,200}$")]


# --- what is answered -------------------------------------------------------------------------------------


class SearchHit(BaseModel):
    """One image of the gallery; `summary` is null where it has no dialogue, `identity` where nobody said whose image it
    is, `belief` where no conversation is held; `image` is a path on this service."""

    image_id: str
    identity: int | None
    similarity: float
    global_similarity: float
    local_similarity: float
    belief: float | None
    summary: str | None
    image: str


class Proposed(BaseModel):
    """The question whose answer would tell most: its facet, its words, and its answers with the share of the belief
    that each has, the likeliest first."""

    facet: str
    text: str
    values: dict[str, float]


class SearchResponse(BaseModel):
    """The best images, best first, and what they were ranked with. `next_offset` is null behind the last page."""

    query: str | None
    omega: float
    model: str
    gallery: str
    took_ms: float
    hits: list[SearchHit]
    next_offset: int | None
    question: Proposed | None


class Word(BaseModel):
    """A word of the query, and by how much the similarity falls without it."""

    word: str
    contribution: float


class Sentence(BaseModel):
    """What was said of an image: in its summary or in answer to the question `source`; and its similarity to the
    query."""

    source: str
    text: str
    similarity: float


class ExplainResponse(BaseModel):
    """Why an image was found: its similarity by part, the words of the query in order, and what was said of the image,
    the closest first."""

    query: str
    image_id: str
    omega: float
    model: str
    gallery: str
    similarity: float
    global_similarity: float
    local_similarity: float
    words: list[Word]
    sentences: list[Sentence]


class Job(BaseModel):
    """Something that takes its time: an image that is added, or one that is erased. `detail`: why it failed or what it
    waits for."""

    job: str
    status: Literal["waiting", "done", "failed"]
    image_id: str | None = None
    detail: str = ""


class Refused(BaseModel):
    """Why there is no answer; 422 says it of each part of the request."""

    detail: str


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """What is served."""

    model: str
    gallery: str
    images: int


class Status(Ready):
    """For those who run it: why a newer gallery is not served (`following`), what keeps images from being added or
    erased (`intake`), and how many wait for that."""

    following: str
    intake: str
    arrivals: int
    erasures: int
