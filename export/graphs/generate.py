"""Rationales, and labels of open sets: one graph with the greedy loop inside."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from sbs_edge.export.graphs.blocks import Writer
from sbs_edge.export.graphs.builder import BOOL, FLOAT, INT64, Graph, Value
from sbs_edge.export.graphs.decoder import CrossAttention, attend_cache, cross_cache, decode_step
from sbs_edge.export.graphs.encoder import batch_of, encode, expand_batch
from sbs_edge.export.graphs.weights import T5Weights
from sbs_edge.export.quant.precision import Precision

__all__ = ["build_rationale_generator", "generate"]


def build_rationale_generator(
    weights: T5Weights,
    precision: Precision,
    output_tokens: np.ndarray | None = None,
    step_precision: Precision | None = None,
) -> onnx.ModelProto:
    """Write ``input_ids, attention_mask (B, S), max_new_tokens () int64 -> tokens (B, N), log_probability (B,)``.

    The encoder and the cross-attention's keys and values are computed once; the loop ends when every
    row has met end-of-sequence or after ``max_new_tokens``. Rows that ended early are filled with the
    padding token. ``log_probability`` is the sum over a row's tokens, end-of-sequence included.

    Args:
        weights: the checkpoint.
        precision: the number format.
        output_tokens: sorted token ids the student may write, or None for all; must hold the
            end-of-sequence token.
        step_precision: another number format for the loop's body, e.g. int4; None: ``precision``.
    """
    graph = Graph()
    ids = graph.input("input_ids", INT64, ["batch", "source"])
    attention = graph.input("attention_mask", INT64, ["batch", "source"])
    limit = graph.input("max_new_tokens", INT64, [])
    writer = Writer(graph, weights, precision)
    states, mask = encode(writer, ids, attention)
    attend = attend_cache(cross_cache(writer, states), mask)
    generate(writer, ids, attend, limit, output_tokens, step_precision or precision)
    return graph.model("explainer")


def generate(
    writer: Writer,
    batched: Value,
    attend: CrossAttention,
    limit: Value,
    output_tokens: np.ndarray | None,
    step_precision: Precision,
) -> None:
    """Write the greedy loop and its outputs, ``tokens`` and ``log_probability``.

    Args:
        writer: where to write.
        batched: a tensor whose first dimension is B.
        attend: attention to the encoder's states.
        limit: () int64: most tokens.
        output_tokens: sorted token ids the student may write, or None for all.
        step_precision: number format of the loop's body.
    """
    graph, weights = writer.graph, writer.weights
    batch = batch_of(writer, batched)

    body = graph.body("step_")
    body.input("iteration", INT64, [])
    body.input("going", BOOL, [])
    token = body.input("token", INT64, ["batch", 1])
    finished = body.input("finished", BOOL, ["batch", 1])
    score = body.input("score", FLOAT, ["batch", 1])
    heads, width = weights.n_heads, weights.d_kv
    past = [
        body.input(f"past_{i}", FLOAT, ["batch", heads, "past", width])
        for i in range(2 * weights.n_decoder_layers)
    ]
    inner = Writer(body, weights, step_precision)
    normed, present = decode_step(inner, token, past, attend)
    logits = inner.logits(normed, output_tokens)
    best = body.op("ArgMax", logits, axis=-1, keepdims=0)
    if output_tokens is not None:
        best = body.op("Gather", np.asarray(output_tokens, np.int64), best)
    following = body.op("Where", finished, np.int64(weights.pad_id), best)
    # LogSoftmax has a vectorised kernel, ReduceLogSumExp has none: 250 microseconds a token with 32k tokens.
    gain = body.op("ReduceMax", body.op("LogSoftmax", logits, axis=-1), np.array([2], np.int64), keepdims=0)
    gain = body.op("Where", finished, np.float32(0), gain)
    ended = body.op("Or", finished, body.op("Equal", best, np.int64(weights.eos_id)))
    alive = body.op("ReduceMax", body.op("Cast", body.op("Not", ended), to=6), keepdims=0)
    body.output("still_going", BOOL, [], body.op("Cast", alive, to=BOOL))
    body.output("next_token", INT64, ["batch", 1], following)
    body.output("next_finished", BOOL, ["batch", 1], ended)
    body.output("next_score", FLOAT, ["batch", 1], body.op("Add", score, gain))
    for index, cache in enumerate(present):
        body.output(f"present_{index}", FLOAT, ["batch", heads, "now", width], cache)
    body.output("written", INT64, ["batch", 1], following)

    start = expand_batch(writer, graph.constant([[weights.start_id]], np.int64), batch, (1,))
    none_finished = expand_batch(writer, graph.constant([[False]], np.bool_), batch, (1,))
    empty = expand_batch(
        writer, graph.constant(np.zeros((1, heads, 0, width), np.float32)), batch, (heads, 0, width)
    )
    no_score = expand_batch(writer, graph.constant([[0.0]], np.float32), batch, (1,))
    n_carried = 3 + len(past)
    results = [f"loop_{i}" for i in range(n_carried + 1)]
    graph.nodes.append(
        helper.make_node(
            "Loop",
            [limit, "", start, none_finished, no_score] + [empty] * len(past),
            results,
            body=body.as_proto("decode"),
        )
    )
    tokens = graph.op("Transpose", graph.op("Squeeze", results[-1], np.array([2], np.int64)), perm=[1, 0])
    graph.output("tokens", INT64, ["batch", "new"], tokens)
    total = graph.op("Squeeze", results[2], np.array([1], np.int64))
    graph.output("log_probability", FLOAT, ["batch"], total)
