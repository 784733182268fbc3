"""Admit or reject a request on its head, before its body is read and before a task is started.

Under four times its load a server rejects three requests for each that it answers, so the cost of a rejection
is taken from the answers. The bytes of a rejection are prepared once for each message; only the request id differs.
"""

from __future__ import annotations

import hmac
import itertools
import json
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus

from sbs_edge.serve.admission import AdmissionSlot
from sbs_edge.serve.errors import HttpError
from sbs_edge.serve.service import Service

__all__ = ["PREDICT_PATH", "AdmissionFilter", "RawHeaders", "Rejection", "header", "prepare", "request_id"]

PREDICT_PATH = "/v1/predict"
_OPEN_PATHS = frozenset({"/", "/openapi.json", "/v2/health/live", "/v2/health/ready"})
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")

# Ids count from a random start: asking the system for random bytes releases the interpreter lock, and a busy
# worker then keeps it for a whole switch interval.
_PROCESS = secrets.token_hex(4).encode()
_numbers = itertools.count(secrets.randbits(32))

RawHeaders = Sequence[tuple[bytes, bytes]]


def header(headers: RawHeaders, wanted: bytes) -> bytes:
    """Return the first value of a header (name in lower case), or ``b""``."""
    for name, value in headers:
        if name == wanted:
            return value
    return b""


def request_id(headers: RawHeaders) -> bytes:
    """Return the id the client gave, or a new one."""
    given = header(headers, b"x-request-id")
    return given if _REQUEST_ID.fullmatch(given) else b"%b%08x" % (_PROCESS, next(_numbers) & 0xFFFFFFFF)


def _length(headers: RawHeaders) -> int:
    """Return the declared length of the body in bytes, 0 if there is none."""
    given = header(headers, b"content-length")
    return int(given) if given.isdigit() and len(given) <= 18 else 0


def _is_inference(method: str, path: str) -> bool:
    return method == "POST" and (
        path == PREDICT_PATH or (path.startswith("/v2/models/") and path.endswith("/infer"))
    )


@dataclass(frozen=True, slots=True)
class Rejection:
    """A prepared error response: in parts for ASGI, and as the bytes that precede the request id for a socket."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    head: bytes
    closes: bool


def prepare(error: HttpError, *, closing: bool = False) -> Rejection:
    """Return an error as a prepared response; ``closing`` adds ``Connection: close``."""
    body = json.dumps({"error": error.message}).encode()
    fields = {**error.headers, "Content-Type": "application/json", "Content-Length": str(len(body))}
    if closing:
        fields["Connection"] = "close"
    lines = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
    head = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n".encode()
    head += b"".join(b"%b: %b\r\n" % line for line in lines) + b"x-request-id: "
    return Rejection(error.status, lines, body, head, "Connection" in fields)


class AdmissionFilter:
    """Admits or rejects requests on their heads, and counts the rejections."""

    def __init__(self, service: Service) -> None:
        self._service = service
        token = service.settings.token
        self._credential = token.get_secret_value().encode() if token else None
        self._prepared: dict[tuple[int, str], Rejection] = {}

    def authorizes(self, path: str, headers: RawHeaders) -> bool:
        """Return whether a request has the token or needs none."""
        if self._credential is None or path in _OPEN_PATHS:
            return True
        scheme, _, given = header(headers, b"authorization").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._credential)

    def admit(self, method: str, path: str, headers: RawHeaders) -> Rejection | AdmissionSlot | None:
        """Return a slot, a rejection, or ``None`` for a request that is not inference or lacks the token."""
        if not _is_inference(method, path) or not self.authorizes(path, headers):
            return None
        service = self._service
        refusal = service.refusal(labels=path == PREDICT_PATH, n_bytes=_length(headers))
        if refusal is None:
            return AdmissionSlot(service.gate, service.pending, service.body_bytes)
        self.count(refusal)
        key = (refusal.status, refusal.message)
        prepared = self._prepared.get(key)
        if prepared is None:
            prepared = self._prepared[key] = prepare(refusal)
        return prepared

    def count(self, refusal: HttpError) -> None:
        """Count an error answered outside the application."""
        service = self._service
        service.refusals.count(refusal.reason)
        service.refusals.note(refusal.reason, refusal.status)
        service.metrics.answered("", refusal.status).inc()
