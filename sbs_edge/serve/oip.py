"""The Open Inference Protocol v2: JSON tensors and the binary tensor extension.

A model takes ``text`` (BYTES, shape ``[n]`` or ``[n, 1]``) and, for tasks with choices, ``labels``
(BYTES, shape ``[n, k]``; pad shorter lists with empty strings). It returns for each text ``label``,
``probability``, ``abstained``, ``escalated``, ``truncated``, for closed label sets
``probabilities`` (in the order of the model metadata's ``labels``), and on request ``rationale``
and ``rationale_complete``: name them in ``outputs`` or send ``"parameters": {"explain": true}``.
A rationale costs many times a label, so a request without ``outputs`` does not get one.

With the binary extension a body is JSON followed by the tensors' bytes in the order of the JSON;
the header ``Inference-Header-Content-Length`` says where the JSON ends.
Source: Open Inference Protocol, required API and the extension "binary tensor data".
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, field
from typing import Any

from sbs_edge.serve import errors
from sbs_edge.serve.body import parse_json
from sbs_edge.serve.engine import ModelCard
from sbs_edge.serve.inference_request import InferenceRequest, check_labels

__all__ = ["InferRequest", "encode_response", "model_metadata", "parse_request"]

_MAX_DIMENSIONS = 8

# Output name -> datatype, in the order they are answered.
OUTPUTS: dict[str, str] = {
    "label": "BYTES",
    "probability": "FP32",
    "abstained": "BOOL",
    "escalated": "BOOL",
    "truncated": "BOOL",
    "probabilities": "FP32",
    "rationale": "BYTES",
    "rationale_complete": "BOOL",
}
_ON_REQUEST = ("rationale", "rationale_complete")
_REQUEST_PARAMETERS = ("explain", "truncate", "max_new_tokens", "binary_data_output")


@dataclass(slots=True)
class InferRequest:
    """A parsed request, and the form in which to write its answer."""

    inference: InferenceRequest
    text_shape: list[int]
    id: str | None = None
    outputs: list[tuple[str, bool]] = field(default_factory=list)  # (name, as binary)


def model_metadata(card: ModelCard, versions: list[str]) -> dict[str, Any]:
    """Return the model metadata document of ``GET /v2/models/{m}``."""
    inputs = [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
    if card.label_kind == "choices":
        inputs.append({"name": "labels", "datatype": "BYTES", "shape": [-1, -1]})
    outputs: list[dict[str, Any]] = []
    for name, datatype in OUTPUTS.items():
        if name in _ON_REQUEST and not card.explains:
            continue
        if name != "probabilities":
            outputs.append({"name": name, "datatype": datatype, "shape": [-1]})
        elif card.label_kind == "closed":
            outputs.append({"name": name, "datatype": datatype, "shape": [-1, len(card.labels)]})
    return {
        "name": card.name,
        "versions": versions,
        "platform": "onnx_onnxv1",
        "inputs": inputs,
        "outputs": outputs,
        "parameters": {
            "label_kind": card.label_kind,
            "labels": list(card.labels),
            "target": card.target,
            "max_source_tokens": card.max_source_tokens,
        },
    }


def _elements(raw: bytes, name: str) -> list[str]:
    """Decode BYTES tensor data: each element a 4-byte little-endian length and that many bytes."""
    texts = []
    position = 0
    while position < len(raw):
        if position + 4 > len(raw):
            raise errors.bad_request(f"The binary data of input {name!r} is cut short.")
        (size,) = struct.unpack_from("<I", raw, position)
        position += 4
        if position + size > len(raw):
            raise errors.bad_request(f"The binary data of input {name!r} is cut short.")
        try:
            texts.append(raw[position : position + size].decode("utf-8"))
        except UnicodeDecodeError as error:
            raise errors.bad_request(f"An element of input {name!r} is not UTF-8 text.") from error
        position += size
    return texts


def _flatten(data: Any, name: str) -> list[str]:
    """Return the strings of row-major, possibly nested, JSON data."""
    if not isinstance(data, list):
        raise errors.bad_request(f"data of input {name!r} must be a list.")
    flat: list[str] = []
    for item in data:
        if isinstance(item, str):
            flat.append(item)
        elif isinstance(item, list) and all(isinstance(each, str) for each in item):
            flat.extend(item)
        else:
            raise errors.bad_request(f"data of input {name!r} must hold strings (datatype BYTES).")
    return flat


def _parameters(holder: dict[str, Any], where: str, *known: str) -> dict[str, Any]:
    """Return the parameters of ``holder``; 400 for a parameter that would be ignored."""
    parameters = holder.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise errors.bad_request(f"parameters of {where} must be an object.")
    for key in parameters:
        if key.startswith("shared_memory"):
            raise errors.bad_request("Shared memory is not supported; send the data in the request.")
        if key.startswith("sequence"):
            raise errors.bad_request("Sequences are not supported; requests are independent of each other.")
        if key == "classification" and parameters[key]:
            raise errors.bad_request("The classification extension is not supported; read probabilities.")
        if key not in (*known, "classification"):
            raise errors.bad_request(
                f"{where} has the unknown parameter {key!r}; there are: {', '.join(known)}."
            )
    return parameters


def _flag(parameters: dict[str, Any], name: str) -> bool | None:
    value = parameters.get(name)
    if value is not None and not isinstance(value, bool):
        raise errors.bad_request(f"The parameter {name!r} must be true or false.")
    return value


def _count(parameters: dict[str, Any], name: str) -> int | None:
    value = parameters.get(name)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise errors.bad_request(f"The parameter {name!r} must be a whole number of at least 1.")
    return value


def _tensor(entry: Any, tail: bytes, position: int) -> tuple[str, list[int], list[str], int]:
    """Return one input's (name, shape, strings, new position in the binary tail)."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise errors.bad_request("Each of inputs must be an object with a name.")
    name = entry["name"]
    if entry.get("datatype") != "BYTES":
        raise errors.bad_request(f"Input {name!r} must have the datatype BYTES.")
    shape = entry.get("shape")
    if (
        not isinstance(shape, list)
        or not 1 <= len(shape) <= _MAX_DIMENSIONS
        or not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**31 for n in shape)
    ):
        raise errors.bad_request(f"shape of input {name!r} must be a list of sizes.")
    size = _parameters(entry, f"Input {name!r}", "binary_data_size").get("binary_data_size")
    if size is not None:
        if "data" in entry:
            raise errors.bad_request(f"Input {name!r} has both data and binary_data_size.")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= len(tail) - position:
            raise errors.bad_request(f"binary_data_size of input {name!r} does not fit the body.")
        texts = _elements(tail[position : position + size], name)
        position += size
    elif "data" in entry:
        texts = _flatten(entry["data"], name)
    else:
        raise errors.bad_request(f"Input {name!r} has neither data nor binary_data_size.")
    if len(texts) != math.prod(shape):
        raise errors.bad_request(f"Input {name!r} has {len(texts)} elements; its shape says {shape}.")
    return name, shape, texts, position


