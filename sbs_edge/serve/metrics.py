"""Prometheus metrics in base units; label values come from a known set, never from a request."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.process_collector import ProcessCollector

__all__ = ["Metrics"]

# From half a millisecond (one label) to half a minute (the default deadline).
_SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.03, 0.06, 0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 30)
Mode = Literal["livesum", "livemax", "livemin"]
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The server's metrics; ``render`` returns the text of ``GET /metrics``."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        # With several processes, each keeps its values in files of a shared directory.
        self._shared = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        if not self._shared:
            ProcessCollector(registry=registry)

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(f"sbs_edge_{name}", help, labels, registry=registry)

        def gauge(name: str, help: str, mode: Mode, *labels: str) -> Gauge:
            return Gauge(f"sbs_edge_{name}", help, labels, multiprocess_mode=mode, registry=registry)

        def histogram(name: str, help: str, *labels: str, buckets: Sequence[float] = _SECONDS) -> Histogram:
            return Histogram(f"sbs_edge_{name}", help, labels, buckets=buckets, registry=registry)

        self.requests = counter("requests", "Requests answered, by model and status code.", "model", "code")
        self.request_seconds = histogram(
            "request_duration_seconds", "Time from the first byte of a request to its response.", "model"
        )
        self.queue_seconds = histogram(
            "queue_duration_seconds", "Time a text waited for a worker.", "model", "task"
        )
        self.tokenize_seconds = histogram(
            "tokenize_duration_seconds", "Time to tokenise the texts of a request.", "model"
        )
        self.inference_seconds = histogram(
            "inference_duration_seconds", "Time a worker took for a batch.", "model", "task"
        )
        self.batch_size = histogram(
            "batch_size", "Number of texts in a batch.", "model", "task", buckets=_TEXTS
        )
        self.queue_size = gauge(
            "queue_size", "Number of texts waiting for a worker.", "livesum", "model", "task"
        )
        self.in_flight = gauge(
            "requests_in_flight", "Number of admitted requests that are not answered yet.", "livesum"
        )
        self.rejected = counter("rejected", "Requests rejected by a limit, by reason.", "reason")
        self.input_tokens = counter("input_tokens", "Input tokens, without padding.", "model")
        self.output_tokens = counter("output_tokens", "Generated rationale tokens.", "model")
        self.abstained = counter(
            "abstained", "Answers with a probability below the abstain threshold.", "model"
        )
        self.escalations = counter(
            "escalations", "Texts escalated to the larger model, by result.", "model", "result"
        )
        self.recorded = counter(
            "recorded",
            "Rows for the file of --record, by result: kept, dropped or failed.",
            "model",
            "result",
        )
        self.reloads = counter("reloads", "Model versions loaded, refused and retired.", "model", "result")
        self.stale_versions = gauge(
            "stale_versions",
            "Number of versions that still answer although the files now in their directory were refused.",
            "livemax",
            "model",
        )
        self.ready = gauge("ready", "1 if the server is ready to answer requests, else 0.", "livemin")
        self.model_info = gauge(
            "model_info", "1 for each model version in service.", "livemax", "model", "version", "target"
        )

        self._answered: dict[tuple[str, int], Counter] = {}

    def answered(self, model: str, code: int) -> Counter:
        """Return the child of ``requests`` for a model and a status; each is looked up once."""
        child = self._answered.get((model, code))
        if child is None:
            child = self._answered[model, code] = self.requests.labels(model, str(code))
        return child

    def render(self) -> bytes:
        """Return the exposition text."""
        if not self._shared:
            return generate_latest(self.registry)
        every = CollectorRegistry()
        MultiProcessCollector(every)  # registers itself
        return generate_latest(every)

    def forget_version(self, model: str, version: str, target: str) -> None:
        """Remove a version that is no longer in service."""
        self.model_info.labels(model, version, target).set(0)
        if not self._shared:  # a label cannot be removed from the shared files
            self.model_info.remove(model, version, target)
