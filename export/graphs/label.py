"""The label in one decoder step, if the first tokens of the labels differ.

With a single decoder position, self-attention has one key: the softmax is 1, queries and keys are not needed, O and V
merge into one matrix, and layer 0's self-attention is a constant. Cross-attention has one query, so the
key projection is folded into it, and the value projection is applied after pooling. Both then cost
heads * d_model per source token instead of two d_model * d_model products. The head has only the labels' rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx

from sbs_edge.export.graphs.blocks import Stream, Writer
from sbs_edge.export.graphs.builder import FLOAT, INT64, Graph, Value
from sbs_edge.export.graphs.encoder import FINAL_NORM, batch_of, encode, expand_batch
from sbs_edge.export.graphs.weights import T5Weights
from sbs_edge.export.quant.precision import Precision

__all__ = ["Pool", "build_label_classifier", "first_token_scores"]

_LAST = "decoder.final_layer_norm"
Pool = Callable[[Value], Value]
"""Queries with the key projection folded in, (1 or B, H, d_model) -> (B, H, d_model), a mean of states for each."""


def _rms(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    return np.asarray(x / np.sqrt((x * x).mean() + epsilon) * weight)


def build_label_classifier(
    weights: T5Weights, precision: Precision, first_tokens: Sequence[int]
) -> onnx.ModelProto:
    """Write the graph ``input_ids (B, S), attention_mask (B, S) int64 -> scores (B, K) float32``.

    Args:
        weights: the checkpoint.
        precision: the number format.
        first_tokens: the K labels' first target tokens, all different.

    Returns:
        A model whose scores are the logits of these tokens at the first decoder position.
    """
    graph = Graph()
    ids = graph.input("input_ids", INT64, ["batch", "source"])
    mask = graph.input("attention_mask", INT64, ["batch", "source"])
    writer = Writer(graph, weights, precision)
    states, bias = encode(writer, ids, mask)
    scores = first_token_scores(writer, states, _pool_states(graph, states, bias), first_tokens)
    graph.output("scores", FLOAT, ["batch", len(first_tokens)], scores)
    return graph.model("label_scorer")


def _pool_states(graph: Graph, states: Value, mask: Value) -> Pool:
    row_mask = graph.op("Squeeze", mask, np.array([1], np.int64))  # (B, 1, S)
    keys = graph.op("Transpose", states, perm=[0, 2, 1])  # (B, d, S)

    def pool(absorbed: Value) -> Value:
        scores = graph.op("Add", graph.op("MatMul", absorbed, keys), row_mask)  # (B, H, S)
        return str(graph.op("MatMul", graph.op("Softmax", scores, axis=-1), states))  # (B, H, d)

    return pool


def first_token_scores(writer: Writer, states: Value, pool: Pool, first_tokens: Sequence[int]) -> Value:
    """Return (B, K): the logits of ``first_tokens`` at the first decoder position.

    Args:
        writer: where to write.
        states: (B, S, d_model) encoder states.
        pool: attention to them.
        first_tokens: the K labels' first target tokens.
    """
    graph = writer.graph
    normed = _decode_one(writer, states, pool)
    head = writer.head_weight(np.asarray(first_tokens)).T  # (K, d)
    # Multiply and sum instead of a matrix product: the runtime's kernels for one row and for many
    # add in different orders, and a score must not depend on the batch.
    products = graph.op("Mul", writer.widen(normed), np.ascontiguousarray(head[None]))
    return str(graph.op("ReduceSum", products, np.array([2], np.int64), keepdims=0))


def _constant_start(weights: T5Weights) -> np.ndarray:
    """Return (d_model,) float64, the residual after layer 0's self-attention, which is the same for every input."""
    x = weights.embedding[weights.start_id].astype(np.float64)
    block = "decoder.block.0.layer.0"
    normed = _rms(x, weights.vector(f"{block}.layer_norm"), weights.epsilon)
    value = weights.vector(f"{block}.SelfAttention.v").astype(np.float64) @ normed
    return np.asarray(x + weights.vector(f"{block}.SelfAttention.o").astype(np.float64) @ value)


def _decode_one(writer: Writer, states: Value, pool: Pool) -> Value:
    """Run the decoder on its start token alone; return (B, 1, d_model) after the final norm."""
    graph, weights = writer.graph, writer.weights
    heads, width, d = weights.n_heads, weights.d_kv, weights.d_model
    # (1, H, inner): 1 where a column belongs to the head. Masked, one (H, inner) product does
    # what H products of a head each would, and int8 has a kernel for it.
    block_mask = np.kron(np.eye(heads, dtype=np.float32), np.ones((1, width), np.float32))[None]
    start = _constant_start(weights)
    stream = Stream(graph.constant(start[None, None], np.float32), "", "")
    for layer in range(weights.n_decoder_layers):
        block = f"decoder.block.{layer}.layer"
        cross = f"{block}.1.EncDecAttention"
        if layer == 0:
            normed = _rms(start, weights.vector(f"{block}.1.layer_norm"), weights.epsilon)
            query = weights.vector(f"{cross}.q").astype(np.float64) @ normed
            by_head = weights.vector(f"{cross}.k").astype(np.float64).reshape(heads, width, d)
            absorbed = graph.constant(
                np.einsum("hk,hkd->hd", query.reshape(heads, width), by_head)[None], np.float32
            )
        else:
            own = f"{block}.0.SelfAttention"
            merged = weights.vector(f"{own}.o").astype(np.float64) @ weights.vector(f"{own}.v").astype(
                np.float64
            )
            update = writer.precision.linear(
                graph, stream.normed, merged.T.astype(np.float32), norm=stream.norm
            )
            stream = writer.add(stream, update, f"{block}.1.layer_norm")
            query = graph.op("Mul", writer.linear(stream.normed, f"{cross}.q", stream.norm), block_mask)
            absorbed = writer.precision.linear(graph, query, weights.vector(f"{cross}.k"), norm=None)
        # A mean of normalised states is within the range of their norm.
        values = writer.precision.linear(graph, pool(absorbed), weights.linear(f"{cross}.v"), norm=FINAL_NORM)
        merged_heads = graph.op(
            "ReduceSum", graph.op("Mul", values, block_mask), np.array([1], np.int64), keepdims=1
        )
        attended = writer.linear(merged_heads, f"{cross}.o", None)
        if layer == 0:
            stream = Stream(expand_batch(writer, stream.residual, batch_of(writer, states), (1, d)), "", "")
        stream = writer.add(stream, attended, f"{block}.2.layer_norm")
        update = writer.feed_forward(stream, f"{block}.2.DenseReluDense")
        last = layer + 1 == weights.n_decoder_layers
        stream = writer.add(
            stream, update, _LAST if last else f"decoder.block.{layer + 1}.layer.0.layer_norm"
        )
    return stream.normed
