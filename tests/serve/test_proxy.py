"""Requests in front of replicas: asked again where one dies, and never kept without an end."""

from __future__ import annotations

import asyncio
from typing import Any

from serve.proxy import KEPT_BYTES, AskAgain

PIECE = b"x" * 1024


def send_to(app: Any, headers: dict[bytes, bytes], pieces: int) -> tuple[int, list[dict[str, Any]]]:
    """Send a request in `pieces` pieces → how many were read, and the answer."""
    read, sent = 0, []

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": PIECE, "more_body": read < pieces}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(AskAgain(app)({"type": "http", "headers": list(headers.items())}, receive, send))
    return read, sent


async def refuse(scope: Any, receive: Any, send: Any) -> None:
    """As the ingress refuses what it does not read."""
    await send({"type": "http.response.start", "status": 413, "headers": []})


def test_a_body_without_a_length_or_a_large_one_is_not_read_before_the_service_wants_it() -> None:
    for headers in ({b"transfer-encoding": b"chunked"}, {b"content-length": str(KEPT_BYTES + 1).encode()}):
        read, sent = send_to(refuse, headers, pieces=10**6)
        assert (read, sent[0]["status"]) == (0, 413)


def test_a_request_is_asked_again_with_its_body_until_a_replica_answers() -> None:
    bodies: list[bytes] = []

    async def dies_once(scope: Any, receive: Any, send: Any) -> None:
        bodies.append((await receive())["body"])
        if len(bodies) == 1:
            raise RuntimeError("the replica is gone")
        await refuse(scope, receive, send)

    read, sent = send_to(dies_once, {b"content-length": b"3072"}, pieces=3)
    assert read == 3
    assert bodies == [3 * PIECE] * 2
    assert len(sent) == 1
