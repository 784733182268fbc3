"""T5's relative position bias (Raffel et al. 2020, section 2.1) as tables, without bucket arithmetic.

Buckets saturate at ``max_distance``, so a table over distances -max..max, looked up with a clipped
distance, is exact for sequences of any length.
"""

from __future__ import annotations

import math

import numpy as np

from sbs_edge.export.graphs.builder import Graph, Value
from sbs_edge.export.graphs.weights import T5Weights

__all__ = ["bias_table", "bucket_of", "cache_row_bias", "causal_row_bias", "encoder_bias", "tree_bias"]

MASKED = np.float32(-1e9)


def bucket_of(distance: np.ndarray, *, bidirectional: bool, n_buckets: int, max_distance: int) -> np.ndarray:
    """Return the bucket of every key position minus query position; integers, any shape."""
    bucket = np.zeros_like(distance)
    if bidirectional:
        n_buckets //= 2
        bucket = bucket + (distance > 0) * n_buckets
        distance = np.abs(distance)
    else:
        distance = -np.minimum(distance, 0)
    exact = n_buckets // 2
    # float32 throughout, as in PyTorch, because a bucket's border may be an integer.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    far = exact + (ratio / np.float32(math.log(max_distance / exact)) * np.float32(n_buckets - exact)).astype(
        np.int64
    )
    return bucket + np.where(distance < exact, distance, np.minimum(far, n_buckets - 1))


def bias_table(weights: T5Weights, stack: str, layer: int) -> np.ndarray:
    """Return (H, 2 * max_distance + 1) float32: the bias at distance -max_distance .. max_distance.

    Only UMT5 has a table in every layer; other models use layer 0's in all layers.
    """
    owner = layer if weights.family == "umt5" else 0
    table = weights.vector(f"{stack}.block.{owner}.layer.0.SelfAttention.relative_attention_bias")
    distance = np.arange(-weights.max_distance, weights.max_distance + 1)
    buckets = bucket_of(
        distance,
        bidirectional=stack == "encoder",
        n_buckets=weights.n_buckets,
        max_distance=weights.max_distance,
    )
    return np.ascontiguousarray(table[buckets].T)


def encoder_bias(graph: Graph, weights: T5Weights, layer: int, length: Value) -> Value:
    """Return (1, H, S, S) for a sequence of ``length`` (a 1-element int64 tensor S).

    Row i of a Toeplitz matrix is row 0 shifted by i. The 2S values (distances 0..S-1, one unused, then
    -(S-1)..-1) are repeated S times and read in rows of 2S-1, which shifts every row by one.
    """
    table = bias_table(weights, "encoder", layer)

    def positions() -> Value:
        double = graph.op("Mul", length, np.array([2], np.int64))
        steps = graph.op("Range", np.int64(0), graph.op("Squeeze", double), np.int64(1))
        wrapped = graph.op("Where", graph.op("Less", steps, length), steps, graph.op("Sub", steps, double))
        limit = np.int64(weights.max_distance)
        return str(graph.op("Add", graph.op("Clip", wrapped, -limit, limit), limit))

    index = graph.once(("encoder positions",), positions)
    heads = weights.n_heads
    row = graph.op("Gather", table, index, axis=1)  # (H, 2S)
    double = graph.op("Mul", length, np.array([2], np.int64))
    short = graph.op("Sub", double, np.array([1], np.int64))
    repeated = graph.op(
        "Expand",
        graph.op("Unsqueeze", row, np.array([1], np.int64)),
        graph.op("Concat", np.array([heads], np.int64), length, double, axis=0),
    )
    flat = graph.op("Reshape", repeated, np.array([heads, -1], np.int64))
    used = graph.op(
        "Slice", flat, np.array([0], np.int64), graph.op("Mul", length, short), np.array([1], np.int64)
    )
    moved = graph.op("Reshape", used, graph.op("Concat", np.array([heads], np.int64), length, short, axis=0))
    square = graph.op("Slice", moved, np.array([0], np.int64), length, np.array([2], np.int64))
    return str(graph.op("Unsqueeze", square, np.array([0], np.int64)))


