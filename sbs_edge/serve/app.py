"""The routes. Everything a request can be answered with is decided in the modules beside this one.

GET  /                                   one page to try a model in a browser
GET  /openapi.json                       this interface, for machines
GET  /metrics                            Prometheus
POST /v1/predict                         the plain route
GET  /v2, /v2/health/{live,ready}        Open Inference Protocol v2
GET  /v2/models/{m}[/versions/{v}][/ready]
POST /v2/models/{m}[/versions/{v}]/infer
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.resources import files as resource_files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import sbs_edge
from sbs_edge.serve import errors, oip, plain
from sbs_edge.serve.asking import Answer, Asking, Timing
from sbs_edge.serve.body import deadline_s, read_body
from sbs_edge.serve.logs import logger
from sbs_edge.serve.models import ModelVersion
from sbs_edge.serve.openapi import openapi_document
from sbs_edge.serve.service import Service

__all__ = ["create_app"]

_OPEN_PATHS = frozenset({"/", "/openapi.json", "/v2/health/live", "/v2/health/ready"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_CLIENT_LEFT = 499  # never reaches anybody; it marks the request in logs and metrics

Handler = Callable[[Request], Awaitable[Response]]


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    body = json.dumps(content, ensure_ascii=False).encode("utf-8")
    return Response(body, status, headers, media_type="application/json")


def _error(error: errors.HttpError) -> Response:
    return _json({"error": error.message}, error.status, error.headers)


def create_app(service: Service) -> Starlette:
    """Return the ASGI application; its lifespan loads the models beside the first requests."""
    settings, registry, metrics = service.settings, service.registry, service.metrics

    async def work(
        request: Request, answer: Callable[[bytes], Awaitable[Response]], *, labels: bool = False
    ) -> Response:
        """Admit, read and answer one request within its deadline, or give it up with its client."""
        state = request.state
        try:
            service.enter(labels=labels)
        except errors.HttpError as error:
            metrics.rejected.labels(error.reason).inc()
            return _error(error)
        try:
            limit_s = deadline_s(request.headers, settings.timeout_s)
            state.deadline = time.perf_counter() + limit_s
            try:
                async with asyncio.timeout(limit_s):
                    body = await read_body(request.receive, request.headers, settings.max_body_bytes)
                    return await _unless_client_leaves(answer(body), request.receive)
            except TimeoutError:
                raise errors.HttpError(
                    504, f"The answer was not ready within {limit_s:g} s.", reason="deadline"
                ) from None
        except errors.HttpError as error:
            if error.reason:
                metrics.rejected.labels(error.reason).inc()
            return _error(error)
        except errors.ClientLeft:
            metrics.rejected.labels("client_left").inc()
            return Response(status_code=_CLIENT_LEFT)
        finally:
            service.leave()

    async def answer(request: Request, version: ModelVersion, asking: Asking) -> list[Answer]:
        state = request.state
        state.model, state.version, state.n_texts = version.card.name, version.card.version, len(asking.texts)
        if settings.log_inputs:
            state.inputs = asking.texts
        return await service.answer(version, asking, state.timing)

    async def predict(request: Request) -> Response:
        async def run(body: bytes) -> Response:
            asked, asking = plain.parse_predict(body)
            version = registry.find(asked.model, asked.version)
            answers = await answer(request, version, asking)
            return _json(plain.encode_answers(version.card.name, version.card.version, answers))

        return await work(request, run, labels=True)

    async def infer(request: Request) -> Response:
        async def run(body: bytes) -> Response:
            params = request.path_params
            version = registry.find(params["model"], params.get("version"))
            asked = oip.parse_request(body, request.headers.get("inference-header-content-length"))
            request.state.client_id = asked.id
            answers = await answer(request, version, asked.asking)
            content, headers = oip.encode_response(asked, answers, version.card)
            return Response(content, 200, headers)

        return await work(request, run)

    async def server_metadata(request: Request) -> Response:
        return _json(
            {"name": "sbs-edge", "version": sbs_edge.__version__, "extensions": ["binary_tensor_data"]}
        )

    async def live(request: Request) -> Response:
        return _json({"live": True})

    async def ready(request: Request) -> Response:
        return _json({"ready": service.ready}, 200 if service.ready else 503)

    async def model_metadata(request: Request) -> Response:
        try:
            version = registry.find(request.path_params["model"], request.path_params.get("version"))
        except errors.HttpError as error:
            return _error(error)
        model = registry.by_name[version.card.name]
        return _json(oip.model_metadata(version.card, list(model.versions)))

    async def model_ready(request: Request) -> Response:
        name = request.path_params["model"]
        try:
            registry.find(name, request.path_params.get("version"))
        except errors.HttpError as error:
            return _error(error)
        return _json({"name": name, "ready": service.ready}, 200 if service.ready else 503)

    async def show_metrics(request: Request) -> Response:
        for (name, task), size in registry.queue_sizes().items():
            metrics.queue_size.labels(name, task).set(size)
        metrics.in_flight.set(service.gate.inside)
        metrics.ready.set(service.ready)
        return Response(metrics.render(), media_type=metrics.content_type)

    page_html = (resource_files("sbs_edge.serve") / "page.html").read_bytes()

    async def page(request: Request) -> Response:
        headers = {
            "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; "
            "script-src 'unsafe-inline'; connect-src 'self'",
            "X-Content-Type-Options": "nosniff",
        }
        return Response(page_html, 200, headers, media_type="text/html")

    document = openapi_document(settings)

    async def openapi(request: Request) -> Response:
        return _json(document)

    async def http_exception(request: Request, exc: Exception) -> Response:
        status = exc.status_code if isinstance(exc, HTTPException) else 500
        text = {404: "There is no such route.", 405: "This route does not take that method."}
        headers = dict(exc.headers or {}) if isinstance(exc, HTTPException) else {}
        return _json({"error": text.get(status, "The request failed.")}, status, headers)

    routes = [
        Route("/", page, methods=["GET"]),
        Route("/openapi.json", openapi, methods=["GET"]),
        Route("/metrics", show_metrics, methods=["GET"]),
        Route("/v1/predict", predict, methods=["POST"]),
        Route("/v2", server_metadata, methods=["GET"]),
        Route("/v2/health/live", live, methods=["GET"]),
        Route("/v2/health/ready", ready, methods=["GET"]),
    ]
    for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        routes += [
            Route(prefix, model_metadata, methods=["GET"]),
            Route(f"{prefix}/ready", model_ready, methods=["GET"]),
            Route(f"{prefix}/infer", infer, methods=["POST"]),
        ]

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(service))
        app.state.loading = loading
        watching = asyncio.create_task(_watch(service)) if settings.watch_s else None
        try:
            yield
        finally:
            for task in (loading, watching):
                if task:
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task
            await service.close()

    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={HTTPException: http_exception},
        middleware=[],
    )
    app.router.redirect_slashes = False
    app.state.service = service
    app.add_middleware(_Edge, service=service)
    return app


async def _load(service: Service) -> None:
    try:
        await service.registry.refresh(first=True)
        service.started = True
        logger.info("ready", models=sorted(service.registry.by_name))
    except Exception as error:
        service.failure = error
        logger.error("startup_failed", error=str(error))


async def _watch(service: Service) -> None:
    while True:
        await asyncio.sleep(service.settings.watch_s)
        if service.started and not service.draining:
            try:
                await service.registry.refresh()
            except Exception:
                logger.exception("watch_failed")


async def _unless_client_leaves(work: Awaitable[Response], receive: Receive) -> Response:
    """Await ``work``, but cancel it when the connection closes."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise errors.ClientLeft
        return task.result()
    finally:
        watcher.cancel()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


