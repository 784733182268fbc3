"""Prometheus metrics in base units; label values come from a known set, never from a request."""

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
    """The server's metrics; ``render`` returns the text of ``GET /metrics``."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        # With several processes, each keeps its values in files of a shared directory.
        self._shared = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        if not self._shared:
            ProcessCollector(registry=registry)
        self.requests = Counter(
            "sbs_edge_requests",
            "Requests answered, by model and status code.",
            ["model", "code"],
            registry=registry,
        )
        self.request_seconds = Histogram(
            "sbs_edge_request_duration_seconds",
            "Time from the first byte of a request to its response.",
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
            "Time to tokenise the texts of a request.",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.inference_seconds = Histogram(
            "sbs_edge_inference_duration_seconds",
            "Time a worker took for a batch.",
            ["model", "task"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.batch_size = Histogram(
            "sbs_edge_batch_size",
            "Number of texts in a batch.",
            ["model", "task"],
            buckets=_TEXTS,
            registry=registry,
        )
        self.queue_size = Gauge(
            "sbs_edge_queue_size",
            "Number of texts waiting for a worker.",
            ["model", "task"],
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.in_flight = Gauge(
            "sbs_edge_requests_in_flight",
            "Number of admitted requests that are not answered yet.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.rejected = Counter(
            "sbs_edge_rejected",
            "Requests rejected by a limit, by reason.",
            ["reason"],
            registry=registry,
        )
        self.input_tokens = Counter(
            "sbs_edge_input_tokens", "Input tokens, without padding.", ["model"], registry=registry
        )
        self.output_tokens = Counter(
            "sbs_edge_output_tokens", "Generated rationale tokens.", ["model"], registry=registry
        )
        self.abstained = Counter(
            "sbs_edge_abstained",
            "Answers with a probability below the abstain threshold.",
            ["model"],
            registry=registry,
        )
        self.escalations = Counter(
            "sbs_edge_escalations",
            "Texts escalated to the larger model, by result.",
            ["model", "result"],
            registry=registry,
        )
        self.recorded = Counter(
            "sbs_edge_recorded",
            "Doubtful and escalated rows for the file of --record, by result: kept, dropped or failed.",
            ["model", "result"],
            registry=registry,
        )
        self.reloads = Counter(
            "sbs_edge_reloads",
            "Model versions loaded, refused and retired.",
            ["model", "result"],
            registry=registry,
        )
        self.stale_versions = Gauge(
            "sbs_edge_stale_versions",
            "Number of versions that still answer although the files now in their directory were refused.",
            ["model"],
            multiprocess_mode="livemax",
            registry=registry,
        )
        self.ready = Gauge(
            "sbs_edge_ready",
            "1 if the server is ready to answer requests, else 0.",
            multiprocess_mode="livemin",
            registry=registry,
        )
        self.model_info = Gauge(
            "sbs_edge_model_info",
            "1 for each model version in service.",
            ["model", "version", "target"],
            multiprocess_mode="livemax",
            registry=registry,
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
