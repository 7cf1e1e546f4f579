"""Connections to Ray Serve's HTTP proxies, with limits that uvicorn does not have.

Uvicorn takes as many connections as come. It waits without an end for the headers of a first request, for the rest of a
body that nobody reads any more, and for a client to take an answer. Here each wait has an end, and where room runs out,
the connection that has waited longest makes room for the newest one. So a client that only waits loses, and one that
asks is answered.
"""

from __future__ import annotations

import asyncio
import dataclasses
import resource
from typing import Any

import uvicorn.config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

CONNECTIONS, OPEN_FILES = 4096, 65_536  # never more connections than half of the files that the process may open
HEADERS_S = 10.0  # from the beginning of a connection or a request to the end of its headers
LINGER_S = 5.0  # for the rest of a body whose request is answered
STALL_S = 300.0  # for a client to take an answer
HEADERS, HEADERS_BYTES = 200, 64 * 1024  # of one request; the service refuses half as many bytes
PIPELINED = 4  # requests on one connection that wait for the answer to an earlier one
ALL_HEADERS_BYTES = 4 * 1024 * 1024  # unfinished headers of all connections
ALL_UNSENT_BYTES = 64 * 1024 * 1024  # answers of all connections that clients have not taken
TOO_LONG = (
    b"HTTP/1.1 431 Request Header Fields Too Large\r\nContent-Type: application/json\r\nCache-Control: no-store\r\n"
    b"Connection: close\r\nContent-Length: 60\r\n\r\n"
    b'{"detail": "send at most 200 headers of 65536 bytes in all"}'
)


@dataclasses.dataclass
class Crowd:
    """All connections of a server that wait for their client, each kind in the order in which they began to wait."""

    idle: dict[Connection, None] = dataclasses.field(default_factory=dict)  # for a request
    reading: dict[Connection, int] = dataclasses.field(default_factory=dict)  # for more headers; bytes so far
    stalled: dict[Connection, None] = dataclasses.field(default_factory=dict)  # for the client to take an answer


class TooMuch(Exception):
    """Stops the parser: the client sends more than is read."""


class Connection(HttpToolsProtocol):
    """A connection with an HTTP client. The methods are those of asyncio's protocols, httptools and uvicorn."""

    limit = CONNECTIONS

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.crowd: Crowd = vars(self.server_state).setdefault("crowd", Crowd())
        self.in_headers = self.too_long = False
        self.deadline: asyncio.TimerHandle | None = None
        self.stall: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait(HEADERS_S)
        if len(self.connections) > self.limit:
            next(iter(self.crowd.idle))._drop()  # this one itself, if all others are at work

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        super().connection_lost(exc)

    def _wait(self, seconds: float) -> None:
        """Wait for a request; close the connection if none begins."""
        self._stop_waiting()
        self.crowd.idle[self] = None
        self.deadline = self.loop.call_later(seconds, self.transport.close)

    def _stop_waiting(self) -> None:
        self.crowd.idle.pop(self, None)
        if self.deadline is not None:
            self.deadline.cancel()
            self.deadline = None

    def _leave(self) -> None:
        self._stop_waiting()
        self.crowd.reading.pop(self, None)
        self.crowd.stalled.pop(self, None)
        if self.stall is not None:
            self.stall.cancel()

    def _drop(self) -> None:
        self._leave()
        self.transport.abort()

    # --- requests -----------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.in_headers or self.transport.is_closing():
            return
        reading = self.crowd.reading
        reading[self] = reading.get(self, 0) + len(data)
        if reading[self] > HEADERS_BYTES:
            self.too_long = True
            self.send_400_response("")
        while sum(reading.values()) > ALL_HEADERS_BYTES:
            next(iter(reading))._drop()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.in_headers = True
        if self in self.crowd.idle:
            self._wait(HEADERS_S)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.in_headers:  # one behind a body, which nobody reads
            return
        if len(self.headers) >= HEADERS:
            self.too_long = True
            raise TooMuch
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self.in_headers = False
        self.crowd.reading.pop(self, None)
        self._stop_waiting()
        if len(self.pipeline) >= PIPELINED:
            raise TooMuch
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request, or one that is too long, and close the connection."""
        answering = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if answering or self.pipeline:
            self._drop()  # this would be taken for the answer to an earlier request
        elif self.too_long:
            self.crowd.reading.pop(self, None)
            self.transport.write(TOO_LONG)
            self.transport.close()
        else:
            super().send_400_response(msg)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if not self.cycle.response_complete or self.transport.is_closing():  # another request came with the first
            return
        unread = self.cycle.more_body
        self._wait(HEADERS_S if self.in_headers else LINGER_S if unread else self.timeout_keep_alive)
        # Keep nothing of the request as long as the connection waits.
        self.cycle.scope, self.cycle.body = {}, bytearray()  # type: ignore[typeddict-item]
        if not self.in_headers:
            self.scope, self.headers, self.url = {}, [], b""  # type: ignore[typeddict-item]

    # --- answers ------------------------------------------------------------------------------------------

    def pause_writing(self) -> None:
        """The client does not take what was sent."""
        super().pause_writing()
        stalled = self.crowd.stalled
        stalled[self] = None
        self.stall = self.loop.call_later(STALL_S, self._drop)
        while sum(other.transport.get_write_buffer_size() for other in stalled) > ALL_UNSENT_BYTES:
            next(iter(stalled))._drop()

    def resume_writing(self) -> None:
        """The client took it."""
        super().resume_writing()
        self.crowd.stalled.pop(self, None)
        if self.stall is not None:
            self.stall.cancel()


def install() -> None:
    """Use these connections in every server that uvicorn starts in this process."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{Connection.__module__}:{Connection.__name__}"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = max(soft, OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    Connection.limit = min(CONNECTIONS, files // 2)