def _choices(shape: list[int], flat: list[str], n_texts: int) -> list[list[str]]:
    """Return one list of answers per text; a single row serves every text."""
    width = shape[-1]
    rows = [flat[i : i + width] for i in range(0, len(flat), width)] if width else []
    labels = [[choice for choice in row if choice] for row in rows]
    if len(shape) == 1 or (len(rows) == 1 and n_texts > 1):  # one list for all texts is checked once
        check_labels(labels, 1)
        return labels * n_texts
    check_labels(labels, n_texts)
    return labels


def _outputs(document: dict[str, Any], binary_default: bool) -> list[tuple[str, bool]]:
    requested = document.get("outputs")
    if requested is None:
        return []
    if not isinstance(requested, list):
        raise errors.bad_request("outputs must be a list.")
    chosen: list[tuple[str, bool]] = []
    for entry in requested:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name not in OUTPUTS:
            raise errors.bad_request(f"Each of outputs must name one of: {', '.join(OUTPUTS)}.")
        if any(name == known for known, _ in chosen):
            raise errors.bad_request(f"Output {name!r} is requested twice.")
        parameters = _parameters(entry, f"Output {name!r}", "binary_data")
        binary = _flag(parameters, "binary_data")
        chosen.append((name, binary_default if binary is None else binary))
    return chosen


