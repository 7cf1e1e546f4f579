"""The trace of a search, as an OpenTelemetry collector gets it from a real Ray Serve."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable

from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.serve.conftest import Running
from tests.serve.dataset import QUERY


def until(condition: Callable[[], bool], seconds: float = 30) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def ask(running: Running, *, sampled: bool) -> tuple[str, str]:
    """Search as part of a trace of the client. Returns the ids of the trace and of the client's span."""
    trace, parent = secrets.token_hex(16), secrets.token_hex(8)
    header = {"traceparent": f"00-{trace}-{parent}-{'01' if sampled else '00'}"}
    answer = running.client.post("/v1/search", json={"query": QUERY}, headers=header)
    assert answer.status_code == 200
    return trace, parent


def parts(spans: list[Span]) -> set[str]:
    return {name for span in spans for name in PARTS if name in span.name}


PARTS = ("proxy_http_request", "CecaIngress", "QueryEncoder encode", "GallerySearch0 search", "GallerySearch1 search")


def test_a_search_is_one_trace_from_the_proxy_through_the_encoder_to_every_shard(running: Running) -> None:
    trace, parent = ask(running, sampled=True)

    def whole() -> bool:
        spans = running.collector.of(trace)
        known = {parent, *(span.span_id.hex() for span in spans)}
        return parts(spans) == set(PARTS) and all(span.parent_span_id.hex() in known for span in spans)

    assert until(whole), [
        (span.name, span.span_id.hex(), span.parent_span_id.hex()) for span in running.collector.spans
    ]
    assert not [span for span in running.collector.of(trace) if QUERY in str(span)], "the words are in no span"


def test_a_search_without_a_trace_is_not_recorded(running: Running) -> None:
    unsampled, _ = ask(running, sampled=False)
    trace, _ = ask(running, sampled=True)
    assert until(lambda: parts(running.collector.of(trace)) == set(PARTS))
    assert not running.collector.of(unsampled)
