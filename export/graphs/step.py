"""Rationales on a GPU: an encoder graph, and a step graph with a cache of fixed size that a host loop drives.

TensorRT refuses a loop whose tensors grow, and a fixed cache can stay on the device between calls.
"""

from __future__ import annotations

import numpy as np
import onnx

from sbs_edge.export.graphs.blocks import Writer, mask_bias
from sbs_edge.export.graphs.builder import BOOL, FLOAT, INT64, Graph, Value
from sbs_edge.export.graphs.decoder import HEAD, LAST_NORM, attend_cache, cross_cache, decode_position
from sbs_edge.export.graphs.encoder import encode
from sbs_edge.export.graphs.positions import cache_row_bias
from sbs_edge.export.graphs.weights import T5Weights
from sbs_edge.export.quant.precision import Precision

__all__ = ["build_decoder_step", "build_encoder"]


def build_encoder(weights: T5Weights, precision: Precision) -> onnx.ModelProto:
    """Write ``input_ids, attention_mask (B, S) int64 -> cross_0 .. cross_{2L-1} (B, H, S, d_kv)``.

    ``cross_{2l}`` and ``cross_{2l+1}`` are keys and values of decoder layer l, made once a request.
    """
    graph = Graph()
    ids = graph.input("input_ids", INT64, ["batch", "source"])
    attention = graph.input("attention_mask", INT64, ["batch", "source"])
    writer = Writer(graph, weights, precision)
    states, _ = encode(writer, ids, attention)
    for index, cache in enumerate(cross_cache(writer, states)):
        graph.output(f"cross_{index}", FLOAT, ["batch", weights.n_heads, "source", weights.d_kv], cache)
    return graph.model("encoder")


def build_decoder_step(
    weights: T5Weights, precision: Precision, max_new_tokens: int, output_tokens: np.ndarray | None = None
) -> onnx.ModelProto:
    """Write one step: the token at ``position`` in, the next token and the caches out.

    Inputs: ``token (B, 1)`` and ``position (1,)`` int64, ``finished (B, 1)`` bool, ``score (B, 1)`` float32,
    ``past_i (B, H, max_new_tokens, d_kv)``, of which places from ``position`` on are not read, whatever they hold;
    ``attention_mask (B, S)`` int64 and ``cross_i (B, H, S, d_kv)``, the same in every step. Outputs: ``next_token``,
    ``next_position``, ``next_finished``, ``next_score`` and ``present_i``, each the next step's input. A finished row
    writes padding and keeps its ``score``, the sum of its tokens' log-probabilities, end-of-sequence included.

    Args:
        weights: the checkpoint.
        precision: the number format.
        max_new_tokens: places in the cache.
        output_tokens: sorted token ids the student may write; None: all.
    """
    graph = Graph()
    token = graph.input("token", INT64, ["batch", 1])
    position = graph.input("position", INT64, [1])
    finished = graph.input("finished", BOOL, ["batch", 1])
    score = graph.input("score", FLOAT, ["batch", 1])
    attention = graph.input("attention_mask", INT64, ["batch", "source"])
    heads, width, layers = weights.n_heads, weights.d_kv, 2 * weights.n_decoder_layers
    cross = [graph.input(f"cross_{i}", FLOAT, ["batch", heads, "source", width]) for i in range(layers)]
    past = [graph.input(f"past_{i}", FLOAT, ["batch", heads, max_new_tokens, width]) for i in range(layers)]
    writer = Writer(graph, weights, precision)
    places = np.arange(max_new_tokens, dtype=np.int64)[None, None, :, None]
    # Places that no step has filled take this step's key and value: finite, and masked by the bias. What the
    # buffers held before is never read, so nobody has to clear them.
    filled = graph.op("Less", places, position)

    def attend(layer: int, q: Value, k: Value, v: Value) -> tuple[Value, Value, Value]:
        key = graph.op("Where", filled, past[2 * layer], writer.heads(k))
        value = graph.op("Where", filled, past[2 * layer + 1], writer.heads(v))
        bias = cache_row_bias(graph, weights, layer, position, max_new_tokens)
        pooled = writer.attend_heads(writer.heads(q), key, value, bias)
        return writer.unheads(pooled), key, value

    normed, present = decode_position(writer, token, attend, attend_cache(cross, mask_bias(graph, attention)))
    logits = writer.widen(
        precision.linear(graph, normed, writer.head_weight(output_tokens), norm=LAST_NORM, site=HEAD)
    )
    best = graph.op("ArgMax", logits, axis=-1, keepdims=0)
    if output_tokens is not None:
        best = graph.op("Gather", np.asarray(output_tokens, np.int64), best)
    following = graph.op("Where", finished, np.int64(weights.pad_id), best)
    graph.output("next_token", INT64, ["batch", 1], following)
    graph.output("next_position", INT64, [1], graph.op("Add", position, np.array([1], np.int64)))
    ended = graph.op("Or", finished, graph.op("Equal", best, np.int64(weights.eos_id)))
    graph.output("next_finished", BOOL, ["batch", 1], ended)
    gain = graph.op("ReduceMax", graph.op("LogSoftmax", logits, axis=-1), np.array([2], np.int64), keepdims=0)
    gain = graph.op("Where", finished, np.float32(0), gain)
    graph.output("next_score", FLOAT, ["batch", 1], graph.op("Add", score, gain))
    for index, cache in enumerate(present):
        graph.output(f"present_{index}", FLOAT, ["batch", heads, max_new_tokens, width], cache)
    return graph.model("decoder_step")
