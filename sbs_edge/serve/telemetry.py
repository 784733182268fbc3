"""OpenTelemetry spans of each request; needs ``pip install 'sbs-edge[otel]'``.

While a request is answered only times are recorded. Spans are made from them after the answer, with the caller's
``traceparent`` as their parent. Without an endpoint nothing is imported.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from sbs_edge.errors import MissingExtra
from sbs_edge.serve.inference_request import Timing

__all__ = ["Tracing", "tracing_to"]


class Tracing:
    """Turns finished requests into spans of ``provider`` (an OpenTelemetry ``TracerProvider``)."""

    def __init__(self, provider: Any) -> None:
        from opentelemetry.trace import SpanKind, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("sbs_edge.serve")
        self._propagator = TraceContextTextMapPropagator()
        self._kind = SpanKind.SERVER
        self._error = StatusCode.ERROR

    def record(
        self,
        headers: Mapping[str, str],
        path: str,
        code: int,
        elapsed_s: float,
        attributes: Mapping[str, Any],
        timing: Timing,
    ) -> None:
        """Emit the request's span and a child for each stage that took time; the children follow each other."""
        from opentelemetry import trace

        end_ns = time.time_ns()
        start_ns = end_ns - int(elapsed_s * 1e9)
        context = self._propagator.extract(dict(headers))
        span = self._tracer.start_span(
            f"POST {path}",
            context=context,
            kind=self._kind,
            start_time=start_ns,
            attributes={"http.response.status_code": code, **attributes},
        )
        if code >= 500:
            span.set_status(self._error)
        inside = trace.set_span_in_context(span)
        at_ns = start_ns
        for name in ("tokenize", "queue", "inference", "escalate"):
            length_ns = int(getattr(timing, f"{name}_s") * 1e9)
            if length_ns:
                child = self._tracer.start_span(name, context=inside, start_time=at_ns)
                at_ns += length_ns
                child.end(at_ns)
        span.end(end_ns)

    def close(self) -> None:
        """Send the remaining spans."""
        self._provider.shutdown()


def tracing_to(endpoint: str, service_name: str = "sbs-edge") -> Tracing:
    """Return a :class:`Tracing` that sends OTLP over HTTP to ``endpoint`` (``http://host:4318/v1/traces``)."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise MissingExtra("opentelemetry-sdk", "otel", "Tracing (otel_endpoint)") from error
    provider = TracerProvider(resource=Resource.create({"service.name": service_name}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return Tracing(provider)
