"""The HTTP interface: what a client may send, what it gets, and the FastAPI application that says so.

Knows nothing of Ray: what it needs of the service is the protocol `Service`.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, Protocol

from fastapi import APIRouter, FastAPI, Header, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, field_validator

from ceca.config import ServeConfig
from ceca.facets import FacetError
from ceca.gallery import Hit
from ceca.store import StoreError
from serve.access import Gate, Refusal, audit, hashed
from serve.catalogue import Catalogue, Picture, Served

PAGE = FilePath(__file__).parent / "page.html"
IMAGE_HEADERS = {"Cache-Control": "private, max-age=3600", "X-Content-Type-Options": "nosniff"}
OPEN = {("GET", "/"), ("GET", "/healthz"), ("POST", "/v1/session")}  # what needs no key: none tells of a person
COOKIE = "ceca_key"
BODY_LIMIT = 64 * 1024  # bytes; the longest query is a few thousand
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; connect-src 'self'; "
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class SearchRequest(BaseModel):
    """A description of a person, how many images are wanted, ω (null: the service's own), and `where`: facets with the
    values of which an image must have one."""

    model_config = ConfigDict(extra="forbid", strict=True)

    query: str
    top_k: Annotated[int, Field(ge=1)] = 10
    omega: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    where: Annotated[dict[str, Annotated[list[str], Field(min_length=1, max_length=100)]], Field(max_length=20)] = {}

    @field_validator("query")
    @classmethod
    def _has_words(cls, query: str) -> str:
        query = query.strip()
        if not query:
            raise ValueError("the query is empty: describe a person, e.g. 'a woman in a red coat'")
        if any("\ud800" <= character <= "\udfff" for character in query):  # JSON can spell it, UTF-8 cannot
            raise ValueError("the query holds half of a surrogate pair, which is not a character")
        return query


class Session(BaseModel):
    """A key, to be kept by the browser."""

    model_config = ConfigDict(extra="forbid", strict=True)

    key: Annotated[str, Field(min_length=1, max_length=200)]


class SearchHit(BaseModel):
    """One image of the gallery; `summary` is null where it has no dialogue, `image` is a path on this service."""

    image_id: str
    identity: int
    similarity: float
    global_similarity: float
    local_similarity: float
    summary: str | None
    image: str


class SearchResponse(BaseModel):
    """The best images, best first, and what they were ranked with."""

    query: str
    omega: float
    model: str
    gallery: str
    took_ms: float
    hits: list[SearchHit]


class Health(BaseModel):
    status: Literal["ok"] = "ok"
    model: str
    gallery: str
    images: int


class Service(Protocol):
    """What the interface needs: a search over the gallery, and its pictures and summaries."""

    served: Served
    catalogue: Catalogue

    async def search(self, query: str, *, omega: float, top_k: int, where: Mapping[str, list[str]]) -> list[Hit]: ...

    async def picture(self, image_id: str) -> Picture | None: ...


def make_api(service: Service, config: ServeConfig, gate: Gate) -> FastAPI:
    """The FastAPI application over a service. All but `OPEN` needs a key where the gate has any."""
    served = service.served
    page = _page(config)
    v1 = APIRouter(prefix="/v1")
    # FastAPI's own documentation pages load scripts from elsewhere; the description stays at /openapi.json.
    api = FastAPI(title="CECA person search", docs_url=None, redoc_url=None)
    api.add_exception_handler(RequestValidationError, _refuse)
    api.add_exception_handler(StoreError, _unavailable)

    @api.middleware("http")
    async def admit(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
        """Before anything of a request is read: whose it is, and how long it says it is."""
        route = (request.method, request.url.path.removeprefix(request.scope.get("root_path", "")))
        request.state.who = "anyone"
        if route not in OPEN:
            given = request.headers.get("authorization", "").removeprefix("Bearer ") or request.cookies.get(COOKIE)
            admitted = gate.admit(given, "search")
            if isinstance(admitted, Refusal):
                audit("unknown", " ".join(route), admitted.status)
                return _refused(admitted)
            request.state.who = admitted.name if admitted else "anyone"
        length = request.headers.get("content-length", "0")
        if not length.isdigit() or int(length) > BODY_LIMIT or "transfer-encoding" in request.headers:
            detail = f"send a Content-Length of at most {BODY_LIMIT} bytes"
            return JSONResponse({"detail": detail}, status_code=413)
        return await answer(request)

    @v1.post("/session", status_code=204)
    async def session(given: Session, request: Request) -> Response:
        """For a browser, whose requests for pictures carry no key: keeps it in a cookie that no script reads."""
        admitted = gate.admit(given.key, "search")
        if isinstance(admitted, Refusal):
            audit("unknown", "POST /v1/session", admitted.status)
            return _refused(admitted)
        response = Response(status_code=204)
        secure = request.url.scheme == "https"
        response.set_cookie(COOKIE, given.key, httponly=True, samesite="strict", secure=secure)
        return response

    @v1.post("/search")
    async def search(request: SearchRequest, http: Request) -> SearchResponse:
        started = time.perf_counter()
        _check_limits(request, config)
        omega = config.omega if request.omega is None else request.omega
        try:
            hits = await service.search(request.query, omega=omega, top_k=request.top_k, where=request.where)
        except FacetError as error:
            problem = {"type": "value_error", "loc": ("body", "where"), "msg": str(error)}
            raise RequestValidationError([problem]) from None
        found = [hit.image_id for hit in hits]
        audit(http.state.who, "POST /v1/search", 200, query=hashed(request.query), where=request.where, images=found)
        return SearchResponse(
            query=request.query,
            omega=omega,
            model=served.model_name,
            gallery=served.gallery,
            took_ms=round((time.perf_counter() - started) * 1000, 2),
            hits=[_hit(hit, service.catalogue) for hit in hits],
        )

    @v1.get("/facets")
    async def facets() -> dict[str, list[str]]:
        """What `where` can name: facets and their values, of identities none, for there are too many."""
        found = service.catalogue.facets
        return {name: found.values(name) for name in found.columns if name != "identity"}

    @v1.get("/images/{image_id}", response_class=Response)
    async def image(
        image_id: Annotated[str, Path(pattern="^[0-9a-f]{16}$")],
        if_none_match: Annotated[str | None, Header()] = None,
    ) -> Response:
        picture = await service.picture(image_id)
        if picture is None:
            return JSONResponse({"detail": f"no image {image_id} in this gallery"}, status_code=404)
        headers = {**IMAGE_HEADERS, "ETag": picture.etag}
        if if_none_match is not None and picture.etag in if_none_match:
            return Response(status_code=304, headers=headers)
        return Response(picture.content, media_type=picture.media_type, headers=headers)

    @api.get("/healthz")
    async def healthz() -> Health:
        return Health(model=served.model_name, gallery=served.gallery, images=served.size)

    @api.get("/", response_class=HTMLResponse)
    async def index() -> HTMLResponse:
        return HTMLResponse(page, headers=PAGE_HEADERS)

    api.include_router(v1)
    return api


def _refused(refusal: Refusal) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
    if refusal.retry_after is not None:
        headers["Retry-After"] = str(refusal.retry_after)
    return JSONResponse({"detail": refusal.detail}, status_code=refusal.status, headers=headers)


def _hit(hit: Hit, catalogue: Catalogue) -> SearchHit:
    return SearchHit(
        image_id=hit.image_id,
        identity=hit.identity,
        similarity=hit.similarity,
        global_similarity=hit.global_similarity,
        local_similarity=hit.local_similarity,
        summary=catalogue.summaries.get(hit.image_id),
        image=f"/v1/images/{hit.image_id}",
    )


def _check_limits(request: SearchRequest, config: ServeConfig) -> None:
    """The limits that a configuration sets, refused in the same words as the others."""
    if len(request.query) > config.text_limit:
        message = f"the query has {len(request.query)} characters, at most {config.text_limit} are read: shorten it"
        raise RequestValidationError([{"type": "too_long", "loc": ("body", "query"), "msg": message}])
    if request.top_k > config.top_k_limit:
        message = f"top_k is {request.top_k}, this service gives at most {config.top_k_limit}"
        raise RequestValidationError([{"type": "less_than_equal", "loc": ("body", "top_k"), "msg": message}])


async def _refuse(_: Request, error: Any) -> JSONResponse:
    """422 with what is wrong and where, without the input: it may be long, and NaN is not valid JSON."""
    problems = [
        {"loc": list(problem["loc"]), "msg": problem["msg"].removeprefix("Value error, "), "type": problem["type"]}
        for problem in error.errors()
    ]
    return JSONResponse({"detail": problems}, status_code=422)


async def _unavailable(_: Request, error: Any) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status_code=503)


def _page(config: ServeConfig) -> str:
    page = PAGE.read_text(encoding="utf-8")
    for name in ("omega", "top_k_limit", "text_limit"):
        page = page.replace("{{" + name + "}}", str(getattr(config, name)))
    return page
