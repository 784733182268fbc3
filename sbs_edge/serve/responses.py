"""JSON responses and error responses, for every layer of the server."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from sbs_edge.serve.errors import HttpError

__all__ = ["error_response", "json_response"]


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return ``content`` as UTF-8 JSON."""
    body = json.dumps(content, ensure_ascii=False, allow_nan=False).encode("utf-8")
    return Response(body, status, headers, media_type="application/json")


def error_response(error: HttpError) -> Response:
    """Return ``{"error": message}`` with the error's status and headers."""
    return json_response({"error": error.message}, error.status, error.headers)
