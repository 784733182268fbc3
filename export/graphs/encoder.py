"""The encoder: (B, S) ids and mask to (B, S, d_model) states."""

from __future__ import annotations

import numpy as np

from sbs_edge.export.graphs.blocks import Stream, Writer, mask_bias
from sbs_edge.export.graphs.builder import Value
from sbs_edge.export.graphs.positions import encoder_bias

__all__ = ["encode"]

FINAL_NORM = "encoder.final_layer_norm"


def encode(writer: Writer, input_ids: Value, attention_mask: Value) -> tuple[Value, Value]:
    """Return (states (B, S, d_model) after the final norm, mask bias (B, 1, 1, S))."""
    graph, weights = writer.graph, writer.weights
    mask = mask_bias(graph, attention_mask)
    length = graph.op("Shape", input_ids, start=1, end=2)
    x = writer.precision.embedding(graph, weights.embedding, input_ids)
    stream: Stream = writer.start(x, "encoder.block.0.layer.0.layer_norm")
    bias = ""
    for layer in range(weights.n_encoder_layers):
        block = f"encoder.block.{layer}.layer"
        if layer == 0 or weights.family == "umt5":
            bias = graph.op("Add", encoder_bias(graph, weights, layer, length), mask)
        q, k, v = writer.projections(stream, f"{block}.0.SelfAttention")
        attended = writer.linear(writer.attend(q, k, v, bias), f"{block}.0.SelfAttention.o", None)
        stream = writer.add(stream, attended, f"{block}.1.layer_norm")
        update = writer.feed_forward(stream, f"{block}.1.DenseReluDense")
        following = (
            f"encoder.block.{layer + 1}.layer.0.layer_norm"
            if layer + 1 < weights.n_encoder_layers
            else FINAL_NORM
        )
        stream = writer.add(stream, update, following)
    return stream.normed, mask


def batch_of(writer: Writer, tensor: Value) -> Value:
    """Return the first dimension of ``tensor`` as a 1-element int64 tensor."""
    return str(writer.graph.op("Shape", tensor, start=0, end=1))


def expand_batch(writer: Writer, tensor: Value, batch: Value, tail: tuple[int, ...]) -> Value:
    """Repeat a (1, *tail) tensor ``batch`` times."""
    shape = writer.graph.op("Concat", batch, np.array(tail, np.int64), axis=0)
    return str(writer.graph.op("Expand", tensor, shape))
