"""Prometheus metrics: base units, one registry for each server, label values from a known set."""

from __future__ import annotations

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.process_collector import ProcessCollector

__all__ = ["Metrics"]

# From half a millisecond (one label) to half a minute (the default deadline).
_SECONDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.03, 0.06, 0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 30)
_TEXTS = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The server's metrics; ``render`` gives the text of ``GET /metrics``."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        # One of several processes keeps its numbers in files beside those of the others.
        self._shared = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        if not self._shared:
            ProcessCollector(registry=registry)
        self.requests = Counter(
            "sbs_edge_requests", "Answered requests.", ["model", "code"], registry=registry
        )
        self.request_seconds = Histogram(
            "sbs_edge_request_duration_seconds",
            "From the first byte of a request to its answer.",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.queue_seconds = Histogram(
            "sbs_edge_queue_duration_seconds",
            "Time a text waited for a worker.",
            ["model", "task"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.tokenize_seconds = Histogram(
            "sbs_edge_tokenize_duration_seconds",
            "Time to count a request's tokens.",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.inference_seconds = Histogram(
            "sbs_edge_inference_duration_seconds",
            "Time of one batch on a worker.",
            ["model", "task"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "sbs_edge_batch_size", "Texts in a batch.", ["model", "task"], buckets=_TEXTS, registry=registry
        )
        self.queue_size = Gauge(
            "sbs_edge_queue_size",
            "Texts waiting for a worker now.",
            ["model", "task"],
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.in_flight = Gauge(
            "sbs_edge_requests_in_flight",
            "Admitted requests without an answer yet.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.rejected = Counter(
            "sbs_edge_rejected",
            "Requests turned away by a limit, by reason.",
            ["reason"],
            registry=registry,
        )
        self.input_tokens = Counter(
            "sbs_edge_input_tokens", "Tokens read, padding not counted.", ["model"], registry=registry
        )
        self.output_tokens = Counter(
            "sbs_edge_output_tokens", "Rationale tokens generated.", ["model"], registry=registry
        )
        self.abstained = Counter(
            "sbs_edge_abstained", "Answers below the abstain threshold.", ["model"], registry=registry
        )
        self.escalations = Counter(
            "sbs_edge_escalations",
            "Answers asked of the larger model, by result.",
            ["model", "result"],
            registry=registry,
        )
        self.reloads = Counter(
            "sbs_edge_reloads",
            "Versions loaded, refused and retired.",
            ["model", "result"],
            registry=registry,
        )
        self.stale_versions = Gauge(
            "sbs_edge_stale_versions",
            "Versions that answer from memory because what lies in their directory now was refused.",
            ["model"],
            multiprocess_mode="livemax",
            registry=registry,
        )
        self.ready = Gauge(
            "sbs_edge_ready",
            "1 while the server answers requests.",
            multiprocess_mode="livemin",
            registry=registry,
        )
        self.model_info = Gauge(
            "sbs_edge_model_info",
            "1 for each version served.",
            ["model", "version", "target"],
            multiprocess_mode="livemax",
            registry=registry,
        )

        self._answered: dict[tuple[str, int], Counter] = {}

    def answered(self, model: str, code: int) -> Counter:
        """Return the child of ``requests`` for a model and a status, looked up once."""
        child = self._answered.get((model, code))
        if child is None:
            child = self._answered[model, code] = self.requests.labels(model, str(code))
        return child

    def render(self) -> bytes:
        """Return the exposition text."""
        if not self._shared:
            return generate_latest(self.registry)
        every = CollectorRegistry()
        MultiProcessCollector(every)  # adds itself
        return generate_latest(every)

    def forget_version(self, model: str, version: str, target: str) -> None:
        """Stop showing a version that is not served any more."""
        self.model_info.labels(model, version, target).set(0)
        if not self._shared:  # files have no place to take a label out of
            self.model_info.remove(model, version, target)
