"""The validated options and limits of a server; the command line has an option for each field, except the secrets."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

__all__ = ["ServeSettings"]


class ServeSettings(BaseModel):
    """Options of a server; sizes are in bytes, times in the unit that the name ends with.

    Each field's description is also its help text in ``sbs-edge serve``, in this order.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field(
        "127.0.0.1", description="Address to bind; anything but loopback lets other machines in."
    )
    port: int = Field(8080, ge=0, le=65535, description="Port; 0 takes a free one and logs it.")
    uds: Path | None = Field(
        None, description="Listen on this Unix socket instead of an address (mode 0660)."
    )
    workers: int = Field(
        1,
        ge=1,
        le=256,
        description="Processes that answer together; each has an event loop, and an equal part of the limits. "
        "They share the weights' memory.",
    )
    target: str | None = Field(
        None, description="Which target of the bundle to run; its default when left out."
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of one inference; more shortens a call, fewer let calls overlap. "
        "None: as many as the CPU quota and affinity allow.",
    )

    watch_s: float = Field(
        0.0, ge=0, description="Look for new versions every so many seconds; 0 only on SIGHUP."
    )
    max_versions: int = Field(2, ge=1, description="Newest versions kept in memory; each costs its size.")

    max_batch_tokens: int = Field(
        512,
        ge=1,
        description="Tokens in one inference, padding included; larger adds latency, hardly throughput.",
    )
    max_wait_ms: float = Field(
        2.0,
        ge=0,
        le=1000,
        description="Longest time a text waits for company; only while others are on their way.",
    )
    label_workers: int = Field(1, ge=1, description="Label batches run at once; each uses --threads threads.")
    rationale_workers: int = Field(
        1, ge=1, description="Rationale batches run at once, beside the label batches."
    )
    worker_nice: int = Field(
        0,
        ge=0,
        le=19,
        description="Priority steps of inference below the event loop: refusals are quicker on a busy core, and "
        "other processes of the machine go first.",
    )

    truncate: bool = Field(False, description="Cut texts over the token limit and say so, instead of a 400.")
    max_body_bytes: int = Field(
        2_000_000, ge=1, description="Larger bodies, counted after decompression, get 413."
    )
    max_inside_bytes: int = Field(
        67_108_864,
        ge=1,
        description="More bytes of bodies inside at once get 429: plan four times this in memory.",
    )
    max_texts: int = Field(32, ge=1, description="More texts in one request get 400.")
    max_concurrent: int = Field(512, ge=1, description="More requests at once get 429.")
    max_queue_texts: int = Field(
        1024, ge=1, description="More texts inside one model's queue get 429 instead of waiting."
    )
    max_queue_ms: float = Field(
        500.0,
        gt=0,
        description="A longer estimated wait gets 429: lower refuses earlier and answers sooner.",
    )
    timeout_s: float = Field(
        30.0, gt=0, description="Requests not answered in this time get 504; a header may set another."
    )
    body_timeout_s: float = Field(
        10.0, gt=0, description="Bodies that take longer to arrive get 408: a slow link may need more."
    )
    head_timeout_s: float = Field(
        10.0, gt=0, description="Connections whose request line and headers take longer are closed."
    )
    max_head_bytes: int = Field(
        65_536,
        ge=1024,
        description="Longer request lines and headers get 431; more is memory for strangers.",
    )
    max_connections: int = Field(
        2048, ge=1, description="More connections at once get 503; each may hold one head."
    )
    drain_timeout_s: float = Field(
        30.0, ge=0, description="Seconds running requests get after SIGTERM; then they are cut (exit 1)."
    )

    token: SecretStr | None = None
    tls_cert: Path | None = Field(None, description="PEM certificate chain; needs --tls-key.")
    tls_key: Path | None = Field(None, description="PEM private key; needs --tls-cert.")

    escalate_url: str | None = Field(
        None,
        description="OpenAI-compatible base URL asked when the student is unsure: texts leave this machine. "
        "The key comes from SBS_EDGE_SERVE_ESCALATE_KEY.",
    )
    escalate_model: str = Field("default", description="Model name sent to it.")
    escalate_key: SecretStr | None = None
    escalate_timeout_s: float = Field(
        10.0, gt=0, description="After this the student's own answer is given, marked as unsure."
    )
    escalate_concurrency: int = Field(
        8, ge=1, description="Escalated texts at once; what is beyond keeps the student's answer."
    )

    abstain_below: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Probability below which an answer is marked unsure; the bundle's when left out.",
    )
    log_inputs: bool = Field(False, description="Write the texts into the log: personal data may follow.")
    access_log: bool = Field(
        True, description="One log line for each answered request; off saves the time of writing them."
    )
    otel_endpoint: str | None = Field(
        None, description="Send OpenTelemetry traces to this OTLP/HTTP URL (extra 'otel')."
    )

    @model_validator(mode="after")
    def _pairs(self) -> ServeSettings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("TLS needs both a certificate and a key (tls_cert and tls_key)")
        if self.max_queue_texts < self.max_texts:
            raise ValueError("max_queue_texts must be at least max_texts, or a full request never fits")
        if self.max_inside_bytes < self.max_body_bytes:
            raise ValueError("max_inside_bytes must be at least max_body_bytes, or a full body never fits")
        if self.token is not None and not self.token.get_secret_value():
            raise ValueError("the bearer token is empty")
        return self
