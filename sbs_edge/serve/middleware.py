"""ASGI middleware: admission, bearer token, request id, metrics, log line and trace of every request."""

from __future__ import annotations

import asyncio
import time
import traceback
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sbs_edge.serve import errors
from sbs_edge.serve.admission import AdmissionSlot
from sbs_edge.serve.admission_filter import AdmissionFilter, RawHeaders, Rejection, header, request_id
from sbs_edge.serve.inference_request import Timing
from sbs_edge.serve.logs import logger
from sbs_edge.serve.responses import error_response, json_response
from sbs_edge.serve.service import Service

__all__ = ["RequestMiddleware"]

_OVERLOAD = (429, 503)  # logged as totals
_LONGEST_FIELD = 256  # characters of a value the client chose, in logs and traces
_KEEP_ALIVE = (b"connection", b"keep-alive")  # needed by HTTP/1.0 clients


def _frames(error: BaseException) -> list[str]:
    """Return where an error came from, without its message, which may quote a text."""
    return [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_tb(error.__traceback__)]


async def _refuse(rejection: Rejection, scope: Scope, send: Send) -> None:
    """Answer without reading the body; the connection stays open unless the rejection closes it."""
    headers: RawHeaders = scope["headers"]
    lines = [*rejection.headers, (b"x-request-id", request_id(headers))]
    if not rejection.closes:
        if header(headers, b"expect"):
            lines.append((b"connection", b"close"))  # it is not known whether the body will be sent
        elif scope["state"].get("keep_alive"):
            lines.append(_KEEP_ALIVE)
    await send({"type": "http.response.start", "status": rejection.status, "headers": lines})
    await send({"type": "http.response.body", "body": rejection.body})


class RequestMiddleware:
    """ASGI middleware around the routes.

    Most requests have passed the admission filter on their connection (:mod:`sbs_edge.serve.protocol`). Requests
    over HTTP/1.0, or under another server, have not and pass it here.
    """

    def __init__(self, app: ASGIApp, service: Service, admission_filter: AdmissionFilter) -> None:
        self._app = app
        self._service = service
        self._admission_filter = admission_filter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Reject a request, or pass it on and account for it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: RawHeaders = scope["headers"]
        state: dict[str, Any] = scope.setdefault("state", {})
        slot: AdmissionSlot | None = state.get("slot")  # set by the connection
        if slot is None:
            admitted = self._admission_filter.admit(scope["method"], scope["path"], headers)
            if isinstance(admitted, Rejection):
                await _refuse(admitted, scope, send)
                return
            slot = state["slot"] = admitted
        try:
            await self._serve(
                scope,
                receive,
                send,
                allowed=slot is not None or self._admission_filter.authorizes(scope["path"], headers),
            )
        finally:
            if slot is not None:
                slot.leave()

    async def _serve(self, scope: Scope, receive: Receive, send: Send, *, allowed: bool) -> None:
        started = time.perf_counter()
        identity = request_id(scope["headers"])
        state: dict[str, Any] = scope.setdefault("state", {})
        state.update(
            timing=Timing(), request_id=identity.decode(), model="", version="", n_texts=0, reason=""
        )
        code = 500
        begun = False

        async def send_with_id(message: Message) -> None:
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
                await self._app(scope, receive, send_with_id)
            else:
                refusal = errors.HttpError(
                    401, "A valid bearer token is needed.", headers={"WWW-Authenticate": "Bearer"}
                )
                await error_response(refusal)(scope, receive, send_with_id)
        except Exception as error:
            code = 500
            fields: dict[str, Any] = {"error": type(error).__name__, "at": _frames(error)}
            if self._service.settings.log_inputs:
                fields["message"] = str(error)
            path = scope["path"][:_LONGEST_FIELD]
            logger.error("request_failed", request_id=state["request_id"], path=path, **fields)
            if not begun:
                failed = json_response({"error": "The server failed on this request."}, 500)
                await failed(scope, receive, send_with_id)
        finally:
            self._account(scope, state, code, time.perf_counter() - started)

    def _account(self, scope: Scope, state: dict[str, Any], code: int, elapsed_s: float) -> None:
        service, model = self._service, state["model"]
        service.metrics.answered(model, code).inc()
        if not model and scope["method"] == "GET":
            return  # probes and scrapes are counted, but neither timed nor logged
        if model:
            service.metrics.request_seconds.labels(model).observe(elapsed_s)
        if code in _OVERLOAD:
            service.refusals.note(state["reason"], code)
        elif service.settings.access_log:
            # Logged in the loop's next iteration: the connection writes at the end of this one, and the answer
            # should not wait for a log line.
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
