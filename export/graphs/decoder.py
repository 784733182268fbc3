"""One step of the decoder with a cache: the body of the loop that writes rationales."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sbs_edge.export.graphs.blocks import HEAD, LAST_NORM, Stream, Writer
from sbs_edge.export.graphs.builder import Value
from sbs_edge.export.graphs.encoder import FINAL_NORM
from sbs_edge.export.graphs.positions import causal_row_bias

SelfAttention = Callable[[int, Value, Value, Value], tuple[Value, Value, Value]]
CrossAttention = Callable[[Writer, int, Stream], Value]
"""Writer, layer and (B, T, d_model) stream -> (B, T, H * d_kv): the mean of the encoder's values for each head."""

__all__ = [
    "HEAD",
    "LAST_NORM",
    "CrossAttention",
    "attend_cache",
    "cross_cache",
    "decode_position",
    "decode_step",
]


def cross_cache(writer: Writer, states: Value) -> list[Value]:
    """Return every layer's cross-attention key and value, (B, H, S, d_kv) each, made once."""
    cache = []
    for layer in range(writer.weights.n_decoder_layers):
        prefix = f"decoder.block.{layer}.layer.1.EncDecAttention"
        cache += [writer.heads(writer.linear(states, f"{prefix}.{name}", FINAL_NORM)) for name in "kv"]
    return cache


def attend_cache(cross: Sequence[Value], mask: Value) -> CrossAttention:
    """Return cross-attention over the result of :func:`cross_cache`, with an additive (B, 1, T or 1, S) mask."""

    def attend(writer: Writer, layer: int, stream: Stream) -> Value:
        (q,) = writer.projections(stream, f"decoder.block.{layer}.layer.1.EncDecAttention", "q")
        return writer.unheads(
            writer.attend_heads(writer.heads(q), cross[2 * layer], cross[2 * layer + 1], mask)
        )

    return attend


def decode_step(
    writer: Writer, token: Value, past: Sequence[Value], cross: CrossAttention
) -> tuple[Value, list[Value]]:
    """Run one position through the decoder.

    Args:
        writer: where to write.
        token: (B, 1) int64.
        past: key and value of every layer, (B, H, t, d_kv) each.
        cross: attention to the encoder's states.

    Returns:
        (B, 1, d_model) after the final norm, and the caches with another position.
    """
    graph, weights = writer.graph, writer.weights
    position = graph.op("Shape", past[0], start=2, end=3)

    def attend(layer: int, q: Value, k: Value, v: Value) -> tuple[Value, Value, Value]:
        bias = causal_row_bias(graph, weights, layer, position)
        out: tuple[Value, Value, Value] = graph.op(
            "Attention", q, k, v, bias, past[2 * layer], past[2 * layer + 1], outputs=3,
            q_num_heads=weights.n_heads, kv_num_heads=weights.n_heads, scale=1.0,
        )  # fmt: skip
        return out

    return decode_position(writer, token, attend, cross)


def decode_position(
    writer: Writer, token: Value, attend: SelfAttention, cross: CrossAttention
) -> tuple[Value, list[Value]]:
    """Run one position through the decoder, with any kind of cache.

    Args:
        writer: where to write.
        token: (B, 1) int64.
        attend: layer and (B, 1, H * d_kv) query, key, value -> (attended, cached keys, cached values).
        cross: attention to the encoder's states.

    Returns:
        (B, 1, d_model) after the final norm, and the caches that ``attend`` returned.
    """
    graph, weights = writer.graph, writer.weights
    x = writer.precision.embedding(graph, weights.embedding, token)
    stream: Stream = writer.start(x, "decoder.block.0.layer.0.layer_norm")
    present: list[Value] = []
    for layer in range(weights.n_decoder_layers):
        block = f"decoder.block.{layer}.layer"
        own, cross_prefix = f"{block}.0.SelfAttention", f"{block}.1.EncDecAttention"
        q, k, v = writer.projections(stream, own)
        attended, key, value = attend(layer, q, k, v)
        present += [key, value]
        stream = writer.add(stream, writer.linear(attended, f"{own}.o", None), f"{block}.1.layer_norm")
        joined = cross(writer, layer, stream)
        stream = writer.add(stream, writer.linear(joined, f"{cross_prefix}.o", None), f"{block}.2.layer_norm")
        update = writer.feed_forward(stream, f"{block}.2.DenseReluDense")
        last = layer + 1 == weights.n_decoder_layers
        stream = writer.add(
            stream, update, LAST_NORM if last else f"decoder.block.{layer + 1}.layer.0.layer_norm"
        )
    return stream.normed, present
