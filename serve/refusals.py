"""What is answered where there is no answer: the errors of a request, and how each is told over HTTP."""

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
from ceca.search.facets import FacetError
from serve.access import Refusal
from serve.schema import Refused


class Overloaded(Exception):
    """The service has more to do than it can: 503, to come again in a second."""


class WrongAnswer(UserError):
    """To a question that is not there, or one that it cannot have."""


class NotFound(Exception):
    """404 with these words."""


# Where Pydantic's words would not help.
MESSAGES = {
    "model_attributes_type": "send a JSON object, with Content-Type: application/json",
    "string_unicode": "this holds half of a surrogate pair, which is not a character",
}
REFUSALS = {
    401: "No key, or one that is not known",
    403: "The key is for something else",
    404: "There is no such thing",
    413: "Too large",
    429: "The key has asked too often; Retry-After says when to come again",
    431: "Headers too large",
    503: "Not ready, or too much to do; Retry-After says when to come again",
}


def told(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """These refusals, for the description of a route."""
    return {status: {"model": Refused, "description": REFUSALS[status]} for status in statuses}


def refused(refusal: Refusal) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else {}
    if refusal.retry_after is not None:
        headers["Retry-After"] = str(refusal.retry_after)
    return JSONResponse({"detail": refusal.detail}, status_code=refusal.status, headers=headers)


def problem(name: str, kind: str, message: str, where: str = "body") -> RequestValidationError:
    """The limits that a configuration sets, refused in the same words as the others."""
    return RequestValidationError([{"type": kind, "loc": (where, name), "msg": message}])


def add_handlers(api: FastAPI) -> None:
    """Have an application answer errors with these refusals."""
    api.add_exception_handler(RequestValidationError, _refuse)
    api.add_exception_handler(StoreError, unavailable)
    api.add_exception_handler(Overloaded, unavailable)
    api.add_exception_handler(FacetError, _refuse_facet)
    api.add_exception_handler(WrongAnswer, _refuse_answer)
    api.add_exception_handler(ImageError, _refuse_image)
    api.add_exception_handler(UserError, _refuse_request)
    api.add_exception_handler(NotFound, _not_found)
    api.add_exception_handler(HTTPException, _not_served)


async def _refuse(_: Request, error: Any) -> JSONResponse:
    """422 with what is wrong and where, without the input: it may be long, and NaN is not valid JSON."""
    problems = [
        {
            "loc": [_sendable(part) if isinstance(part, str) else part for part in found["loc"]],
            "msg": MESSAGES.get(found["type"]) or _sendable(found["msg"].removeprefix("Value error, ")),
            "type": found["type"],
        }
        for found in error.errors()
    ]
    return JSONResponse({"detail": problems}, status_code=422)


def _sendable(text: str) -> str:
    return text.encode(errors="replace").decode()  # a name that was sent may hold half of a surrogate pair


async def _refuse_facet(request: Request, error: Any) -> JSONResponse:
    return await _refuse(request, problem("where", "value_error", str(error)))


async def _refuse_answer(request: Request, error: Any) -> JSONResponse:
    return await _refuse(request, problem("answers", "value_error", str(error)))


async def _refuse_image(request: Request, error: Any) -> JSONResponse:
    return await _refuse(request, problem("image", error.reason, f"not a usable image: {error.detail}"))


async def _refuse_request(request: Request, error: Any) -> JSONResponse:
    return await _refuse(request, problem("summary", "value_error", str(error), "query"))


async def unavailable(_: Request, error: Any) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status_code=503, headers={"Retry-After": "1"})


async def _not_served(request: Request, error: Any) -> Response:
    """What FastAPI itself refuses, where its words say too little."""
    if error.status_code == 400:
        message = "the body is no JSON that can be read: it is not UTF-8, nested too deeply, or has a number too long"
        unread = {"type": "json_invalid", "loc": ("body",), "msg": message}
        return await _refuse(request, RequestValidationError([unread]))
    if error.status_code == 405:  # Starlette tells the methods of the first route with this path
        there = (route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE)
        allowed = sorted({method for route in there for method in route.methods})
        error = HTTPException(405, f"this path takes {', '.join(allowed)}", {"Allow": ", ".join(allowed)})
    return await http_exception_handler(request, error)


async def _not_found(_: Request, error: Any) -> JSONResponse:
    return JSONResponse({"detail": str(error)}, status_code=404)