def causal_row_bias(graph: Graph, weights: T5Weights, layer: int, position: Value) -> Value:
    """Return (1, H, 1, t + 1): the bias of the query at ``position`` t (1-element int64) to keys 0..t."""
    owner = layer if weights.family == "umt5" else 0
    return str(graph.once(("causal bias", owner), lambda: _causal_row_bias(graph, weights, owner, position)))


def _causal_row_bias(graph: Graph, weights: T5Weights, layer: int, position: Value) -> Value:
    table = bias_table(weights, "decoder", layer)[:, : weights.max_distance + 1]  # distances -max .. 0

    def index() -> Value:
        stop = graph.op("Add", graph.op("Squeeze", position), np.int64(1))
        keys = graph.op("Range", np.int64(0), stop, np.int64(1))
        distance = graph.op("Sub", keys, position)  # -t .. 0
        limit = np.int64(weights.max_distance)
        return str(graph.op("Add", graph.op("Max", distance, -limit), limit))

    row = graph.op("Gather", table, graph.once(("causal positions",), index), axis=1)
    return str(graph.op("Unsqueeze", row, np.array([0, 2], np.int64)))


def cache_row_bias(graph: Graph, weights: T5Weights, layer: int, position: Value, length: int) -> Value:
    """Return (1, H, 1, length): the bias of the query at ``position`` to a cache with room for ``length``.

    Positions after ``position`` are empty and masked.
    """
    owner = layer if weights.family == "umt5" else 0
    table = bias_table(weights, "decoder", owner)[:, : weights.max_distance + 1]
    places = np.arange(length, dtype=np.int64)

    def index() -> Value:
        limit = np.int64(weights.max_distance)
        distance = graph.op("Min", graph.op("Sub", places, position), np.int64(0))
        return str(graph.op("Add", graph.op("Max", distance, -limit), limit))

    def empty() -> Value:
        return str(graph.op("Mul", graph.op("Cast", graph.op("Greater", places, position), to=1), MASKED))

    def bias() -> Value:
        row = graph.op("Gather", table, graph.once(("cache positions",), index), axis=1)  # (H, length)
        masked = graph.op("Add", row, graph.once(("cache mask",), empty))
        return str(graph.op("Unsqueeze", masked, np.array([0, 2], np.int64)))

    return str(graph.once(("cache bias", owner), bias))


def tree_bias(graph: Graph, weights: T5Weights, layer: int, depth: Value, ancestors: Value) -> Value:
    """Return (B, H, T, T) for a tree of nodes: bias by difference of depth, -inf where no ancestor.

    Args:
        graph: the graph to add to.
        weights: the checkpoint.
        layer: decoder layer.
        depth: (B, T) int64 depth of every node, 0 at the root.
        ancestors: (B, T, T) float32, 1 where the column's node is the row's node or above it.
    """
    table = bias_table(weights, "decoder", layer)[:, : weights.max_distance + 1]

    def index() -> Value:
        query = graph.op("Unsqueeze", depth, np.array([2], np.int64))
        key = graph.op("Unsqueeze", depth, np.array([1], np.int64))
        limit = np.int64(weights.max_distance)
        clipped = graph.op("Clip", graph.op("Sub", key, query), -limit, np.int64(0))
        return str(graph.op("Add", clipped, limit))

    def mask() -> Value:
        outside = graph.op("Sub", np.float32(1), ancestors)
        return str(graph.op("Unsqueeze", graph.op("Mul", outside, MASKED), np.array([1], np.int64)))

    gathered = graph.op("Gather", table, graph.once(("tree positions",), index), axis=1)  # (H, B, T, T)
    by_row = graph.op("Transpose", gathered, perm=[1, 0, 2, 3])
    return str(graph.op("Add", by_row, graph.once(("tree mask",), mask)))
