"""The parts that graphs which write text share: their inputs, caches, greedy choice, and the loop itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from onnx import helper

from sbs_edge.export.graphs.blocks import Writer
from sbs_edge.export.graphs.builder import FLOAT, INT64, Graph, Value
from sbs_edge.export.graphs.encoder import encode
from sbs_edge.export.graphs.weights import T5Weights
from sbs_edge.export.quant.precision import Precision

__all__ = [
    "add_loop",
    "axes",
    "cache_inputs",
    "cache_outputs",
    "ends",
    "log_probability",
    "next_token",
    "text_graph",
]


def axes(*values: int) -> np.ndarray:
    """Return a 1-D int64 constant."""
    return np.array(values, np.int64)


def text_graph(weights: T5Weights, precision: Precision) -> tuple[Writer, Value, Value, Value, Value]:
    """Start a graph with ``input_ids``, ``attention_mask`` and ``max_new_tokens``, and encode.

    Returns:
        The writer, the ids, the limit, the encoder's states (B, S, d_model) and the mask's bias (B, 1, 1, S).
    """
    graph = Graph()
    ids = graph.input("input_ids", INT64, ["batch", "source"])
    attention = graph.input("attention_mask", INT64, ["batch", "source"])
    limit = graph.input("max_new_tokens", INT64, [])
    writer = Writer(graph, weights, precision)
    states, mask = encode(writer, ids, attention)
    return writer, ids, limit, states, mask


def cache_inputs(graph: Graph, weights: T5Weights, rows: str, places: str | int) -> list[Value]:
    """Declare key and value of every decoder layer, (rows, H, places, d_kv) each."""
    shape: list[int | str] = [rows, weights.n_heads, places, weights.d_kv]
    return [graph.input(f"past_{i}", FLOAT, shape) for i in range(2 * weights.n_decoder_layers)]


def cache_outputs(
    graph: Graph, weights: T5Weights, rows: str, places: str | int, present: Iterable[Value]
) -> None:
    """Carry the caches after a step to the next one."""
    shape: list[int | str] = [rows, weights.n_heads, places, weights.d_kv]
    for index, cache in enumerate(present):
        graph.output(f"present_{index}", FLOAT, shape, cache)


def next_token(
    graph: Graph, weights: T5Weights, logits: Value, finished: Value, output_tokens: np.ndarray | None
) -> tuple[Value, Value]:
    """Return the likeliest token (B, 1), and the same with padding in finished rows."""
    best = graph.op("ArgMax", logits, axis=-1, keepdims=0)
    if output_tokens is not None:
        best = graph.op("Gather", np.asarray(output_tokens, np.int64), best)
    return best, graph.op("Where", finished, np.int64(weights.pad_id), best)


def log_probability(graph: Graph, logits: Value, finished: Value) -> Value:
    """Return the log-probability (B, 1) of the likeliest token, 0 in finished rows."""
    # LogSoftmax has a vectorised kernel, ReduceLogSumExp has none: 250 microseconds a token with 32k tokens.
    gain = graph.op("ReduceMax", graph.op("LogSoftmax", logits, axis=-1), axes(2), keepdims=0)
    return str(graph.op("Where", finished, np.float32(0), gain))


def ends(graph: Graph, weights: T5Weights, finished: Value, token: Value) -> Value:
    """Return which rows (B, 1) are finished once ``token`` is written."""
    return str(graph.op("Or", finished, graph.op("Equal", token, np.int64(weights.eos_id))))


def add_loop(
    graph: Graph, body: Graph, name: str, limit: Value, carried: Sequence[Value], scans: int = 0
) -> list[Value]:
    """Run ``body`` at most ``limit`` times; return what it carried at the end, then its ``scans`` outputs."""
    results = [f"loop_{i}" for i in range(len(carried) + scans)]
    graph.nodes.append(helper.make_node("Loop", [limit, "", *carried], results, body=body.as_proto(name)))
    return results
