"""The handlers of all routes: each reads a request, asks the service, and answers."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import time
from collections.abc import Awaitable, Callable
from importlib.resources import files as resource_files
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive

import sbs_edge
from sbs_edge.serve import errors, oip, plain
from sbs_edge.serve.admission_filter import PREDICT_PATH
from sbs_edge.serve.body import deadline_s, read_body
from sbs_edge.serve.inference_request import InferenceRequest
from sbs_edge.serve.models import ModelVersion
from sbs_edge.serve.openapi import openapi_document
from sbs_edge.serve.responses import error_response, json_response
from sbs_edge.serve.service import Service

__all__ = ["Handlers"]

_CLIENT_LEFT = 499  # never sent; it marks the request in logs and metrics


class Handlers:
    """The routes' handlers over one service."""

    def __init__(self, service: Service) -> None:
        """Take the service, and prepare the documents that never change."""
        self.service, self.settings, self.registry = service, service.settings, service.registry
        self._page = (resource_files("sbs_edge.serve") / "page.html").read_bytes()
        self._page_headers = {
            "Content-Security-Policy": _policy(self._page),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",  # the address may carry an example text
        }
        self._document = openapi_document(self.settings)

    def routes(self) -> list[Route]:
        """Return every route with its handler."""
        found = [
            Route("/", self.page, methods=["GET"]),
            Route("/openapi.json", self.openapi, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route(PREDICT_PATH, self.predict, methods=["POST"]),
            Route("/v2", self.server_metadata, methods=["GET"]),
            Route("/v2/health/live", self.live, methods=["GET"]),
            Route("/v2/health/ready", self.ready, methods=["GET"]),
        ]
        for prefix in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
            found += [
                Route(prefix, self.model_metadata, methods=["GET"]),
                Route(f"{prefix}/ready", self.model_ready, methods=["GET"]),
                Route(f"{prefix}/infer", self.infer, methods=["POST"]),
            ]
        return found

    async def predict(self, request: Request) -> Response:
        """POST /v1/predict: texts in, answers out, as JSON."""

        async def run(body: bytes) -> Response:
            parsed = plain.parse_predict(body)
            del body  # it may be large, and the answer may take a while
            version = self.registry.find(parsed.model, parsed.version)
            predictions = await self._answer(request, version, parsed)
            card = version.card
            return json_response({"model": card.name, "version": card.version, "predictions": predictions})

        return await self._work(request, run)

    async def infer(self, request: Request) -> Response:
        """POST .../infer of the Open Inference Protocol."""

        async def run(body: bytes) -> Response:
            params = request.path_params
            version = self.registry.find(params["model"], params.get("version"))
            parsed = oip.parse_request(body, request.headers.get("inference-header-content-length"))
            del body
            request.state.client_id = parsed.id
            answers = await self._answer(request, version, parsed.inference)
            content, headers = oip.encode_response(parsed, answers, version.card)
            return Response(content, 200, headers)

        return await self._work(request, run)

    async def _work(self, request: Request, answer: Callable[[bytes], Awaitable[Response]]) -> Response:
        """Read and answer an admitted request within its deadline; cancel it if its client leaves."""
        state = request.state
        try:
            limit_s = deadline_s(request.headers, self.settings.timeout_s)
            state.deadline = time.perf_counter() + limit_s
            try:
                async with asyncio.timeout(limit_s):
                    work = answer(await self._read_body(request))  # nothing else keeps the body
                    return await _unless_client_leaves(work, request.receive)
            except TimeoutError:
                raise errors.HttpError(
                    504, f"The answer was not ready within {limit_s:g} s.", reason="deadline"
                ) from None
        except errors.HttpError as error:
            # The traceback refers to the task that holds the error, and to the texts. Only the garbage collector
            # would free such a cycle, much later.
            error.__traceback__ = None
            if error.reason:
                self.service.refusals.count(error.reason)
                state.reason = error.reason
            return error_response(error)
        except errors.ClientLeft:
            self.service.refusals.count("client_left")
            return Response(status_code=_CLIENT_LEFT)

    async def _read_body(self, request: Request) -> bytes:
        """Read the body within its own time limit, so that slow clients cannot occupy every slot."""
        limit, hold = self.settings.max_body_bytes, request.state.slot.hold
        try:
            async with asyncio.timeout(self.settings.body_timeout_s):
                return await read_body(request.receive, request.headers, limit, hold)
        except TimeoutError:
            raise errors.slow_body(self.settings.body_timeout_s) from None

    async def _answer(
        self, request: Request, version: ModelVersion, parsed: InferenceRequest
    ) -> list[dict[str, Any]]:
        state = request.state
        state.model, state.version, state.n_texts = version.card.name, version.card.version, len(parsed.texts)
        if self.settings.log_inputs:
            state.inputs = parsed.texts
        return await self.service.answer(version, parsed, state.timing, state.slot)

    async def server_metadata(self, request: Request) -> Response:
        """GET /v2."""
        return json_response(
            {"name": "sbs-edge", "version": sbs_edge.__version__, "extensions": ["binary_tensor_data"]}
        )

    async def live(self, request: Request) -> Response:
        """GET /v2/health/live."""
        return json_response({"live": True})

    async def ready(self, request: Request) -> Response:
        """GET /v2/health/ready."""
        document: dict[str, Any] = {"ready": self.service.ready}
        if self.service.peers is not None:
            document["workers"] = self.service.peers.document
        if self.registry.problems:
            document["problems"] = self.registry.problems
        return json_response(document, 200 if self.service.ready else 503)

    async def model_metadata(self, request: Request) -> Response:
        """GET /v2/models/{model}."""
        try:
            version = self.registry.find(request.path_params["model"], request.path_params.get("version"))
        except errors.HttpError as error:
            return error_response(error)
        model = self.registry.by_name[version.card.name]
        return json_response(oip.model_metadata(version.card, list(model.versions)))

    async def model_ready(self, request: Request) -> Response:
        """GET /v2/models/{model}/ready."""
        name = request.path_params["model"]
        try:
            self.registry.find(name, request.path_params.get("version"))
        except errors.HttpError as error:
            return error_response(error)
        ready = self.service.ready
        return json_response({"name": name, "ready": ready}, 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics."""
        self.service.publish_gauges()
        metrics = self.service.metrics
        return Response(metrics.render(), media_type=metrics.content_type)

    async def page(self, request: Request) -> Response:
        """GET /: a page to try a model in a browser."""
        return Response(self._page, 200, self._page_headers, media_type="text/html")

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json."""
        return json_response(self._document)


def _policy(page: bytes) -> str:
    """Return a Content-Security-Policy that allows only the page's own script and style."""

    def own(tag: bytes) -> str:
        inside = page.split(b"<%b>" % tag, 1)[1].split(b"</%b>" % tag, 1)[0]
        return f"'sha256-{base64.b64encode(hashlib.sha256(inside).digest()).decode()}'"

    return (
        f"default-src 'none'; style-src {own(b'style')}; script-src {own(b'script')}; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


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
