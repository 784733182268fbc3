"""Rationales on a GPU: an encoder graph, and a step graph with a cache of fixed size for a loop on the host.

TensorRT refuses a loop whose tensors grow. A fixed cache can stay on the device between calls.
"""

from __future__ import annotations

import numpy as np
import onnx

from sbs_edge.export.graphs.blocks import Writer, mask_bias
from sbs_edge.export.graphs.builder import BOOL, FLOAT, INT64, Graph, Value
from sbs_edge.export.graphs.decoder import HEAD, LAST_NORM, attend_cache, cross_cache, decode_position
from sbs_edge.export.graphs.encoder import encode
from sbs_edge.export.graphs.loops import (
    axes,
    cache_inputs,
    cache_outputs,
    ends,
    log_probability,
    next_token,
)
from sbs_edge.export.graphs.positions import cache_row_bias
from sbs_edge.export.graphs.weights import T5Weights
from sbs_edge.export.quant.precision import Precision

__all__ = ["build_decoder_step", "build_encoder"]


def build_encoder(weights: T5Weights, precision: Precision) -> onnx.ModelProto:
    """Write ``input_ids, attention_mask (B, S) int64 -> cross_0 .. cross_{2L-1} (B, H, S, d_kv)``.

    ``cross_{2l}`` and ``cross_{2l+1}`` are keys and values of decoder layer l, computed once per request.
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
    """Write a step graph, from the token at ``position`` to the next token and the caches.

    Inputs: ``token (B, 1)`` and ``position (1,)`` int64, ``finished (B, 1)`` bool, ``score (B, 1)`` float32,
    ``past_i (B, H, max_new_tokens, d_kv)``, of which places from ``position`` on are not read, whatever they hold;
    ``attention_mask (B, S)`` int64 and ``cross_i (B, H, S, d_kv)``, the same in every step. Outputs: ``next_token``,
    ``next_position``, ``next_finished``, ``next_score`` and ``present_i``, each the next step's input. A finished row
    writes padding and keeps its ``score``, the sum of its tokens' log-probabilities, end-of-sequence included.

    Args:
        weights: the checkpoint.
        precision: the number format.
        max_new_tokens: positions in the cache.
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
    past = cache_inputs(graph, weights, "batch", max_new_tokens)
    writer = Writer(graph, weights, precision)
    places = np.arange(max_new_tokens, dtype=np.int64)[None, None, :, None]
    # Positions that no step has filled get this step's key and value, which are finite and masked by the bias. The
    # earlier content of the buffers is never read, so they need not be cleared.
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
    best, following = next_token(graph, weights, logits, finished, output_tokens)
    graph.output("next_token", INT64, ["batch", 1], following)
    graph.output("next_position", INT64, [1], graph.op("Add", position, axes(1)))
    ended = ends(graph, weights, finished, best)
    graph.output("next_finished", BOOL, ["batch", 1], ended)
    gain = log_probability(graph, logits, finished)
    graph.output("next_score", FLOAT, ["batch", 1], graph.op("Add", score, gain))
    cache_outputs(graph, weights, "batch", max_new_tokens, present)
    return graph.model("decoder_step")
