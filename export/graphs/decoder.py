"""One step of the decoder with a cache: the body of the loop that writes rationales."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sbs_edge.export.graphs.blocks import HEAD, LAST_NORM, Stream, Writer
from sbs_edge.export.graphs.builder import Value
from sbs_edge.export.graphs.encoder import FINAL_NORM
from sbs_edge.export.graphs.positions import causal_row_bias

SelfAttention = Callable[[int, Value, Value, Value], tuple[Value, Value, Value]]

__all__ = ["HEAD", "LAST_NORM", "cross_cache", "decode_position", "decode_step"]


def cross_cache(writer: Writer, states: Value) -> list[Value]:
    """Return every layer's cross-attention key and value, (B, H, S, d_kv) each, made once."""
    cache = []
    for layer in range(writer.weights.n_decoder_layers):
        prefix = f"decoder.block.{layer}.layer.1.EncDecAttention"
        cache += [writer.heads(writer.linear(states, f"{prefix}.{name}", FINAL_NORM)) for name in "kv"]
    return cache


def decode_step(
    writer: Writer, token: Value, past: Sequence[Value], cross: Sequence[Value], mask: Value
) -> tuple[Value, list[Value]]:
    """Run one position through the decoder.

    Args:
        writer: where to write.
        token: (B, 1) int64.
        past: key and value of every layer, (B, H, t, d_kv) each.
        cross: the result of :func:`cross_cache`.
        mask: (B, 1, 1, S) additive.

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

    return decode_position(writer, token, attend, cross, mask)


def decode_position(
    writer: Writer, token: Value, attend: SelfAttention, cross: Sequence[Value], mask: Value
) -> tuple[Value, list[Value]]:
    """Run one position through the decoder, with any kind of cache.

    Args:
        writer: where to write.
        token: (B, 1) int64.
        attend: layer and (B, 1, H * d_kv) query, key, value -> (attended, cached keys, cached values).
        cross: what :func:`cross_cache` returned.
        mask: (B, 1, 1, S) additive.

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
        (q,) = writer.projections(stream, cross_prefix, "q")
        pooled = writer.attend_heads(writer.heads(q), cross[2 * layer], cross[2 * layer + 1], mask)
        joined = writer.unheads(pooled)
        stream = writer.add(stream, writer.linear(joined, f"{cross_prefix}.o", None), f"{block}.2.layer_norm")
        update = writer.feed_forward(stream, f"{block}.2.DenseReluDense")
        last = layer + 1 == weights.n_decoder_layers
        stream = writer.add(
            stream, update, LAST_NORM if last else f"decoder.block.{layer + 1}.layer.0.layer_norm"
        )
    return stream.normed, present
