"""Errors of the HTTP layer: a status, a message for the client, and a reason for the metrics.

This module depends on nothing else of the package, so every other module may import it.
"""

from __future__ import annotations

import math

__all__ = [
    "ClientLeft",
    "HttpError",
    "bad_request",
    "draining",
    "long_head",
    "malformed",
    "many_headers",
    "not_ready",
    "overloaded",
    "slow_body",
    "too_large",
    "too_many_connections",
]


_LONGEST_MESSAGE = 1000  # characters


class HttpError(Exception):
    """A deliberate response other than 200.

    ``reason`` is the label of ``sbs_edge_rejected_total`` if a limit rejected the request, and empty if the request
    itself was wrong.
    """

    def __init__(
        self, status: int, message: str, *, reason: str = "", headers: dict[str, str] | None = None
    ) -> None:
        # A message may quote a name from the request, and a name may be as long as the body.
        if len(message) > _LONGEST_MESSAGE:
            message = f"{message[:_LONGEST_MESSAGE]} [...]"
        super().__init__(message)
        self.status = status
        self.message = message
        self.reason = reason
        self.headers = headers or {}


class ClientLeft(Exception):
    """The client closed its connection before the answer was ready."""


def bad_request(message: str) -> HttpError:
    """400: the request does not follow the interface."""
    return HttpError(400, message)


def too_large(limit_bytes: int) -> HttpError:
    """413: the body, counted after decompression, is over ``limit_bytes``."""
    return HttpError(
        413,
        f"The request body is over the limit of {limit_bytes} bytes (max_body_bytes, counted after decompression). "
        "Send fewer or shorter texts per request.",
        reason="body",
        headers={"Connection": "close"},
    )


def slow_body(limit_s: float) -> HttpError:
    """408: the body did not arrive within ``limit_s`` seconds of its head."""
    return HttpError(
        408,
        f"The request body did not arrive within {limit_s:g} s (body_timeout_s).",
        reason="slow_body",
        headers={"Connection": "close"},
    )


def malformed(message: str, status: int = 400) -> HttpError:
    """400 or 405: the request is not valid HTTP/1.1."""
    return HttpError(status, message, reason="malformed")


def long_head(limit_bytes: int) -> HttpError:
    """431: the request line and headers, or the framing of a body, are over ``limit_bytes``."""
    return HttpError(
        431,
        f"The request line and headers are over {limit_bytes} bytes (max_head_bytes).",
        reason="malformed",
    )


def many_headers(limit: int) -> HttpError:
    """431: more than ``limit`` header lines."""
    return HttpError(431, f"The request has more than {limit} headers.", reason="malformed")


def too_many_connections(limit: int) -> HttpError:
    """503: the server has ``limit`` connections already."""
    return HttpError(
        503,
        f"The server holds its limit of {limit} connections (max_connections); close idle ones.",
        reason="connections",
        headers={"Retry-After": "1"},
    )


def overloaded(reason: str, wait_s: float) -> HttpError:
    """429: a limit is reached; ``wait_s`` (estimated seconds of queue) becomes ``Retry-After``, at least 1."""
    seconds = max(1, math.ceil(min(wait_s, 60.0)))
    return HttpError(
        429,
        f"The server is at its limit of queued work; try again in {seconds} s.",
        reason=reason,
        headers={"Retry-After": str(seconds)},
    )


def not_ready() -> HttpError:
    """503: no model has passed its warm-up yet."""
    return HttpError(503, "The server is not ready: its models are still loading.", reason="not_ready")


def draining() -> HttpError:
    """503: the server is stopping and finishes its admitted requests."""
    return HttpError(
        503,
        "The server is stopping and accepts no new requests.",
        reason="draining",
        headers={"Connection": "close"},
    )
