"""The routes of a browser's session, which stands for an API key."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from serve.access import Gate, Key, Refusal
from serve.refusals import refused
from serve.schema import Session
from serve.service import Service
from serve.sessions import SESSION_S, cookie_name


def session_routes(service: Service, gate: Gate) -> APIRouter:
    v1 = APIRouter(prefix="/v1", tags=["keys"])

    @v1.post("/session", status_code=204)
    async def begin(given: Session, request: Request) -> Response:
        """Begin a session in a cookie that no script can read. For browsers: their requests for pictures carry no key.
        It ends after eight hours, and when the service is deployed again."""
        admitted = gate.admit(given.key, None)
        if isinstance(admitted, Refusal):
            request.state.who = admitted.who
            return refused(admitted)
        response = Response(status_code=204)
        if isinstance(admitted, Key):  # tokens are longer than `given.key` may be, and end by themselves
            request.state.who = admitted.name
            _set_cookie(response, request, gate.sessions.begin(admitted.name), SESSION_S)
        return response

    @v1.delete("/session", status_code=204)
    async def end(request: Request) -> Response:
        """End the session of the cookie, also for whoever has a copy of it."""
        session = request.cookies.get(cookie_name(request.headers.get("host", "")), "")
        key = gate.sessions.key(session, gate.keys)
        if key is not None:
            request.state.who = key.name
            gate.sessions.end(session)
            await service.tell_ended()
        response = Response(status_code=204, headers={"Clear-Site-Data": '"cache"'})  # pictures are kept for an hour
        _set_cookie(response, request, "", 0)
        return response

    return v1


def _set_cookie(response: Response, request: Request, value: str, seconds: int) -> None:
    # If TLS ends at a proxy before this service, the proxy says so in a header.
    secure = "https" in (request.scope["scheme"], request.headers.get("x-forwarded-proto"))
    name = cookie_name(request.headers.get("host", ""))
    # Without a path, the browser sends it to what lies beside this route: to /v1, below any prefix.
    response.set_cookie(name, value, max_age=seconds, path=None, httponly=True, samesite="strict", secure=secure)