class _Edge:
    """Outermost layer: request id, bearer token, metrics, log line and trace of every request."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        token = service.settings.token
        self._credential = f"Bearer {token.get_secret_value()}".encode() if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        state: dict[str, Any] = scope.setdefault("state", {})
        state.update(timing=Timing(), request_id=request_id, model="", version="", n_texts=0)
        code = 500
        begun = False

        async def tagged(message: Message) -> None:
            nonlocal code, begun
            if message["type"] == "http.response.start":
                begun = True
                code = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            if self._credential and scope["path"] not in _OPEN_PATHS and not self._allowed(headers):
                refusal = errors.HttpError(
                    401, "A valid bearer token is needed.", headers={"WWW-Authenticate": "Bearer"}
                )
                await _error(refusal)(scope, receive, tagged)
            else:
                await self._app(scope, receive, tagged)
        except Exception:
            code = 500
            logger.exception("request_failed", request_id=request_id, path=scope["path"])
            if not begun:
                await _json({"error": "The server failed on this request."}, 500)(scope, receive, tagged)
        finally:
            self._account(scope, headers, state, code, time.perf_counter() - started)

    def _allowed(self, headers: dict[str, str]) -> bool:
        given = headers.get("authorization", "").encode("latin-1")
        return hmac.compare_digest(given, self._credential or b"")

    def _account(
        self, scope: Scope, headers: dict[str, str], state: dict[str, Any], code: int, elapsed_s: float
    ) -> None:
        service, model = self._service, state["model"]
        service.metrics.requests.labels(model, str(code)).inc()
        if not model and scope["method"] == "GET":
            return  # probes and scrapes: counted, neither timed nor logged
        if model:
            service.metrics.request_seconds.labels(model).observe(elapsed_s)
        timing: Timing = state["timing"]
        if service.settings.access_log:
            fields: dict[str, Any] = {
                "request_id": state["request_id"],
                "path": scope["path"],
                "code": code,
                "ms": round(elapsed_s * 1e3, 2),
            }
            if model:
                fields |= {
                    "model": model,
                    "version": state["version"],
                    "n_texts": state["n_texts"],
                    "queue_ms": round(timing.queue_s * 1e3, 2),
                    "inference_ms": round(timing.inference_s * 1e3, 2),
                }
            for name in ("client_id", "inputs"):
                if state.get(name) is not None:
                    fields[name] = state[name]
            logger.info("request", **fields)
        if service.tracing:
            attributes = {"sbs_edge.model": model, "sbs_edge.n_texts": state["n_texts"]}
            service.tracing.record(headers, scope["path"], code, elapsed_s, attributes, timing)
