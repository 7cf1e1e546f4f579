"""The routes that read: searches, explanations, facets and images."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Mapping
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Request
from fastapi import Query as Parameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import TypeAdapter, ValidationError

from ceca.config import ServeConfig
from ceca.data.schema import NOBODY
from ceca.dialogue.verdicts import Verdict
from ceca.search.ranking import Hit
from serve.audit import hashed, note
from serve.query import Like, Query
from serve.refusals import NotFound, documented, invalid
from serve.routes.images import IMAGE_BODY, IMAGE_RESPONSES, ImageIdInPath, ImageInBody
from serve.schema import (
    Conditions,
    ExplainRequest,
    ExplainResponse,
    LikeRequest,
    Rerank,
    SearchHit,
    SearchRequest,
    SearchResponse,
    Understood,
    WordsRequest,
)
from serve.service import SearchResult, Service

CONDITIONS: TypeAdapter[dict[str, list[str]]] = TypeAdapter(Conditions)
# FastAPI cannot describe a parameter whose value is JSON.
WHERE = {"name": "where", "in": "query", "content": {"application/json": {"schema": CONDITIONS.json_schema()}}}
IMAGE_HEADERS = {"Cache-Control": "private, max-age=3600"}


@dataclasses.dataclass(frozen=True)
class ImageRequest:
    """The parameters of a search whose sample is the image in the body."""

    top_k: int
    offset: int
    omega: float | None
    where: Mapping[str, list[str]]


@dataclasses.dataclass(frozen=True)
class Page:
    """Which of the best images a response shows: `top_k` after the first `offset`.

    `limit` is the number of images that one query can reach in all.
    """

    offset: int
    top_k: int
    limit: int

    @property
    def end(self) -> int:
        return self.offset + self.top_k

    def next_offset(self, hits: int) -> int | None:
        """The next page's offset; None after the last page. `hits`: number of images that the search returned."""
        return self.end if hits > self.end and self.end < self.limit else None


def search_routes(service: Service, config: ServeConfig) -> APIRouter:
    v1 = APIRouter(prefix="/v1", tags=["search"])

    @v1.post("/search")
    async def search(request: SearchRequest, http: Request) -> SearchResponse:
        """The images that fit a description best."""
        _check_length(request.query, config)
        _check_rerank(request.rerank, config)
        return await _answer(service, config, request.query, request, http)

    @v1.post("/search/like", responses=documented(404))
    async def search_like(request: LikeRequest, http: Request) -> SearchResponse:
        """The images most similar to an image of the gallery, which comes first itself."""
        return await _answer(service, config, Like(request.image_id), request, http)

    @v1.post("/search/image", openapi_extra={**IMAGE_BODY, "parameters": [WHERE]})
    async def search_image(
        http: Request,
        sent: ImageInBody,
        where: Annotated[dict[str, list[str]], Depends(_where)],
        top_k: int = Parameter(10, ge=1, le=config.top_k_limit),
        offset: int = Parameter(0, ge=0, lt=config.top_k_limit),
        omega: Annotated[float | None, Parameter(ge=0, le=1, allow_inf_nan=False)] = None,
    ) -> SearchResponse:
        """The images most similar to the image in the body (JPEG, PNG, WebP or BMP). Unlike gallery images it has no
        summary, so for an image that is in the gallery /v1/search/like is better. `where` is the JSON of /v1/search."""
        return await _answer(service, config, sent.content, ImageRequest(top_k, offset, omega, where), http)

    @v1.post("/understand", responses=documented(404))
    async def understand(request: WordsRequest, http: Request) -> Understood:
        """What the searcher's own words say of the person they look for, as `answers` of a search."""
        _check_length(request.words, config, "words")
        _check_limit("seconds", "seconds", request.seconds or 0, config.rerank_seconds_limit)
        note(http, query=hashed(request.words), images=[request.image_id] if request.image_id else [])
        understood = await service.understand(request)
        note(http, answers=sorted(understood.answers))
        return understood

    @v1.post("/explain", responses=documented(404))
    async def explain(request: ExplainRequest, http: Request) -> ExplainResponse:
        """Why a query returned an image."""
        _check_length(request.query, config)
        return await _explain(service, config, request, http)

    @v1.get("/facets")
    async def facets() -> dict[str, list[str]]:
        """The facets and values that `where` can name. Identities are left out: there are too many. Of `time`, the
        earliest and the latest."""
        known = service.snapshot.catalogue.facets
        return {name: known.values(name) for name in known.names if name != "identity"}

    @v1.get("/images/{image_id}", response_class=Response, responses=documented(404) | IMAGE_RESPONSES)
    async def image(
        http: Request, image_id: ImageIdInPath, if_none_match: Annotated[str | None, Header()] = None
    ) -> Response:
        """The file of an image, unchanged."""
        note(http, images=[image_id])
        picture = await service.picture(image_id)
        if picture is None:
            raise NotFound(f"no image {image_id} in this gallery")
        headers = {**IMAGE_HEADERS, "ETag": picture.etag}
        if if_none_match is not None and picture.etag in if_none_match:
            return Response(status_code=304, headers=headers)
        return Response(picture.content, media_type=picture.media_type, headers=headers)

    return v1


