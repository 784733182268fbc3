"""Outermost layer: the door, the bearer token, request ids, metrics, log line and trace of every request.

A request the server has no room for is refused here, before it is read, routed or given a trace: the
answer is prepared once for each wording, and costs a counter.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
import time
import traceback
from collections.abc import Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sbs_edge.serve import errors
from sbs_edge.serve.asking import Timing
from sbs_edge.serve.logs import logger
from sbs_edge.serve.responses import error_response, json_response
from sbs_edge.serve.service import Service

__all__ = ["PREDICT_PATH", "Edge"]

PREDICT_PATH = "/v1/predict"
_OPEN_PATHS = frozenset({"/", "/openapi.json", "/v2/health/live", "/v2/health/ready"})
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_OVERLOAD = (429, 503)  # logged as sums

RawHeaders = Sequence[tuple[bytes, bytes]]


def _is_work(method: str, path: str) -> bool:
    return method == "POST" and (
        path == PREDICT_PATH or (path.startswith("/v2/models/") and path.endswith("/infer"))
    )


def _header(headers: RawHeaders, wanted: bytes) -> bytes:
    for name, value in headers:
        if name == wanted:
            return value
    return b""


def _request_id(headers: RawHeaders) -> bytes:
    given = _header(headers, b"x-request-id")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8).encode()


def _frames(error: BaseException) -> list[str]:
    """Where an error came from, without its message: that may quote a text."""
    return [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]


class Edge:
    """ASGI middleware around the routes."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        token = service.settings.token
        self._credential = f"Bearer {token.get_secret_value()}".encode() if token else None
        self._prepared: dict[tuple[int, str], tuple[list[tuple[bytes, bytes]], bytes]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on and account for, one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        raw: RawHeaders = scope["headers"]
        allowed = self._credential is None or scope["path"] in _OPEN_PATHS or self._holds_token(raw)
        if allowed and _is_work(scope["method"], scope["path"]):
            refusal = self._service.refusal(labels=scope["path"] == PREDICT_PATH)
            if refusal is not None:
                await self._refuse(refusal, raw, send)
                return
        await self._serve(scope, receive, send, allowed=allowed)

    def _holds_token(self, headers: RawHeaders) -> bool:
        return hmac.compare_digest(_header(headers, b"authorization"), self._credential or b"")

    async def _refuse(self, refusal: errors.HttpError, headers: RawHeaders, send: Send) -> None:
        """Answer without reading the body; the connection stays usable unless the refusal closes it."""
        service = self._service
        key = (refusal.status, refusal.message)
        prepared = self._prepared.get(key)
        if prepared is None:
            body = json.dumps({"error": refusal.message}).encode()
            fields = {
                **refusal.headers,
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
            }
            lines = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
            prepared = self._prepared[key] = lines, body
        lines, body = prepared
        service.refusals.count(refusal.reason)
        service.refusals.note(refusal.reason, refusal.status)
        service.metrics.answered("", refusal.status).inc()
        named = [*lines, (b"x-request-id", _request_id(headers))]
        await send({"type": "http.response.start", "status": refusal.status, "headers": named})
        await send({"type": "http.response.body", "body": body})

    async def _serve(self, scope: Scope, receive: Receive, send: Send, *, allowed: bool) -> None:
        started = time.perf_counter()
        request_id = _request_id(scope["headers"])
        state: dict[str, Any] = scope.setdefault("state", {})
        state.update(
            timing=Timing(), request_id=request_id.decode(), model="", version="", n_texts=0, reason=""
        )
        code = 500
        begun = False

        async def tagged(message: Message) -> None:
            nonlocal code, begun
            if message["type"] == "http.response.start":
                begun = True
                code = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        try:
            if allowed:
                await self._app(scope, receive, tagged)
            else:
                refusal = errors.HttpError(
                    401, "A valid bearer token is needed.", headers={"WWW-Authenticate": "Bearer"}
                )
                await error_response(refusal)(scope, receive, tagged)
        except Exception as error:
            code = 500
            fields: dict[str, Any] = {"error": type(error).__name__, "at": _frames(error)}
            if self._service.settings.log_inputs:
                fields["message"] = str(error)
            logger.error("request_failed", request_id=state["request_id"], path=scope["path"], **fields)
            if not begun:
                failed = json_response({"error": "The server failed on this request."}, 500)
                await failed(scope, receive, tagged)
        finally:
            self._account(scope, state, code, time.perf_counter() - started)

    def _account(self, scope: Scope, state: dict[str, Any], code: int, elapsed_s: float) -> None:
        service, model = self._service, state["model"]
        service.metrics.answered(model, code).inc()
        if not model and scope["method"] == "GET":
            return  # probes and scrapes: counted, neither timed nor logged
        if model:
            service.metrics.request_seconds.labels(model).observe(elapsed_s)
        if code in _OVERLOAD:
            service.refusals.note(state["reason"], code)
        elif service.settings.access_log:
            self._log(scope, state, code, elapsed_s)
        if service.tracing:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            attributes = {"sbs_edge.model": model, "sbs_edge.n_texts": state["n_texts"]}
            service.tracing.record(headers, scope["path"], code, elapsed_s, attributes, state["timing"])

    def _log(self, scope: Scope, state: dict[str, Any], code: int, elapsed_s: float) -> None:
        timing: Timing = state["timing"]
        fields: dict[str, Any] = {
            "request_id": state["request_id"],
            "path": scope["path"],
            "code": code,
            "ms": round(elapsed_s * 1e3, 2),
        }
        if state["model"]:
            fields |= {
                "model": state["model"],
                "version": state["version"],
                "n_texts": state["n_texts"],
                "queue_ms": round(timing.queue_s * 1e3, 2),
                "inference_ms": round(timing.inference_s * 1e3, 2),
            }
        if state["reason"]:
            fields["reason"] = state["reason"]
        for name in ("client_id", "inputs"):
            if state.get(name) is not None:
                fields[name] = state[name]
        logger.info("request", **fields)
