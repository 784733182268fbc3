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
import contextlib
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from sbs_edge.serve.admission_filter import AdmissionFilter
from sbs_edge.serve.handlers import Handlers
from sbs_edge.serve.logs import logger
from sbs_edge.serve.middleware import RequestMiddleware
from sbs_edge.serve.responses import json_response
from sbs_edge.serve.service import Service

__all__ = ["create_app"]


def create_app(service: Service) -> Starlette:
    """Return the ASGI application; its lifespan loads the models while it already answers probes."""

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        loading = asyncio.create_task(_load(service))
        app.state.loading = loading
        watching = asyncio.create_task(_watch(service)) if service.settings.watch_s else None
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
        routes=Handlers(service).routes(),
        lifespan=lifespan,
        exception_handlers={HTTPException: _http_exception},
        middleware=[],
    )
    app.router.redirect_slashes = False
    app.state.service = service
    app.state.admission_filter = AdmissionFilter(service)
    app.add_middleware(RequestMiddleware, service=service, admission_filter=app.state.admission_filter)
    return app


async def _http_exception(request: Request, exc: Exception) -> Response:
    status = exc.status_code if isinstance(exc, HTTPException) else 500
    text = {404: "There is no such route.", 405: "This route does not take that method."}
    headers = dict(exc.headers or {}) if isinstance(exc, HTTPException) else {}
    return json_response({"error": text.get(status, "The request failed.")}, status, headers)


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
