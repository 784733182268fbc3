"""The validated options and limits of a server; the command line has an option for each field, except the secrets."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

__all__ = ["ServeSettings"]


class ServeSettings(BaseModel):
    """Options of a server; sizes are in bytes, times in the unit that the name ends with.

    Each field's description is also its help text in ``sbs-edge serve``, in this order.
    """

    # Built when a server starts: every command of the command line imports this class for its options.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

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
        description="Processes that share the port, the memory of the weights and, in equal parts, the "
        "limits.",
    )
    target: str | None = Field(None, description="Target of the bundle to run. Default: its first.")
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads per inference: more make a call shorter, fewer let calls overlap. Default: "
        "as many as the CPU quota and affinity allow.",
    )

    watch_s: float = Field(
        0.0, ge=0, description="Seconds between checks for new versions; 0 checks only on SIGHUP."
    )
    max_versions: int = Field(2, ge=1, description="Versions to keep in memory, the newest first.")

    max_batch_tokens: int = Field(
        512,
        ge=1,
        description="Tokens per inference, padding included; more adds latency and little throughput.",
    )
    max_wait_ms: float = Field(
        2.0,
        ge=0,
        le=1000,
        description="Longest wait for texts that are still being tokenised; a lone text never waits.",
    )
    label_workers: int = Field(
        1, ge=1, description="Label batches that run at once, each with --threads threads."
    )
    rationale_workers: int = Field(
        1, ge=1, description="Rationale batches that run at once, beside the label batches."
    )
    worker_nice: int = Field(
        0,
        ge=0,
        le=19,
        description="Niceness of inference below the event loop: rejections are faster on a busy core, but "
        "other processes of the machine go first.",
    )

    truncate: bool = Field(
        False, description="Cut texts over the token limit and say so, instead of answering 400."
    )
    max_body_bytes: int = Field(
        2_000_000, ge=1, description="Largest body, counted after decompression; larger get 413."
    )
    max_inside_bytes: int = Field(
        67_108_864,
        ge=1,
        description="Most bytes of bodies in the server at once; more get 429. Plan four times this in "
        "memory.",
    )
    max_texts: int = Field(32, ge=1, description="Most texts per request; more get 400.")
    max_concurrent: int = Field(512, ge=1, description="Most requests at once; more get 429.")
    max_queue_texts: int = Field(1024, ge=1, description="Most texts in the queue of a model; more get 429.")
    max_queue_ms: float = Field(
        500.0,
        gt=0,
        description="Longest estimated wait; a longer one gets 429. Lower rejects earlier and answers sooner.",
    )
    timeout_s: float = Field(
        30.0,
        gt=0,
        description="Longest time to answer; later is a 504. A request header may set another time.",
    )
    body_timeout_s: float = Field(
        10.0,
        gt=0,
        description="Longest time for a body to arrive; later is a 408. A slow link may need more.",
    )
    head_timeout_s: float = Field(
        10.0,
        gt=0,
        description="Longest time for the request line and headers; then the connection is closed.",
    )
    max_head_bytes: int = Field(
        65_536,
        ge=1024,
        description="Most bytes of request line and headers; more get 431. Any client can use this memory.",
    )
    max_connections: int = Field(
        2048, ge=1, description="Most connections at once; more get 503. Each may hold a full set of headers."
    )
    drain_timeout_s: float = Field(
        30.0, ge=0, description="Seconds for running requests after SIGTERM; then they are cut off (exit 1)."
    )

    token: SecretStr | None = None
    tls_cert: Path | None = Field(None, description="PEM certificate chain; needs --tls-key.")
    tls_key: Path | None = Field(None, description="PEM private key; needs --tls-cert.")

    escalate_url: str | None = Field(
        None,
        description="OpenAI-compatible base URL that is asked when the student is uncertain: texts leave this"
        " machine. The key is SBS_EDGE_SERVE_ESCALATE_KEY.",
    )
    escalate_model: str = Field("default", description="Name of the larger model.")
    escalate_key: SecretStr | None = None
    escalate_timeout_s: float = Field(
        10.0,
        gt=0,
        description="Longest wait for the larger model; then the student's answer stays, marked as uncertain.",
    )
    escalate_concurrency: int = Field(
        8, ge=1, description="Most escalated texts at once; others keep the student's answer."
    )

    abstain_below: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Probability below which an answer is marked as uncertain. Default: the bundle's.",
    )

    record: Path | None = Field(
        None,
        description="Keep the texts of uncertain and escalated answers in this .jsonl file, which annotate reads. They "
        "may be personal data; only the file's owner may read it (mode 0600).",
    )
    record_below: float = Field(
        0.8,
        ge=0,
        le=1,
        description="Record answers with a lower probability; those marked as uncertain are always recorded.",
    )
    record_share: float = Field(1.0, gt=0, le=1, description="Share of them to record, chosen at random.")
    record_max_bytes: int = Field(
        67_108_864, ge=4096, description="Most bytes of the recorded file and its three older parts together."
    )

    log_inputs: bool = Field(False, description="Write the texts into the log. They may be personal data.")
    access_log: bool = Field(True, description="Write a log line for each answered request.")
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
        if self.record is not None and self.record.suffix != ".jsonl":
            raise ValueError(
                "the name of the recorded file must end in .jsonl, which annotate reads (record)"
            )
        if self.token is not None and not self.token.get_secret_value():
            raise ValueError("the bearer token is empty")
        return self
