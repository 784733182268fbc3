"""The files ``optimum.onnxruntime.ORTModelForSeq2SeqLM.from_pretrained`` loads, from the same blocks.

    encoder_model.onnx            input_ids, attention_mask -> last_hidden_state
    decoder_model.onnx            input_ids (B, T), encoder_hidden_states, encoder_attention_mask
                                  -> logits, present.N.{decoder,encoder}.{key,value}
    decoder_with_past_model.onnx  input_ids (B, 1), encoder_attention_mask,
                                  past_key_values.N.{decoder,encoder}.{key,value}
                                  -> logits, present.N.decoder.{key,value}

Constants are stored once for the three graphs, and the cross-attention's keys and values are computed
once. The layout is for other tools; this project's own runtime reads the bundle.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from sbs_edge import files
from sbs_edge.errors import UsageError
from sbs_edge.export.assemble import GraphInputs, precision_of
from sbs_edge.export.graphs.blocks import Writer, mask_bias
from sbs_edge.export.graphs.builder import FLOAT, INT64, Graph, Value
from sbs_edge.export.graphs.decoder import attend_cache, cross_cache, decode_position, decode_step
from sbs_edge.export.graphs.encoder import batch_of, encode
from sbs_edge.export.graphs.positions import tree_bias
from sbs_edge.export.graphs.store import save_graphs
from sbs_edge.export.graphs.weights import T5Weights
from sbs_edge.export.quant.precision import Precision
from sbs_edge.export.targets import Target
from sbs_edge.training.student_dir import CARD, StudentDir

__all__ = ["write_optimum"]

COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "spiece.model", CARD,
)  # fmt: skip


def write_optimum(
    out: Path, opened: StudentDir, recipe: GraphInputs, wanted: Sequence[Target], manifest: dict[str, Any]
) -> None:
    """Write the directory ``out``; an existing one is replaced only by a complete one.

    Raises:
        UsageError: more than one target is given; the layout has a single one.
    """
    if len(wanted) != 1:
        raise UsageError("The optimum layout has a single target; give one.")
    weights, target = recipe.weights, wanted[0]
    with files.atomic_directory(out) as work:
        save_graphs(
            {
                "encoder_model": _encoder(weights, precision_of(target, recipe)),
                "decoder_model": _decoder(weights, precision_of(target, recipe)),
                "decoder_with_past_model": _decoder_with_past(weights, precision_of(target, recipe)),
            },
            work,
        )
        for name in COMPANIONS:
            if opened.companion(name).is_file():
                shutil.copyfile(opened.companion(name), work / name)
        (work / "README.md").write_text(_readme(target, manifest), encoding="utf-8")


def _encoder(weights: T5Weights, precision: Precision) -> onnx.ModelProto:
    graph = Graph()
    ids = graph.input("input_ids", INT64, ["batch", "source"])
    mask = graph.input("attention_mask", INT64, ["batch", "source"])
    states, _ = encode(Writer(graph, weights, precision), ids, mask)
    graph.output("last_hidden_state", FLOAT, ["batch", "source", weights.d_model], states)
    return graph.model("encoder_model")


def _logits(graph: Graph, writer: Writer, normed: Value) -> None:
    n_tokens = writer.weights.head.shape[0]
    graph.output("logits", FLOAT, ["batch", "target", n_tokens], writer.logits(normed))


def _present(graph: Graph, weights: T5Weights, side: str, values: Sequence[Value], length: str) -> None:
    for index, value in enumerate(values):
        name = f"present.{index // 2}.{side}.{('key', 'value')[index % 2]}"
        graph.output(name, FLOAT, ["batch", weights.n_heads, length, weights.d_kv], value)


def _decoder(weights: T5Weights, precision: Precision) -> onnx.ModelProto:
    """Write the decoder over a whole (B, T) sequence, for the first step or a forced prefix."""
    graph = Graph()
    attention = graph.input("encoder_attention_mask", INT64, ["batch", "source"])
    ids = graph.input("input_ids", INT64, ["batch", "target"])
    states = graph.input("encoder_hidden_states", FLOAT, ["batch", "source", weights.d_model])
    writer = Writer(graph, weights, precision)
    one = np.array([1], np.int64)
    length = graph.op("Shape", ids, start=1, end=2)
    mask = graph.op("Expand", mask_bias(graph, attention), graph.op("Concat", one, one, length, one, axis=0))
    steps = graph.op("Range", np.int64(0), graph.op("Squeeze", length), np.int64(1))
    depth = graph.op("Expand", graph.op("Unsqueeze", steps, np.array([0], np.int64)), graph.op("Shape", ids))
    square = graph.op("Concat", batch_of(writer, ids), length, length, axis=0)
    ancestors = graph.op("Trilu", graph.op("Expand", np.ones((1, 1, 1), np.float32), square), upper=0)

    def attend(layer: int, q: Value, k: Value, v: Value) -> tuple[Value, Value, Value]:
        bias = tree_bias(graph, weights, layer, depth, ancestors)
        return writer.attend(q, k, v, bias), writer.heads(k), writer.heads(v)

    cross = cross_cache(writer, states)
    normed, present = decode_position(writer, ids, attend, attend_cache(cross, mask))
    _logits(graph, writer, normed)
    _present(graph, weights, "decoder", present, "target")
    _present(graph, weights, "encoder", cross, "source")
    return graph.model("decoder_model")


def _decoder_with_past(weights: T5Weights, precision: Precision) -> onnx.ModelProto:
    graph = Graph()
    attention = graph.input("encoder_attention_mask", INT64, ["batch", "source"])
    ids = graph.input("input_ids", INT64, ["batch", 1])

    past: list[Value] = []
    cross: list[Value] = []
    for layer in range(weights.n_decoder_layers):  # optimum pairs caches with inputs in this order
        for side, length, caches in (("decoder", "past", past), ("encoder", "source", cross)):
            for part in ("key", "value"):
                name = f"past_key_values.{layer}.{side}.{part}"
                caches.append(graph.input(name, FLOAT, ["batch", weights.n_heads, length, weights.d_kv]))
    writer = Writer(graph, weights, precision)
    normed, present = decode_step(writer, ids, past, attend_cache(cross, mask_bias(graph, attention)))
    _logits(graph, writer, normed)
    _present(graph, weights, "decoder", present, "now")
    return graph.model("decoder_with_past_model")


def _readme(target: Target, manifest: dict[str, Any]) -> str:
    prefixes = manifest["prefixes"]
    return (
        f"# {manifest['name']}\n\n"
        f"{target.name}: {target.summary}. Written by sbs-edge {manifest['versions']['sbs-edge']} for optimum:\n\n"
        "```python\n"
        "from optimum.onnxruntime import ORTModelForSeq2SeqLM\n\n"
        'model = ORTModelForSeq2SeqLM.from_pretrained("this-directory", use_cache=True, use_merged=False)\n'
        "```\n\n"
        f"Inputs of the label task begin with `{prefixes['label']}`, of the rationale task with "
        f"`{prefixes['rationale']}`.\n\n"
        "transformers' tokenizers take `</s>` or `<pad>` in a user's text for control tokens; "
        "`sbs_edge.tokens.TextTokenizer` does not (`encode(text, prefix)`).\n"
    )
