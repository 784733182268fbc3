"""The OpenAPI 3.1 document: the Open Inference Protocol by hand, ``/v1/predict`` from its pydantic models."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

import sbs_edge
from sbs_edge.serve.oip import OUTPUTS
from sbs_edge.serve.plain import ErrorBody, PredictRequest, PredictResponse
from sbs_edge.serve.settings import ServeSettings

__all__ = ["openapi_document"]

_TENSOR_PARAMETERS = {
    "type": "object",
    "properties": {"binary_data_size": {"type": "integer", "minimum": 0}},
}
_TENSOR_IN = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"type": "string", "enum": ["text", "labels"]},
        "shape": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        "datatype": {"type": "string", "const": "BYTES"},
        "parameters": _TENSOR_PARAMETERS,
        "data": {"type": "array", "items": {}},
    },
}
_TENSOR_OUT = {
    "type": "object",
    "required": ["name", "shape", "datatype"],
    "properties": {
        "name": {"type": "string", "enum": list(OUTPUTS)},
        "shape": {"type": "array", "items": {"type": "integer"}},
        "datatype": {"type": "string", "enum": ["BYTES", "FP32", "BOOL"]},
        "parameters": _TENSOR_PARAMETERS,
        "data": {"type": "array", "items": {}},
    },
}
_INFER_REQUEST = {
    "type": "object",
    "required": ["inputs"],
    "properties": {
        "id": {"type": "string"},
        "parameters": {
            "type": "object",
            "properties": {
                "explain": {"type": "boolean"},
                "truncate": {"type": "boolean"},
                "max_new_tokens": {"type": "integer", "minimum": 1},
                "binary_data_output": {"type": "boolean"},
            },
        },
        "inputs": {"type": "array", "items": _TENSOR_IN, "minItems": 1},
        "outputs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name"],
                "properties": {
                    "name": {"type": "string", "enum": list(OUTPUTS)},
                    "parameters": {
                        "type": "object",
                        "properties": {"binary_data": {"type": "boolean"}},
                    },
                },
            },
        },
    },
}
_INFER_RESPONSE = {
    "type": "object",
    "required": ["model_name", "outputs"],
    "properties": {
        "model_name": {"type": "string"},
        "model_version": {"type": "string"},
        "id": {"type": "string"},
        "outputs": {"type": "array", "items": _TENSOR_OUT},
    },
}
_METADATA = {
    "type": "object",
    "required": ["name", "versions", "platform", "inputs", "outputs"],
    "properties": {
        "name": {"type": "string"},
        "versions": {"type": "array", "items": {"type": "string"}},
        "platform": {"type": "string"},
        "inputs": {"type": "array", "items": {"type": "object"}},
        "outputs": {"type": "array", "items": {"type": "object"}},
        "parameters": {"type": "object"},
    },
}

_REFUSALS = {
    "400": "The request is malformed or over a limit; the message says which.",
    "404": "No such model or version.",
    "408": "The body took longer than body_timeout_s to arrive.",
    "413": "The body is over max_body_bytes after decompression.",
    "415": "Unknown Content-Encoding.",
    "429": "A limit is reached; Retry-After says when to try again.",
    "503": "Loading or draining.",
    "504": "Not answered within the deadline.",
}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _answer(description: str, schema: dict[str, Any], media: str = "application/json") -> dict[str, Any]:
    return {"description": description, "content": {media: {"schema": schema}}}


def _refusals(*codes: str) -> dict[str, Any]:
    return {code: _answer(_REFUSALS[code], _ref("ErrorBody")) for code in codes}


def _path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}


def _get(operation: str, summary: str, responses: dict[str, Any]) -> dict[str, Any]:
    return {"get": {"operationId": operation, "summary": summary, "responses": responses}}


_FLAG = {"type": "object", "additionalProperties": True}
_HEALTH = {"200": _answer("Yes.", _FLAG)}
_NOT_READY = {"503": _answer(_REFUSALS["503"], _FLAG)}
_TIMEOUT = {
    "name": "X-Request-Timeout-Ms",
    "in": "header",
    "description": "Give up (504) after this many milliseconds.",
    "schema": {"type": "integer", "minimum": 10},
}


def _post(operation: str, summary: str, body: str, answer: dict[str, Any]) -> dict[str, Any]:
    return {
        "post": {
            "operationId": operation,
            "summary": summary,
            "parameters": [_TIMEOUT],
            "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(body)}}},
            "responses": {"200": answer, **_refusals(*_REFUSALS)},
        }
    }


def openapi_document(settings: ServeSettings) -> dict[str, Any]:
    """Return the document for a server with these settings (the token decides about security)."""
    _, generated = models_json_schema(
        [(PredictRequest, "validation"), (PredictResponse, "serialization"), (ErrorBody, "serialization")],
        ref_template="#/components/schemas/{model}",
    )
    schemas = dict(generated["$defs"])
    schemas["PredictRequest"]["properties"]["texts"]["maxItems"] = settings.max_texts
    schemas |= {"InferRequest": _INFER_REQUEST, "InferResponse": _INFER_RESPONSE, "ModelMetadata": _METADATA}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "sbs-edge",
            "version": sbs_edge.__version__,
            "description": "A distilled student: labels in milliseconds, rationales on request.",
        },
        # Relative to the address of this document, so that it also holds behind a proxy with a path prefix.
        "servers": [{"url": "."}],
        "paths": {**_server_paths(), **_model_paths()},
        "components": {"schemas": schemas},
    }
    if settings.token is not None:
        _require_token(document)
    return document


def _server_paths() -> dict[str, Any]:
    answers = _answer("The answers.", _ref("PredictResponse"))
    return {
        "/v1/predict": _post(
            "predict", "Answer texts, with rationales on request.", "PredictRequest", answers
        ),
        "/v2": _get(
            "serverMetadata", "Server metadata.", {"200": _answer("Name, version, extensions.", _FLAG)}
        ),
        "/v2/health/live": _get("serverLive", "Is the process alive?", _HEALTH),
        "/v2/health/ready": _get(
            "serverReady", "Would a request be answered now?", {**_HEALTH, **_NOT_READY}
        ),
        "/metrics": _get(
            "metrics", "Prometheus metrics.", {"200": _answer("Text.", {"type": "string"}, "text/plain")}
        ),
    }


def _model_paths() -> dict[str, Any]:
    """Return the routes of a model and of one of its versions."""
    summary = "Infer (Open Inference Protocol v2, with the binary tensor extension)."
    outputs = {
        "description": "The outputs; octet-stream when binary outputs were asked for.",
        "content": {
            "application/json": {"schema": _ref("InferResponse")},
            "application/octet-stream": {},
        },
    }
    metadata = {"200": _answer("Inputs and outputs.", _ref("ModelMetadata")), **_refusals("404", "503")}
    ready = {**_HEALTH, **_NOT_READY, **_refusals("404")}
    paths = {}
    for prefix, names, kind in (
        ("/v2/models/{model}", ["model"], "model"),
        ("/v2/models/{model}/versions/{version}", ["model", "version"], "modelVersion"),
    ):
        shared = {"parameters": [_path(name) for name in names]}
        paths[prefix] = {**shared, **_get(f"{kind}Metadata", "Model metadata.", metadata)}
        paths[f"{prefix}/ready"] = {**shared, **_get(f"{kind}Ready", "Is this model ready?", ready)}
        paths[f"{prefix}/infer"] = {**shared, **_post(f"{kind}Infer", summary, "InferRequest", outputs)}
    return paths


def _require_token(document: dict[str, Any]) -> None:
    """Say that every route but the health probes needs the bearer token."""
    document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    document["security"] = [{"token": []}]
    for path, item in document["paths"].items():
        for operation in (item[method] for method in ("get", "post") if method in item):
            if path.startswith("/v2/health"):
                operation["security"] = []
            else:
                refused = {"401": _answer("No valid token.", _ref("ErrorBody"))}
                operation["responses"] = {**operation["responses"], **refused}
