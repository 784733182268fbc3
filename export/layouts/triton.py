"""A bundle as a model repository of NVIDIA Triton Inference Server.

    repository/
      <name>-<target>-<graph>/        one model for each graph of each target
        config.pbtxt                  inputs, outputs, dynamic batching, queue policy
        labels.txt                    closed label sets: makes Triton's classification extension work
        1/model.onnx, 1/weights.bin   the graph; later versions go to 2/, 3/, ...
      tokenizer/tokenizer.json        for the client or a Python model in front
      README.md

Triton runs graphs, not text: the client tokenises (the README of the repository says how). Batching
across requests needs every tensor to have a batch dimension, so the scalar ``max_new_tokens`` of the
explainer becomes a constant here. Triton batches requests of equal shape: clients pad to a multiple
of 16 tokens so that batches form.

Rationales of targets for GPUs are left out: their encoder and step graphs need a loop on the host with a
cache between the steps, which does not fit a request and a response. The repository's README says so.

Source of the fields: Triton's ``model_config.proto``. The module knows nothing of training or HTTP.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sbs_edge import files
from sbs_edge.errors import UsageError
from sbs_edge.runtime.bundle import Bundle

__all__ = ["write_triton_repository"]

_ROLES = ("label_scorer", "choice_scorer", "explainer")
_FOLDED = "max_new_tokens"


def write_triton_repository(
    bundle: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    targets: Sequence[str] | None = None,
    model_version: int = 1,
    max_batch_size: int = 64,
    max_queue_delay_us: int = 2000,
    max_queue_size: int = 1024,
    timeout_ms: int = 30_000,
    instances: int = 1,
) -> Path:
    """Write the repository for ``bundle`` to ``out``, replacing an older one only when complete.

    Args:
        bundle: the bundle's directory; its digests are checked first.
        out: the repository's directory.
        targets: the targets; None: all of the bundle.
        model_version: the numeric version directory.
        max_batch_size: largest number of requests that Triton puts into one call.
        max_queue_delay_us: longest time that a request waits for others.
        max_queue_size: largest queue; more requests are refused, as by our own server.
        timeout_ms: longest wait in the queue; then a request is refused.
        instances: copies of each graph that run in parallel.

    Raises:
        UsageError: a target is not in the bundle or has no graph to serve, or a number is out of range.
        IntegrityError: the bundle is damaged.
    """
    for name, value in (
        ("model_version", model_version),
        ("max_batch_size", max_batch_size),
        ("instances", instances),
        ("max_queue_size", max_queue_size),
    ):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}.")
    opened = Bundle.open(bundle)
    manifest = opened.manifest
    wanted = list(targets) if targets is not None else list(manifest["targets"])
    stepwise = _check_targets(manifest, wanted)
    batching = {
        "max_queue_delay_microseconds": max_queue_delay_us,
        "default_queue_policy": {
            "timeout_action": _Word("REJECT"),
            "default_timeout_microseconds": timeout_ms * 1000,
            "allow_timeout_override": True,
            "max_queue_size": max_queue_size,
        },
    }
    names: list[tuple[str, str, str]] = []
    with files.atomic_directory(out) as work:
        for target in wanted:
            entry = manifest["targets"][target]
            for role in filter(entry.__contains__, _ROLES):
                name = re.sub(r"[^A-Za-z0-9_-]", "-", f"{manifest['name']}-{target}-{role}")
                (work / name).mkdir()
                config = {
                    "name": name,
                    "platform": "onnxruntime_onnx",
                    "max_batch_size": max_batch_size,
                    **_write_model(opened, entry, role, work / name, model_version),
                    "version_policy": {"latest": {"num_versions": 2}},
                    "instance_group": [{"count": instances, "kind": _kind(entry["providers"])}],
                    "dynamic_batching": batching,
                    **_accelerator(entry["providers"]),
                }
                files.write_text(work / name / "config.pbtxt", _text(config))
                names.append((name, target, role))
        (work / "tokenizer").mkdir()
        shutil.copyfile(opened.member("tokenizer.json"), work / "tokenizer" / "tokenizer.json")
        files.write_text(work / "README.md", _readme(manifest, names, stepwise))
    return Path(out)


def _check_targets(manifest: Mapping[str, Any], wanted: Sequence[str]) -> list[str]:
    """Return the targets that generate in steps; raise UsageError for one that Triton cannot serve."""
    unknown = [target for target in wanted if target not in manifest["targets"]]
    if unknown:
        raise UsageError(
            f"The bundle has no target {unknown[0]!r}; it has: {', '.join(manifest['targets'])}."
        )
    stepwise = [target for target in wanted if "decoder_step" in manifest["targets"][target]]
    alone = [target for target in stepwise if not any(role in manifest["targets"][target] for role in _ROLES)]
    if alone:
        raise UsageError(
            f"The target {alone[0]!r} of this bundle only generates, in steps that the host repeats, and Triton "
            "serves single graphs. Use sbs-edge serve, or a cpu target, whose graph contains the loop."
        )
    return stepwise


def _write_model(
    bundle: Bundle, entry: Mapping[str, Any], role: str, folder: Path, version: int
) -> dict[str, Any]:
    """Write a graph, and its labels if it scores them; return ``input`` and ``output`` of its configuration."""
    manifest = bundle.manifest
    limit = manifest["limits"]["max_new_tokens"]
    inputs, outputs = _write_graph(bundle.member(entry[role]), folder / str(version), limit)
    named = {}
    if role == "label_scorer":
        files.write_text(folder / "labels.txt", "".join(f"{x}\n" for x in manifest["labels"]["labels"]))
        named = {"scores": {"label_filename": "labels.txt"}}
    return {
        "input": [{"name": n, "data_type": _Word(t), "dims": d} for n, t, d in inputs],
        "output": [{"name": n, "data_type": _Word(t), "dims": d, **named.get(n, {})} for n, t, d in outputs],
    }


class _Word(str):
    """An enum value, which is a bare word in the text format."""

    __slots__ = ()


def _kind(providers: Sequence[str]) -> _Word:
    return _Word("KIND_CPU" if providers[0] == "CPUExecutionProvider" else "KIND_GPU")


def _accelerator(providers: Sequence[str]) -> dict[str, Any]:
    """Return the setting that makes Triton's onnxruntime backend use TensorRT, for TensorRT targets."""
    if not providers[0].lower().startswith(("tensorrt", "nvtensorrt")):
        return {}
    return {"optimization": {"execution_accelerators": {"gpu_execution_accelerator": [{"name": "tensorrt"}]}}}


