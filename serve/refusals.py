"""HTTP error responses: the errors of a request, and the response to each."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exception_handlers import http_exception_handler
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match

from ceca.data.store import StoreError
from ceca.datasets.images import ImageError
from ceca.errors import UserError
from ceca.search.confidence import NoConfidence
from ceca.search.facets import FacetError
from serve.access import Refusal
from serve.schema import Refused


class Overloaded(Exception):
    """The service has no capacity at the moment. Response: 503, try again in a second."""


class WrongAnswer(UserError):
    """An answer to a question that does not exist, or an answer that this question cannot have."""


class NotFound(Exception):
    """Response: 404 with this message."""


# Replacements for messages of Pydantic that would not help a user.
MESSAGES = {
    "model_attributes_type": "send a JSON object, with Content-Type: application/json",
    "string_unicode": "this holds half of a surrogate pair, which is not a character",
}
REFUSALS = {
    401: "No API key, or an unknown one",
    403: "The key does not have the scope of this route, or the request comes from another site",
    404: "Not found",
    413: "Too large",
    429: "The key has used up its requests per minute; Retry-After says when to try again",
    431: "Headers too large",
    503: "Not ready, or too many requests; Retry-After says when to try again",
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error responses of these statuses, for the description of a route."""
    return {status: {"model": Refused, "description": REFUSALS[status]} for status in statuses}


def refused(refusal: Refusal) -> JSONResponse:
    """The response for a key that was not admitted."""
    headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
    if refusal.retry_after is not None:
        headers["Retry-After"] = str(refusal.retry_after)
    return JSONResponse({"detail": refusal.detail}, status_code=refusal.status, headers=headers)


def invalid(name: str, kind: str, message: str, place: str = "body") -> RequestValidationError:
    """An error of one field, in the same form as FastAPI's own.

    Args:
        name: the field.
        kind: the error's type, as Pydantic names it.
        message: what is wrong.
        place: where the field is: `body` or `query`.
    """
    return RequestValidationError([{"type": kind, "loc": (place, name), "msg": message}])


def add_handlers(api: FastAPI) -> None:
    """Register the error responses with an application."""
    api.add_exception_handler(RequestValidationError, _invalid_request)
    api.add_exception_handler(StoreError, unavailable)
    api.add_exception_handler(Overloaded, unavailable)
    api.add_exception_handler(FacetError, _invalid_facet)
    api.add_exception_handler(NoConfidence, _invalid_confidence)
    api.add_exception_handler(WrongAnswer, _invalid_answer)
    api.add_exception_handler(ImageError, _invalid_image)
    api.add_exception_handler(UserError, _user_error)
    api.add_exception_handler(NotFound, _not_found)
    api.add_exception_handler(HTTPException, _http_error)


async def unavailable(_: Request, error: Any) -> JSONResponse:
    """The response 503 with the error's message."""
    return JSONResponse({"detail": str(error)}, status_code=503, headers={"Retry-After": "1"})


async def _invalid_request(_: Request, error: Any) -> JSONResponse:
    """422 with each problem and its place. The input is left out: it may be long, and NaN is not valid JSON."""
    problems = [
        {
            "loc": [_sendable(part) if isinstance(part, str) else part for part in problem["loc"]],
            "msg": MESSAGES.get(problem["type"]) or _sendable(problem["msg"].removeprefix("Value error, ")),
            "type": problem["type"],
        }
        for problem in error.errors()
    ]
    return JSONResponse({"detail": problems}, status_code=422)


def _sendable(text: str) -> str:
    return text.encode(errors="replace").decode()  # a field name in a request may hold half of a surrogate pair


async def _invalid_facet(request: Request, error: Any) -> JSONResponse:
    return await _invalid_request(request, invalid("where", "value_error", str(error)))


async def _invalid_confidence(request: Request, error: Any) -> JSONResponse:
    return await _invalid_request(request, invalid("min_confidence", "value_error", str(error)))


async def _invalid_answer(request: Request, error: Any) -> JSONResponse:
    return await _invalid_request(request, invalid("answers", "value_error", str(error)))


async def _invalid_image(request: Request, error: Any) -> JSONResponse:
    return await _invalid_request(request, invalid("image", error.reason, f"not a usable image: {error.detail}"))


async def _user_error(request: Request, error: Any) -> JSONResponse:
    return await _invalid_request(request, invalid("summary", "value_error", str(error), "query"))


async def _not_found(_: Request, error: Any) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status_code=404)


async def _http_error(request: Request, error: Any) -> Response:
    """The errors of FastAPI itself, with more words where its own say too little."""
    if error.status_code == 400:
        message = "the body is not readable JSON: it is not UTF-8, is nested too deeply, or holds a number too long"
        unread = {"type": "json_invalid", "loc": ("body",), "msg": message}
        return await _invalid_request(request, RequestValidationError([unread]))
    if error.status_code == 405:  # Starlette lists only the methods of the first route with this path
        routes = (route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE)
        allowed = sorted({method for route in routes for method in route.methods})
        error = HTTPException(405, f"this path takes {', '.join(allowed)}", {"Allow": ", ".join(allowed)})
    return await http_exception_handler(request, error)