async def _answer(
    service: Service,
    config: ServeConfig,
    sample: str | bytes | Like,
    request: SearchRequest | LikeRequest | ImageRequest,
    http: Request,
) -> SearchResponse:
    started = time.perf_counter()
    page = _page(request.offset, request.top_k, config.top_k_limit)
    query = Query(
        sample,
        omega=config.omega if request.omega is None else request.omega,
        top_k=page.end + 1,  # one more tells whether there is another page
        offset=page.offset,
        where=request.where,
        answers=request.answers if isinstance(request, SearchRequest) else {},
        suggest=isinstance(request, SearchRequest) and request.suggest,
        min_confidence=request.min_confidence if isinstance(request, SearchRequest) else 0.0,
        rerank=request.rerank if isinstance(request, SearchRequest) else None,
    )
    note(http, query=query.logged)
    result = await service.search(query)
    note(
        http,
        where=sorted(query.where),  # the facets and not the values, as the words are only a hash
        answers=sorted(query.answers),
        images=[hit.image_id for hit in result.hits[page.offset : page.end]],
    )
    return _response(query, result, page, started, config.approximate > 0)


def _page(offset: int, top_k: int, limit: int) -> Page:
    """The page that is asked for; the last one may be shorter than `top_k`."""
    for name, value in (("top_k", top_k), ("offset", offset + 1)):
        if value > limit:
            message = f"{name} is too large: this service gives at most {limit} images to a query"
            raise invalid(name, "less_than_equal", message)
    return Page(offset, min(top_k, limit - offset), limit)


def _response(query: Query, result: SearchResult, page: Page, started: float, approximate: bool) -> SearchResponse:
    hits = result.hits[page.offset : page.end]
    beliefs = [None] * len(hits) if result.beliefs is None else result.beliefs[page.offset : page.end]
    edition = result.snapshot.edition
    verdicts = [result.verdicts.get(hit.image_id) for hit in hits]
    shown = zip(hits, beliefs, result.summaries[: len(hits)], result.paths[: len(hits)], verdicts, strict=True)
    return SearchResponse(
        query=query.text,
        omega=query.omega,
        model=edition.model_name,
        gallery=edition.gallery_name,
        took_ms=round((time.perf_counter() - started) * 1000, 2),
        hits=tuple(itertools.starmap(_hit, shown)),
        next_offset=page.next_offset(len(result.hits)),
        question=result.question,
        confidence=result.confidence,
        approximate=approximate,
        reranking=result.reranking,
    )


def _hit(
    hit: Hit,
    belief: float | None,
    summary: str | None,
    source_path: str | None,
    verdicts: Mapping[str, Verdict] | None,
) -> SearchHit:
    return SearchHit(
        image_id=hit.image_id,
        identity=None if hit.identity == NOBODY else hit.identity,
        similarity=hit.similarity,
        global_similarity=hit.global_similarity,
        local_similarity=hit.local_similarity,
        belief=belief,
        summary=summary,
        source_path=source_path or "",
        image=f"/v1/images/{hit.image_id}",
        verdicts=None if verdicts is None else dict(verdicts),
    )


async def _explain(service: Service, config: ServeConfig, request: ExplainRequest, http: Request) -> ExplainResponse:
    omega = config.omega if request.omega is None else request.omega
    note(http, query=hashed(request.query), images=[request.image_id])
    explanation = await service.explain(request.query, request.image_id, omega)
    if explanation is None:
        raise NotFound(f"no image {request.image_id} in this gallery")
    return ExplainResponse(
        query=request.query,
        image_id=request.image_id,
        omega=omega,
        model=explanation.snapshot.edition.model_name,
        gallery=explanation.snapshot.edition.gallery_name,
        similarity=explanation.similarity,
        global_similarity=explanation.global_similarity,
        local_similarity=explanation.local_similarity,
        words=explanation.words,
        sentences=explanation.sentences,
    )


def _where(request: Request) -> dict[str, list[str]]:
    """The conditions in the URL, as JSON: the body is the image."""
    try:
        return CONDITIONS.validate_json(request.query_params.get("where", "{}"))
    except ValidationError as error:
        problems = [{**problem, "loc": ("query", "where", *problem["loc"])} for problem in error.errors()]
        raise RequestValidationError(problems) from None


def _check_length(text: str, config: ServeConfig, name: str = "query") -> None:
    if len(text) > config.text_limit:
        message = f"the text has {len(text)} characters, at most {config.text_limit} are read: shorten it"
        raise invalid(name, "too_long", message)


def _check_rerank(rerank: Rerank | None, config: ServeConfig) -> None:
    if rerank is not None:
        _check_limit("rerank", "seconds", rerank.seconds, config.rerank_seconds_limit)
        _check_limit("rerank", "images", rerank.images, config.rerank_images_limit)


def _check_limit(field: str, name: str, found: float, limit: float) -> None:
    if found > limit:
        raise invalid(field, "less_than_equal", f"{name} is too large: this service gives an engine {limit:g}")
