"""Rationales, and labels of open sets: one graph with the greedy loop inside."""

from __future__ import annotations

import numpy as np
import onnx

from sbs_edge.export.graphs.blocks import Writer
from sbs_edge.export.graphs.builder import BOOL, FLOAT, INT64, Value
from sbs_edge.export.graphs.decoder import CrossAttention, attend_cache, cross_cache, decode_step
from sbs_edge.export.graphs.encoder import batch_of, expand_batch
from sbs_edge.export.graphs.loops import (
    add_loop,
    axes,
    cache_inputs,
    cache_outputs,
    ends,
    log_probability,
    next_token,
    text_graph,
)
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
    row has reached end-of-sequence, or after ``max_new_tokens``. Rows that ended early are filled with the
    padding token. ``log_probability`` is the sum over a row's tokens, end-of-sequence included.

    Args:
        weights: the checkpoint.
        precision: the number format.
        output_tokens: sorted token ids the student may write, or None for all; must hold the
            end-of-sequence token.
        step_precision: another number format for the loop's body, e.g. int4; None: ``precision``.
    """
    writer, ids, limit, states, mask = text_graph(weights, precision)
    attend = attend_cache(cross_cache(writer, states), mask)
    generate(writer, ids, attend, limit, output_tokens, step_precision or precision)
    return writer.graph.model("explainer")


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
        limit: () int64, most tokens.
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
    past = cache_inputs(body, weights, "batch", "past")
    inner = Writer(body, weights, step_precision)
    normed, present = decode_step(inner, token, past, attend)
    logits = inner.logits(normed, output_tokens)
    best, following = next_token(body, weights, logits, finished, output_tokens)
    gain = log_probability(body, logits, finished)
    ended = ends(body, weights, finished, best)
    alive = body.op("ReduceMax", body.op("Cast", body.op("Not", ended), to=6), keepdims=0)
    body.output("still_going", BOOL, [], body.op("Cast", alive, to=BOOL))
    body.output("next_token", INT64, ["batch", 1], following)
    body.output("next_finished", BOOL, ["batch", 1], ended)
    body.output("next_score", FLOAT, ["batch", 1], body.op("Add", score, gain))
    cache_outputs(body, weights, "batch", "now", present)
    body.output("written", INT64, ["batch", 1], following)

    heads, width = weights.n_heads, weights.d_kv
    start = expand_batch(writer, graph.constant([[weights.start_id]], np.int64), batch, (1,))
    none_finished = expand_batch(writer, graph.constant([[False]], np.bool_), batch, (1,))
    empty = expand_batch(
        writer, graph.constant(np.zeros((1, heads, 0, width), np.float32)), batch, (heads, 0, width)
    )
    no_score = expand_batch(writer, graph.constant([[0.0]], np.float32), batch, (1,))
    carried = [start, none_finished, no_score, *[empty] * len(past)]
    results = add_loop(graph, body, "decode", limit, carried, scans=1)
    tokens = graph.op("Transpose", graph.op("Squeeze", results[-1], axes(2)), perm=[1, 0])
    graph.output("tokens", INT64, ["batch", "new"], tokens)
    graph.output("log_probability", FLOAT, ["batch"], graph.op("Squeeze", results[2], axes(1)))
