"""Traces of requests: which part of the service took how long, from the proxy through the encoder to the shards.

Ray Serve makes the spans; this sends them to an OpenTelemetry collector, and keeps a trace together where requests are
answered in batches. Tracing is off unless Ray Serve is told to use `exporters` (docs/service.md, Traces). Spans name
deployments, routes and statuses, never words, images or keys.
"""

from __future__ import annotations

from collections.abc import Iterable

from opentelemetry import trace
from opentelemetry.context import Context, attach
from opentelemetry.sdk.trace import SpanProcessor


def exporters() -> list[SpanProcessor]:
    """What Ray Serve gives its spans to: OTLP over HTTP, to the collector that OTEL_EXPORTER_OTLP_ENDPOINT names."""
    # Imported here: without tracing, no replica needs it.
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return [BatchSpanProcessor(OTLPSpanExporter())]


def continue_trace(contexts: Iterable[Context]) -> None:
    """Let the work of a batch belong to the first trace among its requests; a span has one parent.

    Args:
        contexts: the OpenTelemetry context of each request.
    """
    for context in contexts:
        if trace.get_current_span(context).get_span_context().trace_flags.sampled:
            attach(context)
            return
