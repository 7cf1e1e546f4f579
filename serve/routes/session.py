"""The route that keeps an API key in a browser."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serve.access import Gate, Refusal, audit
from serve.admission import COOKIE
from serve.refusals import refused
from serve.schema import Session


def session_routes(gate: Gate) -> APIRouter:
    v1 = APIRouter(prefix="/v1", tags=["keys"])

    @v1.post("/session", status_code=204)
    async def session(given: Session, request: Request) -> Response:
        """Keep a key in a cookie that no script can read. For browsers: their requests for pictures carry no key."""
        admitted = gate.admit(given.key, None)
        if isinstance(admitted, Refusal):
            audit("unknown", "POST /v1/session", admitted.status)
            return refused(admitted)
        response = Response(status_code=204)
        # If TLS ends at a proxy before this service, the proxy says so in a header.
        secure = "https" in (request.scope["scheme"], request.headers.get("x-forwarded-proto"))
        response.set_cookie(COOKIE, given.key, httponly=True, samesite="strict", secure=secure)
        return response

    return v1
