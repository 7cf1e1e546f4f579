"""The HTTP interface: what a client may send, what it gets, and the FastAPI application that says so.

Knows nothing of Ray: what it needs of the service is the protocol `Service`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Depends, FastAPI, Header, Path, Request
from fastapi import Query as Parameter
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import TypeAdapter, ValidationError

from ceca.config import ServeConfig
from ceca.data.schema import NOBODY
from ceca.datasets.images import check_image
from ceca.search.catalogue import Catalogue, Picture
from ceca.search.edition import Edition
from ceca.search.ranking import Hit
from serve.access import Gate, Refusal, Scope, audit, hashed
from serve.query import Like, Query
from serve.refusals import NotFound, Overloaded, add_handlers, problem, refused, told, unavailable
from serve.schema import (
    Conditions,
    ExplainRequest,
    ExplainResponse,
    Health,
    Job,
    LikeRequest,
    Proposed,
    Ready,
    SearchHit,
    SearchRequest,
    SearchResponse,
    Sentence,
    Session,
    Status,
    Text,
    Word,
)

FILES = FilePath(__file__).parent / "page"
IMAGE_HEADERS = {"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}
# What needs no key: none tells of a person.
OPEN = {("GET", path) for path in ("/", "/page.js", "/page.css", "/healthz", "/readyz")} | {("POST", "/v1/session")}
COOKIE = "ceca_key"
BODY_LIMIT = 64 * 1024  # bytes; the longest query is a few thousand
HEADERS_LIMIT = 32 * 1024  # bytes, all of a request's together
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data: blob:; connect-src 'self'; "
    "style-src 'self' 'unsafe-inline'; script-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


# --- the application --------------------------------------------------------------------------------------


class Snapshot(Protocol):
    """An edition and its catalogue; see `serve.ingress.Snapshot`."""

    edition: Edition
    catalogue: Catalogue


@dataclasses.dataclass(frozen=True)
class Found:
    """Hits of one edition; in a conversation what is believed of each, and the next question."""

    snapshot: Snapshot
    hits: list[Hit]
    beliefs: Sequence[float] | None = None
    question: Proposed | None = None


@dataclasses.dataclass(frozen=True)
class Explained:
    snapshot: Snapshot
    similarity: float
    global_similarity: float
    local_similarity: float
    words: list[Word]
    sentences: list[Sentence]


class Service(Protocol):
    """What the interface needs; see `serve.ingress`."""

    snapshot: Any
    ready: bool
    metrics: Any

    async def search(self, query: Query) -> Found: ...

    async def explain(self, query: str, image_id: str, omega: float) -> Explained | None: ...

    async def picture(self, image_id: str) -> Picture | None: ...

    async def add(
        self, content: bytes, *, identity: int | None, camera: str | None, name: str, summary: str
    ) -> Job: ...

    async def remove(self, image_id: str) -> Job | None: ...

    async def job(self, job: str) -> Job | None: ...

    async def status(self) -> Status: ...

    async def keep_following(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class ImageRequest:
    """The parameters of a search by an image that is sent, which is the body."""

    top_k: int
    offset: int
    omega: float | None
    where: Mapping[str, list[str]]


@dataclasses.dataclass(frozen=True)
class Needs:
    """What a route asks of a request before anything of it is read: a scope of its key, and a longest body."""

    scope: Scope
    body: int = BODY_LIMIT


def make_api(service: Service, config: ServeConfig, gate: Gate) -> FastAPI:
    """The FastAPI application over a service. All but `OPEN` needs a key where the gate has any."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        following = asyncio.create_task(service.keep_following())
        yield
        following.cancel()

    # FastAPI's own documentation pages load scripts from elsewhere; the description stays at /openapi.json.
    api = FastAPI(title="CECA person search", version="1", docs_url=None, redoc_url=None, lifespan=lifespan)
    add_handlers(api)
    api.state.pixels_limit = config.image_pixels_limit
    in_flight = 0

    async def turn_away(request: Request) -> Response | None:
        """Before anything of a request is read: whose it is, how long it says it is, and whether there is room."""
        path = _path(request)
        route, needs = (request.method, path), _needs(request.method, path, config)
        request.state.who = "anyone"
        if sum(len(name) + len(value) for name, value in request.scope["headers"]) > HEADERS_LIMIT:
            return JSONResponse({"detail": f"send headers of at most {HEADERS_LIMIT} bytes"}, status_code=431)
        if route not in OPEN:
            given = request.headers.get("authorization", "").removeprefix("Bearer ") or request.cookies.get(COOKIE)
            admitted = gate.admit(given, needs.scope)
            if isinstance(admitted, Refusal):
                audit(admitted.who, " ".join(route), admitted.status)
                return refused(admitted)
            request.state.who = admitted.name if admitted else "anyone"
        length = request.headers.get("content-length", "0").lstrip("0") or "0"
        known = length.isdecimal() and len(length) < 20 and "transfer-encoding" not in request.headers
        if not known or int(length) > needs.body:
            detail = f"send a Content-Length of at most {needs.body} bytes"
            return JSONResponse({"detail": detail}, status_code=413)
        if in_flight >= config.queue and route not in OPEN:
            return await unavailable(request, Overloaded("too many requests wait"))
        return None

    @api.middleware("http")
    async def admit(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        nonlocal in_flight
        response = await turn_away(request)
        if response is not None:
            service.metrics.requests.inc(1, {"route": "turned away", "status": str(response.status_code)})
            return response
        in_flight += 1
        service.metrics.waiting.set(in_flight)
        started = time.perf_counter()
        try:
            response = await answer(request)
        finally:
            in_flight -= 1
            service.metrics.waiting.set(in_flight)
        found = request.scope.get("route")
        # Only what there is: a client could name any method, and each would be a time series.
        name = f"{request.method} {found.path}" if found is not None else "unknown"
        service.metrics.stages.observe(time.perf_counter() - started, {"stage": name})
        service.metrics.requests.inc(1, {"route": name, "status": str(response.status_code)})
        return response

    api.include_router(_session(gate), responses=told(401, 413, 429, 431, 503))
    api.include_router(_searching(service, config), responses=told(401, 403, 413, 429, 431, 503))
    api.include_router(_changing(service, config), responses=told(401, 403, 413, 429, 431, 503))
    api.include_router(_about(service, config), responses=told(413, 431, 503))
    _describe(api.openapi(), config, bool(gate.keys))
    return api


def _path(request: Request) -> str:
    """Below where the application is; not of `request.url`, which a client's Host and query go into."""
    return request.scope["path"].removeprefix(request.scope.get("root_path", ""))


def _describe(description: dict[str, Any], config: ServeConfig, closed: bool) -> None:
    """Add to /openapi.json what the configuration decides: limits, and whether a key is needed."""
    limits = {
        "query": {"maxLength": config.text_limit},
        "top_k": {"maximum": config.top_k_limit},
        "offset": {"maximum": config.top_k_limit - 1},
    }
    for model in (SearchRequest, LikeRequest, ExplainRequest):
        properties = description["components"]["schemas"][model.__name__]["properties"]
        for name in limits.keys() & properties.keys():
            properties[name] |= limits[name]
    if closed:
        description["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, methods in description["paths"].items():
            for method, operation in methods.items():
                if (method.upper(), path) not in OPEN:
                    operation["security"] = [{"key": []}]


def _needs(method: str, path: str, config: ServeConfig) -> Needs:
    """The one place that says which key opens which route."""
    if method == "POST" and path == "/v1/images":
        return Needs("write", config.image_bytes_limit)
    if method == "DELETE" or path.startswith("/v1/jobs/"):
        return Needs("write")
    if path == "/v1/status":
        return Needs("admin")
    if path == "/v1/search/image":
        return Needs("search", config.image_bytes_limit)
    return Needs("search")


def _session(gate: Gate) -> APIRouter:
    v1 = APIRouter(prefix="/v1", tags=["keys"])

    @v1.post("/session", status_code=204)
    async def session(given: Session, request: Request) -> Response:
        """For a browser, whose requests for pictures carry no key: keeps it in a cookie that no script reads."""
        admitted = gate.admit(given.key, None)
        if isinstance(admitted, Refusal):
            audit("unknown", "POST /v1/session", admitted.status)
            return refused(admitted)
        response = Response(status_code=204)
        # Where TLS ends before this service, who ended it says so.
        secure = "https" in (request.scope["scheme"], request.headers.get("x-forwarded-proto"))
        response.set_cookie(COOKIE, given.key, httponly=True, samesite="strict", secure=secure)
        return response

    return v1


def _searching(service: Service, config: ServeConfig) -> APIRouter:
    v1 = APIRouter(prefix="/v1", tags=["search"])

    async def answer(
        sample: str | bytes | Like, request: SearchRequest | LikeRequest | ImageRequest, http: Request
    ) -> SearchResponse:
        started = time.perf_counter()
        offset, limit = request.offset, config.top_k_limit
        for name, value in (("top_k", request.top_k), ("offset", offset + 1)):
            if value > limit:
                message = f"{name} is too large: this service gives at most {limit} images to a query"
                raise problem(name, "less_than_equal", message)
        top_k = min(request.top_k, limit - offset)  # the last page
        query = Query(
            sample,
            omega=config.omega if request.omega is None else request.omega,
            top_k=offset + top_k + 1,
            where=request.where,
            answers=getattr(request, "answers", {}),
            suggest=getattr(request, "suggest", False),
        )
        found = await service.search(query)
        shown = slice(offset, offset + top_k)
        hits = found.hits[shown]
        beliefs = [None] * len(hits) if found.beliefs is None else found.beliefs[shown]
        more = len(found.hits) > offset + top_k and offset + top_k < limit
        audit(
            http.state.who,
            f"POST {_path(http)}",
            200,
            query=query.logged,
            where=sorted(query.where),  # what was asked for, not which: words, too, are a hash
            answers=sorted(query.answers),
            images=[hit.image_id for hit in hits],
        )
        edition = found.snapshot.edition
        return SearchResponse(
            query=query.text,
            omega=query.omega,
            model=edition.model_name,
            gallery=edition.gallery_name,
            took_ms=round((time.perf_counter() - started) * 1000, 2),
            hits=tuple(_hit(hit, belief, found.snapshot.catalogue) for hit, belief in zip(hits, beliefs, strict=True)),
            next_offset=offset + top_k if more else None,
            question=found.question,
        )

    @v1.post("/search")
    async def search(request: SearchRequest, http: Request) -> SearchResponse:
        """The images that a description fits best."""
        _check_length(request.query, config)
        return await answer(request.query, request, http)

    @v1.post("/search/like", responses=told(404))
    async def search_like(request: LikeRequest, http: Request) -> SearchResponse:
        """The images most like one of the gallery, which is the first of them."""
        return await answer(Like(request.image_id), request, http)

    @v1.post("/search/image", openapi_extra={**IMAGE_BODY, "parameters": [WHERE]})
    async def search_image(
        http: Request,
        content: Annotated[bytes, Depends(_image)],
        where: Annotated[dict[str, list[str]], Depends(_where)],
        top_k: int = Parameter(10, ge=1, le=config.top_k_limit),
        offset: int = Parameter(0, ge=0, lt=config.top_k_limit),
        omega: Annotated[float | None, Parameter(ge=0, le=1, allow_inf_nan=False)] = None,
    ) -> SearchResponse:
        """The images most like the one in the body (JPEG, PNG, WebP or BMP). It has no summary as those of the gallery
        have: for an image that is there already, /v1/search/like is better. `where` is that of /v1/search as JSON."""
        return await answer(content, ImageRequest(top_k, offset, omega, where), http)

    @v1.post("/explain", responses=told(404))
    async def explain(request: ExplainRequest, http: Request) -> ExplainResponse:
        """Why an image was found by a query."""
        _check_length(request.query, config)
        omega = config.omega if request.omega is None else request.omega
        found = await service.explain(request.query, request.image_id, omega)
        if found is None:
            raise NotFound(f"no image {request.image_id} in this gallery")
        audit(http.state.who, "POST /v1/explain", 200, query=hashed(request.query), images=[request.image_id])
        return ExplainResponse(
            query=request.query,
            image_id=request.image_id,
            omega=omega,
            model=found.snapshot.edition.model_name,
            gallery=found.snapshot.edition.gallery_name,
            similarity=found.similarity,
            global_similarity=found.global_similarity,
            local_similarity=found.local_similarity,
            words=tuple(found.words),
            sentences=tuple(found.sentences),
        )

    @v1.get("/facets")
    async def facets() -> dict[str, list[str]]:
        """What `where` can name: facets and their values, of identities none, for there are too many."""
        found = service.snapshot.catalogue.facets
        return {name: found.values(name) for name in found.columns if name != "identity"}

    @v1.get("/images/{image_id}", response_class=Response, responses=told(404) | PICTURE)
    async def image(
        http: Request,
        image_id: Annotated[str, Path(pattern="^[0-9a-f]{16}$")],
        if_none_match: Annotated[str | None, Header()] = None,
    ) -> Response:
        """An image as it came."""
        picture = await service.picture(image_id)
        if picture is None:
            raise NotFound(f"no image {image_id} in this gallery")
        audit(http.state.who, "GET /v1/images", 200, images=[image_id])
        headers = {**IMAGE_HEADERS, "ETag": picture.etag}
        if if_none_match is not None and picture.etag in if_none_match:
            return Response(status_code=304, headers=headers)
        return Response(picture.content, media_type=picture.media_type, headers=headers)

    return v1


def _changing(service: Service, config: ServeConfig) -> APIRouter:
    v1 = APIRouter(prefix="/v1", tags=["gallery"])

    @v1.post("/images", status_code=202, openapi_extra=IMAGE_BODY)
    async def add(
        http: Request,
        content: Annotated[bytes, Depends(_image)],
        identity: Annotated[int | None, Parameter(ge=0, lt=2**53)] = None,
        camera: Annotated[Text | None, Parameter(min_length=1, max_length=100)] = None,
        name: Annotated[Text, Parameter(max_length=300)] = "",
        summary: Annotated[Text, Parameter(max_length=2000)] = "",
    ) -> Job:
        """Add the image in the body (JPEG, PNG, WebP or BMP) to the gallery; the answer's job says when a search can
        find it. `summary` describes the person where no model is to be asked."""
        summary = " ".join(summary.split())
        job = await service.add(content, identity=identity, camera=camera, name=name, summary=summary)
        audit(http.state.who, "POST /v1/images", 202, images=[job.image_id])
        return job

    @v1.delete("/images/{image_id}", status_code=202, responses=told(404))
    async def remove(image_id: Annotated[str, Path(pattern="^[0-9a-f]{16}$")], http: Request) -> Job:
        """Take an image out of search at once, and erase it, what was said of it and its embeddings."""
        job = await service.remove(image_id)
        if job is None:
            raise NotFound(f"no image {image_id} in this gallery")
        audit(http.state.who, "DELETE /v1/images", 202, images=[image_id])
        return job

    @v1.get("/jobs/{job}", responses=told(404))
    async def job(job: Annotated[str, Path(pattern="^(add-[0-9a-f]{16}|delete-[0-9a-f]{12})$")]) -> Job:
        """How far an image is that is added or removed."""
        found = await service.job(job)
        if found is None:
            raise NotFound(f"no job {job}")
        return found

    return v1


def _about(service: Service, config: ServeConfig) -> APIRouter:
    about = APIRouter(tags=["service"])
    files = {name: (FILES / name).read_text(encoding="utf-8") for name in ("index.html", "page.js", "page.css")}
    for name in ("omega", "top_k_limit", "text_limit", "image_bytes_limit"):
        files["index.html"] = files["index.html"].replace("{{" + name + "}}", str(getattr(config, name)))

    @about.get("/healthz")
    async def healthz() -> Health:
        """The process answers."""
        return Health()

    @about.get("/readyz")
    async def readyz() -> Ready:
        """Every replica has loaded what is served."""
        if not service.ready:
            raise Overloaded("the replicas load the gallery")
        edition = service.snapshot.edition
        images = len(service.snapshot.catalogue)
        return Ready(model=edition.model_name, gallery=edition.gallery_name, images=images)

    @about.get("/v1/status", responses=told(401, 403, 429))
    async def status() -> Status:
        """What is served, what waits, and what went wrong."""
        return await service.status()

    @about.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(files["index.html"], headers=PAGE_HEADERS)

    @about.get("/page.js", include_in_schema=False)
    async def script() -> Response:
        return Response(files["page.js"], media_type="text/javascript", headers=PAGE_HEADERS)

    @about.get("/page.css", include_in_schema=False)
    async def style() -> Response:
        return Response(files["page.css"], media_type="text/css", headers=PAGE_HEADERS)

    return about


# --- what routes share -------------------------------------------------------------------------------------

IMAGES: dict[str, Any] = {
    kind: {"schema": {"type": "string", "format": "binary"}}
    for kind in ("image/jpeg", "image/png", "image/webp", "image/bmp")
}
CONDITIONS: TypeAdapter[dict[str, list[str]]] = TypeAdapter(Conditions)
# FastAPI describes no parameter whose value is JSON.
WHERE = {"name": "where", "in": "query", "content": {"application/json": {"schema": CONDITIONS.json_schema()}}}
IMAGE_BODY = {"requestBody": {"required": True, "content": IMAGES}}
PICTURE: dict[int | str, dict[str, Any]] = {200: {"content": IMAGES}, 304: {"description": "Not modified"}}


async def _image(request: Request) -> bytes:
    """A dependency: the body, seen to be an image that decodes."""
    content = await request.body()
    await asyncio.to_thread(check_image, content, request.app.state.pixels_limit)
    return content


def _where(request: Request) -> dict[str, list[str]]:
    """A dependency: the conditions in the query, as JSON, for the body is an image."""
    try:
        return CONDITIONS.validate_json(request.query_params.get("where", "{}"))
    except ValidationError as error:
        problems = [{**problem, "loc": ("query", "where", *problem["loc"])} for problem in error.errors()]
        raise RequestValidationError(problems) from None


def _hit(hit: Hit, belief: float | None, catalogue: Catalogue) -> SearchHit:
    return SearchHit(
        image_id=hit.image_id,
        identity=None if hit.identity == NOBODY else hit.identity,
        similarity=hit.similarity,
        global_similarity=hit.global_similarity,
        local_similarity=hit.local_similarity,
        belief=belief,
        summary=catalogue.summary(hit.image_id),
        image=f"/v1/images/{hit.image_id}",
    )


def _check_length(query: str, config: ServeConfig) -> None:
    if len(query) > config.text_limit:
        message = f"the query has {len(query)} characters, at most {config.text_limit} are read: shorten it"
        raise problem("query", "too_long", message)