def _write_graph(
    graph: Path, folder: Path, max_new_tokens: int
) -> tuple[list[tuple[str, str, list[int]]], list[tuple[str, str, list[int]]]]:
    """Copy a graph and its weights; return its (name, type, dims without batch) in and out."""
    import onnx

    from sbs_edge.export.graphs.builder import all_graphs

    folder.mkdir(parents=True)
    model = onnx.load(str(graph), load_external_data=False)
    outside = {
        entry.value
        for inside in all_graphs(model.graph)
        for tensor in inside.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    for location in sorted(outside):
        shutil.copyfile(graph.parent / location, folder / location)
    for value in [value for value in model.graph.input if value.name == _FOLDED]:
        model.graph.input.remove(value)
        model.graph.initializer.append(
            onnx.helper.make_tensor(_FOLDED, onnx.TensorProto.INT64, [], [max_new_tokens])
        )
    files.write_bytes(folder / "model.onnx", model.SerializeToString())
    constants = {tensor.name for tensor in model.graph.initializer}
    inputs = [_tensor(value, graph) for value in model.graph.input if value.name not in constants]
    return inputs, [_tensor(value, graph) for value in model.graph.output]


def _tensor(value: Any, graph: Path) -> tuple[str, str, list[int]]:
    """Return a tensor in Triton's description: the batch dimension is implied, and -1 is any size."""
    import onnx

    numbers = {onnx.TensorProto.INT64: "TYPE_INT64", onnx.TensorProto.FLOAT: "TYPE_FP32"}
    kind = value.type.tensor_type
    if kind.elem_type not in numbers or not kind.shape.dim:
        raise UsageError(f"{graph} has the tensor {value.name!r}, which Triton cannot batch.")
    dims = [int(d.dim_value) if d.HasField("dim_value") else -1 for d in kind.shape.dim[1:]]
    # For Triton, a tensor with only a batch dimension is [batch, 1], reshaped to [batch].
    return value.name, numbers[kind.elem_type], dims


def _text(message: Mapping[str, Any], indent: str = "") -> str:
    """Return ``message`` in protobuf's text format."""
    lines = []
    for key, value in message.items():
        if key == "dims" and not value:
            lines.append(f"{indent}dims: [ 1 ]\n{indent}reshape {{ shape: [ ] }}\n")
        elif isinstance(value, Mapping):
            lines.append(f"{indent}{key} {{\n{_text(value, indent + '  ')}{indent}}}\n")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            for item in value:
                lines.append(f"{indent}{key} {{\n{_text(item, indent + '  ')}{indent}}}\n")
        elif isinstance(value, list):
            lines.append(f"{indent}{key}: [ {', '.join(str(item) for item in value)} ]\n")
        elif isinstance(value, _Word):
            lines.append(f"{indent}{key}: {value}\n")
        elif isinstance(value, bool):
            lines.append(f"{indent}{key}: {str(value).lower()}\n")
        elif isinstance(value, str):
            lines.append(f"{indent}{key}: {json.dumps(value)}\n")
        else:
            lines.append(f"{indent}{key}: {value}\n")
    return "".join(lines)


def _readme(
    manifest: Mapping[str, Any], names: Sequence[tuple[str, str, str]], stepwise: Sequence[str]
) -> str:
    limits, prefixes, model = manifest["limits"], manifest["prefixes"], manifest["model"]
    table = "".join(f"| `{name}` | {target} | {role} |\n" for name, target, role in names)
    temperature = (manifest.get("calibration") or {}).get("temperature", 1.0)
    roles = {role for _, _, role in names}
    encode = "".join(
        f"    ids = texts.encode(text, {json.dumps(prefixes[task])})  # for {task}s\n"
        for task, wanted in (("label", roles), ("rationale", roles & {"explainer"}))
        if wanted
    )
    notes = ""
    if "label_scorer" in roles:
        notes += f"""* `scores` are the scores of the labels in `labels.txt`; the calibrated probabilities are
  `softmax(scores / {temperature})`.
"""
    if "choice_scorer" in roles:
        notes += f"""* The choice classifier takes the request's labels as a prefix trie, made by `sbs_edge.runtime.trie`;
  `softmax(scores / {temperature})` are the probabilities.
"""
    if "explainer" in roles:
        notes += f"""* `tokens` hold at most {limits["max_new_tokens"]} tokens and end with {model["eos_token_id"]};
  decode with `texts.decode(tokens)`.
"""
    if stepwise:
        notes += f"""* {", ".join(stepwise)}: no rationales here. On GPUs a loop on the host decodes them,
  which `sbs-edge serve` and `sbs_edge.Student` have and Triton has not.
"""
    return f"""# {manifest["name"]} {manifest["version"]} for Triton Inference Server

    tritonserver --model-repository=THIS_DIRECTORY

| model | target | graph |
|---|---|---|
{table}
Triton runs graphs; text is turned into tokens by the client, with `tokenizer/tokenizer.json`:

    from pathlib import Path
    from sbs_edge.tokens import TextTokenizer, read_tokenizer
    texts = TextTokenizer(read_tokenizer(Path("tokenizer/tokenizer.json")))
{encode}
* `sbs_edge.tokens` needs the tokenizers library alone. That library by itself takes `</s>` or `<pad>` in a user's text for
  control tokens; a client without `sbs_edge` must refuse texts whose ids hold them behind the prefix.
* At most {limits["max_source_tokens"]} tokens; end-of-sequence ({model["eos_token_id"]}) is appended by the tokenizer.
* Pad `input_ids` with {model["pad_token_id"]} and `attention_mask` with 0, to a multiple of 16: Triton batches
  requests of equal shape only. Padding does not change an answer.
{notes}* The graphs use ONNX opset {_opset(manifest)}; the server's onnxruntime must know it.
"""


def _opset(manifest: Mapping[str, Any]) -> int:
    return max(int(entry["opset"]) for entry in manifest["targets"].values())
