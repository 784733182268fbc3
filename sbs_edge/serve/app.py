"""The ASGI application: routes, lifespan, and the deadline of each request.

GET  /                                   a page to try a model in a browser
GET  /openapi.json                       description of the routes
GET  /metrics                            Prometheus
POST /v1/predict                         texts in, answers out, as JSON
GET  /v2, /v2/health/{live,ready}        Open Inference Protocol v2
GET  /v2/models/{m}[/versions/{v}][/ready]
POST /v2/models/{m}[/versions/{v}]/infer
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from importlib.resources import files as resource_files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive

import sbs_edge
from sbs_edge.serve import errors, oip, plain
from sbs_edge.serve.admission_filter import PREDICT_PATH, AdmissionFilter
from sbs_edge.serve.body import deadline_s, read_body
from sbs_edge.serve.inference_request import InferenceRequest
from sbs_edge.serve.logs import logger
from sbs_edge.serve.middleware import RequestMiddleware
from sbs_edge.serve.models import ModelVersion
from sbs_edge.serve.openapi import openapi_document
from sbs_edge.serve.responses import error_response, json_response
from sbs_edge.serve.service import Service

__all__ = ["create_app"]

_CLIENT_LEFT = 499  # is never sent; it marks the request in logs and metrics

Handler = Callable[[Request], Awaitable[Response]]


def create_app(service: Service) -> Starlette:
    """Return the ASGI application; its lifespan loads the models while it already answers probes."""
    settings, registry, metrics = service.settings, service.registry, service.metrics

    def refused(request: Request, error: errors.HttpError) -> Response:
        if error.reason:
            service.refusals.count(error.reason)
            request.state.reason = error.reason
        return error_response(error)

    async def read_whole_body(request: Request) -> bytes:
        """Read the body within its own time limit, so that slow clients cannot occupy every slot."""
        limit, hold = settings.max_body_bytes, request.state.slot.hold
        try:
            async with asyncio.timeout(settings.body_timeout_s):
                return await read_body(request.receive, request.headers, limit, hold)
        except TimeoutError:
            raise errors.slow_body(settings.body_timeout_s) from None

    async def work(request: Request, answer: Callable[[bytes], Awaitable[Response]]) -> Response:
        """Read and answer an admitted request within its deadline; cancel it if its client leaves."""
        state = request.state
        try:
            limit_s = deadline_s(request.headers, settings.timeout_s)
            state.deadline = time.perf_counter() + limit_s
            try:
                async with asyncio.timeout(limit_s):
                    work = answer(await read_whole_body(request))  # nothing else keeps the body
                    return await _unless_client_leaves(work, request.receive)
            except TimeoutError:
                raise errors.HttpError(
                    504, f"The answer was not ready within {limit_s:g} s.", reason="deadline"
                ) from None
        except errors.HttpError as error:
            # The traceback refers to the task that holds the error, and to the texts. Only the garbage collector
            # would free such a cycle, much later.
            error.__traceback__ = None
            return refused(request, error)
        except errors.ClientLeft:
            service.refusals.count("client_left")
            return Response(status_code=_CLIENT_LEFT)

    async def answer(
        request: Request, version: ModelVersion, parsed: InferenceRequest
    ) -> list[dict[str, Any]]:
        state = request.state
        state.model, state.version, state.n_texts = version.card.name, version.card.version, len(parsed.texts)
        if settings.log_inputs:
            state.inputs = parsed.texts
        return await service.answer(version, parsed, state.timing, state.slot)

    async def predict(request: Request) -> Response:
        async def run(body: bytes) -> Response:
            parsed = plain.parse_predict(body)
            del body  # it may be large, and the answer may take a while
            version = registry.find(parsed.model, parsed.version)
            predictions = await answer(request, version, parsed)
            card = version.card
            return json_response({"model": card.name, "version": card.version, "predictions": predictions})

        return await work(request, run)

    async def infer(request: Request) -> Response:
        async def run(body: bytes) -> Response:
            params = request.path_params
            version = registry.find(params["model"], params.get("version"))
            parsed = oip.parse_request(body, request.headers.get("inference-header-content-length"))
            del body
            request.state.client_id = parsed.id
            answers = await answer(request, version, parsed.inference)
            content, headers = oip.encode_response(parsed, answers, version.card)
            return Response(content, 200, headers)

        return await work(request, run)

    async def server_metadata(request: Request) -> Response:
        return json_response(
            {"name": "sbs-edge", "version": sbs_edge.__version__, "extensions": ["binary_tensor_data"]}
        )

    async def live(request: Request) -> Response:
        return json_response({"live": True})

    async def ready(request: Request) -> Response:
        document: dict[str, Any] = {"ready": service.ready}
        if service.peers is not None:
            document["workers"] = service.peers.document
        if service.registry.problems:
            document["problems"] = service.registry.problems
        return json_response(document, 200 if service.ready else 503)

    async def model_metadata(request: Request) -> Response:
        try:
            version = registry.find(request.path_params["model"], request.path_params.get("version"))
        except errors.HttpError as error:
            return error_response(error)
        model = registry.by_name[version.card.name]
        return json_response(oip.model_metadata(version.card, list(model.versions)))

    async def model_ready(request: Request) -> Response:
        name = request.path_params["model"]
        try:
            registry.find(name, request.path_params.get("version"))
        except errors.HttpError as error:
            return error_response(error)
        return json_response({"name": name, "ready": service.ready}, 200 if service.ready else 503)

    async def show_metrics(request: Request) -> Response:
        service.publish_gauges()
        return Response(metrics.render(), media_type=metrics.content_type)

    page_html = (resource_files("sbs_edge.serve") / "page.html").read_bytes()
    page_headers = {
        "Content-Security-Policy": _policy(page_html),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",  # the address may carry an example text
    }

    async def page(request: Request) -> Response:
        return Response(page_html, 200, page_headers, media_type="text/html")

    document = openapi_document(settings)

    async def openapi(request: Request) -> Response:
        return json_response(document)

    async def http_exception(request: Request, exc: Exception) -> Response:
        status = exc.status_code if isinstance(exc, HTTPException) else 500
        text = {404: "There is no such route.", 405: "This route does not take that method."}
        headers = dict(exc.headers or {}) if isinstance(exc, HTTPException) else {}
        return json_response({"error": text.get(status, "The request failed.")}, status, headers)

    routes = [
        Route("/", page, methods=["GET"]),
        Route("/openapi.json", openapi, methods=["GET"]),
        Route("/metrics", show_metrics, methods=["GET"]),
        Route(PREDICT_PATH, predict, methods=["POST"]),
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
    app.state.admission_filter = AdmissionFilter(service)
    app.add_middleware(RequestMiddleware, service=service, admission_filter=app.state.admission_filter)
    return app


def _policy(page: bytes) -> str:
    """Return a Content-Security-Policy that allows only the page's own script and style."""

    def own(tag: bytes) -> str:
        inside = page.split(b"<%b>" % tag, 1)[1].split(b"</%b>" % tag, 1)[0]
        return f"'sha256-{base64.b64encode(hashlib.sha256(inside).digest()).decode()}'"

    return (
        f"default-src 'none'; style-src {own(b'style')}; script-src {own(b'script')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


async def _load(service: Service) -> None:
    try:
        await service.registry.refresh(first=True)
        service.started = True
        logger.info(
            "ready" if service.peers is None else "worker_ready", models=sorted(service.registry.by_name)
        )
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
    """Await ``work``; cancel it when the connection closes."""

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
