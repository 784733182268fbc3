"""Outermost layer: the door, the bearer token, request ids, metrics, log line and trace of every request."""

from __future__ import annotations

import asyncio
import time
import traceback
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sbs_edge.serve import errors
from sbs_edge.serve.admission import AdmissionSlot
from sbs_edge.serve.admission_filter import AdmissionFilter, RawHeaders, Refused, header, request_id
from sbs_edge.serve.inference_request import Timing
from sbs_edge.serve.logs import logger
from sbs_edge.serve.responses import error_response, json_response
from sbs_edge.serve.service import Service

__all__ = ["RequestMiddleware"]

_OVERLOAD = (429, 503)  # logged as sums
_LONGEST_FIELD = 256  # characters of what a client chose, in the log and in traces
_KEEP_ALIVE = (b"connection", b"keep-alive")  # a client of HTTP/1.0 has to be told


def _frames(error: BaseException) -> list[str]:
    """Where an error came from, without its message: that may quote a text."""
    return [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]


async def _refuse(refused: Refused, scope: Scope, send: Send) -> None:
    """Answer without reading the body; the connection stays usable unless the refusal closes it."""
    headers: RawHeaders = scope["headers"]
    lines = [*refused.headers, (b"x-request-id", request_id(headers))]
    if not refused.closes:
        if header(headers, b"expect"):
            lines.append((b"connection", b"close"))  # whether the body will be sent is not known
        elif scope["state"].get("keep_alive"):
            lines.append(_KEEP_ALIVE)
    await send({"type": "http.response.start", "status": refused.status, "headers": lines})
    await send({"type": "http.response.body", "body": refused.body})


class RequestMiddleware:
    """ASGI middleware around the routes.

    The connection asks the door itself where it can (:mod:`sbs_edge.serve.protocol`); what comes here
    unasked, under another server or in HTTP/1.0, is asked here.
    """

    def __init__(self, app: ASGIApp, service: Service, door: AdmissionFilter) -> None:
        self._app = app
        self._service = service
        self._door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse, or pass on and account for, one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: RawHeaders = scope["headers"]
        state: dict[str, Any] = scope.setdefault("state", {})
        passage: AdmissionSlot | None = state.get("passage")  # given on the connection
        if passage is None:
            asked = self._door.ask(scope["method"], scope["path"], headers)
            if isinstance(asked, Refused):
                await _refuse(asked, scope, send)
                return
            passage = state["passage"] = asked
        try:
            await self._serve(
                scope, receive, send, allowed=passage is not None or self._door.knows(scope["path"], headers)
            )
        finally:
            if passage is not None:
                passage.leave()

    async def _serve(self, scope: Scope, receive: Receive, send: Send, *, allowed: bool) -> None:
        started = time.perf_counter()
        identity = request_id(scope["headers"])
        state: dict[str, Any] = scope.setdefault("state", {})
        state.update(
            timing=Timing(), request_id=identity.decode(), model="", version="", n_texts=0, reason=""
        )
        code = 500
        begun = False

        async def tagged(message: Message) -> None:
            nonlocal code, begun
            if message["type"] == "http.response.start":
                begun = True
                code = message["status"]
                lines = message["headers"] = [*message["headers"], (b"x-request-id", identity)]
                if state.get("keep_alive") and not header(lines, b"connection"):
                    lines.append(_KEEP_ALIVE)
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
            path = scope["path"][:_LONGEST_FIELD]
            logger.error("request_failed", request_id=state["request_id"], path=path, **fields)
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
            # On the loop's next turn: the connection writes at the end of this one, and a log line first
            # would keep the answer from the client.
            asyncio.get_running_loop().call_soon(self._log, scope, state, code, elapsed_s)
        if service.tracing:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
            attributes = {"sbs_edge.model": model, "sbs_edge.n_texts": state["n_texts"]}
            service.tracing.record(
                headers, scope["path"][:_LONGEST_FIELD], code, elapsed_s, attributes, state["timing"]
            )

    def _log(self, scope: Scope, state: dict[str, Any], code: int, elapsed_s: float) -> None:
        timing: Timing = state["timing"]
        fields: dict[str, Any] = {
            "request_id": state["request_id"],
            "client": scope["client"][0] if scope.get("client") else "",
            "path": scope["path"][:_LONGEST_FIELD],
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
        if state.get("client_id") is not None:
            fields["client_id"] = state["client_id"][:_LONGEST_FIELD]
        if state.get("inputs") is not None:
            fields["inputs"] = state["inputs"]
        logger.info("request", **fields)