def parse_request(body: bytes, header_length: str | None) -> InferRequest:
    """Parse an infer request in JSON or with the binary extension; an invalid one is a 400."""
    tail = b""
    if header_length is not None:
        if not (header_length.isascii() and header_length.isdigit() and len(header_length) <= 12):
            raise errors.bad_request("Inference-Header-Content-Length must be a number of bytes.")
        if int(header_length) > len(body):
            raise errors.bad_request("Inference-Header-Content-Length is larger than the body.")
        body, tail = body[: int(header_length)], body[int(header_length) :]
    document = parse_json(body)
    if not isinstance(document, dict):
        raise errors.bad_request("The request must be a JSON object.")
    identifier = document.get("id")
    if identifier is not None and not isinstance(identifier, str):
        raise errors.bad_request("id must be a string.")
    parameters = _parameters(document, "The request", *_REQUEST_PARAMETERS)
    binary_default = bool(_flag(parameters, "binary_data_output"))
    outputs = _outputs(document, binary_default)
    inputs = document.get("inputs")
    if not isinstance(inputs, list):
        raise errors.bad_request("inputs must be a list of tensors.")
    tensors: dict[str, tuple[list[int], list[str]]] = {}
    position = 0
    for entry in inputs:
        name, shape, texts, position = _tensor(entry, tail, position)
        if name not in ("text", "labels") or name in tensors:
            raise errors.bad_request(
                f"Unexpected input {name!r}: the inputs are 'text' and, for tasks with choices, 'labels'."
            )
        tensors[name] = (shape, texts)
    if position != len(tail):
        raise errors.bad_request("The body holds more binary data than its inputs say.")
    if "text" not in tensors:
        raise errors.bad_request("The input 'text' is missing.")
    shape, texts = tensors["text"]
    if len(shape) > 2 or (len(shape) == 2 and shape[1] != 1):
        raise errors.bad_request("Input 'text' must have the shape [n] or [n, 1].")
    labels = None
    if "labels" in tensors:
        labels = _choices(*tensors["labels"], n_texts=len(texts))
    names = [name for name, _ in outputs]
    explain = bool(_flag(parameters, "explain")) or any(name in _ON_REQUEST for name in names)
    if not outputs:
        outputs = [(name, binary_default) for name in OUTPUTS if explain or name not in _ON_REQUEST]
    inference = InferenceRequest(
        texts=texts,
        labels=labels,
        explain=explain,
        want_label=any(name not in _ON_REQUEST for name, _ in outputs),
        truncate=_flag(parameters, "truncate"),
        max_new_tokens=_count(parameters, "max_new_tokens"),
    )
    return InferRequest(inference=inference, text_shape=shape, id=identifier, outputs=outputs)


def _values(name: str, answers: list[dict[str, Any]], card: ModelCard) -> list[Any]:
    if name == "probabilities":
        return [float(a["probabilities"].get(label, 0.0)) for a in answers for label in card.labels]
    if name == "probability":  # a tensor has no null: 0 if the label is the larger model's
        return [answer["probability"] or 0.0 for answer in answers]
    return [answer[name] for answer in answers]


def _binary(values: list[Any], datatype: str) -> bytes:
    if datatype == "FP32":
        return struct.pack(f"<{len(values)}f", *values)
    if datatype == "BOOL":
        return bytes(values)
    parts = []
    for text in values:
        raw = text.encode("utf-8")
        parts += [struct.pack("<I", len(raw)), raw]
    return b"".join(parts)


def encode_response(
    request: InferRequest, answers: list[dict[str, Any]], card: ModelCard
) -> tuple[bytes, dict[str, str]]:
    """Return the body and headers of a 200 answer, binary where it was asked for."""
    tensors, tail = [], []
    for name, binary in request.outputs:
        if name == "probabilities" and card.label_kind != "closed":
            continue
        datatype = OUTPUTS[name]
        shape = [len(answers), len(card.labels)] if name == "probabilities" else request.text_shape
        tensor: dict[str, Any] = {"name": name, "datatype": datatype, "shape": shape}
        values = _values(name, answers, card)
        if binary:
            tail.append(_binary(values, datatype))
            tensor["parameters"] = {"binary_data_size": len(tail[-1])}
        else:
            tensor["data"] = values
        tensors.append(tensor)
    document: dict[str, Any] = {"model_name": card.name, "model_version": card.version}
    if request.id is not None:
        document["id"] = request.id
    document["outputs"] = tensors
    head = json.dumps(document, ensure_ascii=False, allow_nan=False).encode("utf-8")
    if not tail:
        return head, {"Content-Type": "application/json"}
    return b"".join([head, *tail]), {
        "Content-Type": "application/octet-stream",
        "Inference-Header-Content-Length": str(len(head)),
    }
