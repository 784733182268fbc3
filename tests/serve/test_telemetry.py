"""Spans as the OpenTelemetry SDK itself records them."""

from __future__ import annotations

import pytest

from sbs_edge.errors import MissingExtra
from sbs_edge.serve import telemetry
from sbs_edge.serve.inference_request import Timing


def test_spans_have_the_callers_parent_and_the_stages_as_children():
    pytest.importorskip("opentelemetry.sdk")
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing = telemetry.Tracing(provider)
    trace_id, parent_id = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    headers = {"traceparent": f"00-{trace_id}-{parent_id}-01"}
    timing = Timing(tokenize_s=0.001, queue_s=0.002, inference_s=0.003)
    tracing.record(headers, "/v1/predict", 200, 0.01, {"sbs_edge.model": "desk"}, timing)
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"POST /v1/predict", "tokenize", "queue", "inference"}
    root = spans["POST /v1/predict"]
    assert format(root.context.trace_id, "032x") == trace_id
    assert format(root.parent.span_id, "016x") == parent_id
    assert root.attributes["http.response.status_code"] == 200
    assert root.end_time - root.start_time == pytest.approx(10e6, abs=1000)
    for name, length_ms in (("tokenize", 1), ("queue", 2), ("inference", 3)):
        assert spans[name].parent.span_id == root.context.span_id
        assert spans[name].end_time - spans[name].start_time == pytest.approx(length_ms * 1e6, abs=1000)
    tracing.close()


def test_without_the_extra_the_error_names_it(monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name.startswith("opentelemetry"):
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtra, match=r"sbs-edge\[otel\]"):
        telemetry.tracing_to("http://127.0.0.1:4318/v1/traces")
