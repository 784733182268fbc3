"""The door: may a request come in? Asked when its head has arrived, before its body and before any task.

Under four times its load a server refuses three requests for each it answers, so what a refusal costs
is what is left for answers. Its bytes are prepared once for each wording; only the request id differs.
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

__all__ = ["PREDICT_PATH", "AdmissionFilter", "RawHeaders", "Refused", "header", "prepare", "request_id"]

PREDICT_PATH = "/v1/predict"
_OPEN_PATHS = frozenset({"/", "/openapi.json", "/v2/health/live", "/v2/health/ready"})
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")

# Ids count from a random start: asking the system for random bytes lets go of the interpreter, and a busy
# worker then keeps it for a whole switch interval.
_PROCESS = secrets.token_hex(4).encode()
_numbers = itertools.count(secrets.randbits(32))

RawHeaders = Sequence[tuple[bytes, bytes]]


def header(headers: RawHeaders, wanted: bytes) -> bytes:
    """Return the first value of a header (its name in lower case), empty where there is none."""
    for name, value in headers:
        if name == wanted:
            return value
    return b""


def request_id(headers: RawHeaders) -> bytes:
    """Return the id the client gave, or a new one."""
    given = header(headers, b"x-request-id")
    return given if _REQUEST_ID.fullmatch(given) else b"%b%08x" % (_PROCESS, next(_numbers) & 0xFFFFFFFF)


def _length(headers: RawHeaders) -> int:
    """Return how many bytes the body is said to have, 0 where that is not said; never negative."""
    given = header(headers, b"content-length")
    return int(given) if given.isdigit() and len(given) <= 18 else 0


def _is_work(method: str, path: str) -> bool:
    return method == "POST" and (
        path == PREDICT_PATH or (path.startswith("/v2/models/") and path.endswith("/infer"))
    )


@dataclass(frozen=True, slots=True)
class Refused:
    """A prepared answer: for ASGI in parts, for a socket as bytes that lack ``request id CRLF CRLF body``."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes
    head: bytes
    closes: bool


def prepare(refusal: HttpError, *, closing: bool = False) -> Refused:
    """Write a refusal's bytes; ``closing`` announces the end of the connection whatever it says itself."""
    body = json.dumps({"error": refusal.message}).encode()
    fields = {**refusal.headers, "Content-Type": "application/json", "Content-Length": str(len(body))}
    if closing:
        fields["Connection"] = "close"
    lines = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
    head = f"HTTP/1.1 {refusal.status} {HTTPStatus(refusal.status).phrase}\r\n".encode()
    head += b"".join(b"%b: %b\r\n" % line for line in lines) + b"x-request-id: "
    return Refused(refusal.status, lines, body, head, "Connection" in fields)


class AdmissionFilter:
    """Decides about a request from its head, and counts what it refuses."""

    def __init__(self, service: Service) -> None:
        self._service = service
        token = service.settings.token
        self._credential = token.get_secret_value().encode() if token else None
        self._prepared: dict[tuple[int, str], Refused] = {}

    def knows(self, path: str, headers: RawHeaders) -> bool:
        """Whether a request carries the token, or needs none."""
        if self._credential is None or path in _OPEN_PATHS:
            return True
        scheme, _, given = header(headers, b"authorization").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._credential)

    def refuse(self, method: str, path: str, headers: RawHeaders) -> Refused | None:
        """Return the answer of work there is no room for, and count it; ``None``: let it in."""
        asked = self.ask(method, path, headers)
        if isinstance(asked, AdmissionSlot):
            asked.leave()
            return None
        return asked

    def ask(self, method: str, path: str, headers: RawHeaders) -> Refused | AdmissionSlot | None:
        """Refuse work there is no room for, or take its place; ``None``: not work, or not known here."""
        if not _is_work(method, path) or not self.knows(path, headers):
            return None
        service = self._service
        refusal = service.refusal(labels=path == PREDICT_PATH, n_bytes=_length(headers))
        if refusal is None:
            return AdmissionSlot(service.gate, service.coming, service.body_bytes)
        self.count(refusal)
        key = (refusal.status, refusal.message)
        prepared = self._prepared.get(key)
        if prepared is None:
            prepared = self._prepared[key] = prepare(refusal)
        return prepared

    def count(self, refusal: HttpError) -> None:
        """Count what was refused on a connection."""
        service = self._service
        service.refusals.count(refusal.reason)
        service.refusals.note(refusal.reason, refusal.status)
        service.metrics.answered("", refusal.status).inc()
