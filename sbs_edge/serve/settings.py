"""The validated options and limits of a server. Each field is a flag of ``sbs-edge serve``."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

__all__ = ["ServeSettings"]


class ServeSettings(BaseModel):
    """Options of a server; sizes are in bytes, times in the unit that the name ends with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Models
    target: str | None = None
    threads: int | None = Field(default=None, ge=1)
    max_versions: int = Field(default=2, ge=1)
    watch_s: float = Field(default=0.0, ge=0)

    # Batching
    max_batch_tokens: int = Field(default=512, ge=1)
    max_wait_ms: float = Field(default=2.0, ge=0, le=1000)
    label_workers: int = Field(default=1, ge=1)
    rationale_workers: int = Field(default=1, ge=1)
    worker_nice: int = Field(default=0, ge=0, le=19)
    truncate: bool = False

    # Limits
    max_body_bytes: int = Field(default=2_000_000, ge=1)
    max_inside_bytes: int = Field(default=67_108_864, ge=1)
    max_texts: int = Field(default=32, ge=1)
    max_concurrent: int = Field(default=512, ge=1)
    max_queue_texts: int = Field(default=1024, ge=1)
    max_queue_ms: float = Field(default=500.0, gt=0)
    timeout_s: float = Field(default=30.0, gt=0)
    body_timeout_s: float = Field(default=10.0, gt=0)
    head_timeout_s: float = Field(default=10.0, gt=0)
    max_head_bytes: int = Field(default=65_536, ge=1024)
    max_connections: int = Field(default=2048, ge=1)
    drain_timeout_s: float = Field(default=30.0, ge=0)

    # Access
    token: SecretStr | None = None

    # Cascade
    escalate_url: str | None = None
    escalate_model: str = "default"
    escalate_key: SecretStr | None = None
    escalate_timeout_s: float = Field(default=10.0, gt=0)
    escalate_concurrency: int = Field(default=8, ge=1)
    abstain_below: float | None = Field(default=None, ge=0, le=1)

    # Recording
    record: Path | None = None
    record_below: float = Field(default=0.8, ge=0, le=1)
    record_share: float = Field(default=1.0, gt=0, le=1)
    record_max_bytes: int = Field(default=67_108_864, ge=4096)

    # Operations
    log_inputs: bool = False
    access_log: bool = True
    otel_endpoint: str | None = None

    # Transport
    host: str = "127.0.0.1"
    port: int = Field(default=8080, ge=0, le=65535)
    uds: Path | None = None
    workers: int = Field(default=1, ge=1, le=256)
    tls_cert: Path | None = None
    tls_key: Path | None = None

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
