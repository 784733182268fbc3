"""Score labels by a teacher-forced pass over the prefix trie of their tokens.

It is for label sets in which labels share a first token, and for labels that come with the request. A node is a prefix
of a label (the root is the decoder's start token). It attends to itself and to the nodes above it, so one
pass scores every label. A label's score is the sum of log P(token | prefix) over its tokens and
end-of-sequence, over the full vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from sbs_edge.export.graphs.blocks import Writer
from sbs_edge.export.graphs.builder import FLOAT, INT64, Graph, Value
from sbs_edge.export.graphs.decoder import LAST_NORM, CrossAttention, attend_cache, cross_cache
from sbs_edge.export.graphs.encoder import batch_of, encode
from sbs_edge.export.graphs.positions import tree_bias
from sbs_edge.export.graphs.weights import T5Weights
from sbs_edge.export.quant.precision import Precision
from sbs_edge.runtime.trie import Trie, build_trie

__all__ = [
    "TrieValues",
    "build_choice_classifier",
    "build_trie_classifier",
    "score_trie",
    "trie_constants",
    "trie_inputs",
]


@dataclass(frozen=True, slots=True)
class TrieValues:
    """A trie's tensors in a graph; see :class:`sbs_edge.runtime.trie.Trie` for their shapes."""

    node_ids: Value
    node_depth: Value
    ancestors: Value
    edge_node: Value
    edge_token: Value
    label_edges: Value


def trie_inputs(graph: Graph) -> TrieValues:
    """Declare the inputs that :func:`sbs_edge.runtime.trie.batch_tries` makes."""
    return TrieValues(
        graph.input("node_ids", INT64, ["batch", "nodes"]),
        graph.input("node_depth", INT64, ["batch", "nodes"]),
        graph.input("ancestors", FLOAT, ["batch", "nodes", "nodes"]),
        graph.input("edge_node", INT64, ["batch", "edges"]),
        graph.input("edge_token", INT64, ["batch", "edges"]),
        graph.input("label_edges", FLOAT, ["batch", "labels", "edges"]),
    )


def trie_constants(graph: Graph, batched: Value, trie: Trie) -> TrieValues:
    """Repeat the tensors of one trie for every row of ``batched``."""
    batch = graph.op("Shape", batched, start=0, end=1)

    def repeated(array: np.ndarray) -> Value:
        shape = graph.op("Concat", batch, np.array(array.shape, np.int64), axis=0)
        return str(graph.op("Expand", array[None], shape))

    return TrieValues(
        repeated(trie.node_ids), repeated(trie.node_depth), repeated(trie.ancestors),
        repeated(trie.edge_node), repeated(trie.edge_token), repeated(trie.label_edges),
    )  # fmt: skip


def build_choice_classifier(weights: T5Weights, precision: Precision) -> onnx.ModelProto:
    """Write the graph for labels that come with the request: ids, mask and a trie for each row -> scores (B, K).

    The trie inputs are those of :func:`sbs_edge.runtime.trie.batch_tries`: ``node_ids (B, T)``,
    ``node_depth (B, T)``, ``ancestors (B, T, T)`` float32, ``edge_node (B, E)``, ``edge_token (B, E)``,
    ``label_edges (B, K, E)`` float32.
    """
    graph = Graph()
    ids = graph.input("input_ids", INT64, ["batch", "source"])
    mask = graph.input("attention_mask", INT64, ["batch", "source"])
    trie = trie_inputs(graph)
    writer = Writer(graph, weights, precision)
    scores = score_trie(writer, ids, trie, _attend_tokens(writer, ids, mask, trie))
    graph.output("scores", FLOAT, ["batch", "labels"], scores)
    return graph.model("choice_scorer")


def build_trie_classifier(
    weights: T5Weights, precision: Precision, label_tokens: Sequence[Sequence[int]]
) -> onnx.ModelProto:
    """Write the graph for a closed label set: ``input_ids, attention_mask (B, S) -> scores (B, K)``.

    Args:
        weights: the checkpoint.
        precision: the number format.
        label_tokens: the labels' token ids, each ending with end-of-sequence.
    """
    graph = Graph()
    ids = graph.input("input_ids", INT64, ["batch", "source"])
    mask = graph.input("attention_mask", INT64, ["batch", "source"])
    values = trie_constants(graph, ids, build_trie(label_tokens, weights.start_id))
    writer = Writer(graph, weights, precision)
    scores = score_trie(writer, ids, values, _attend_tokens(writer, ids, mask, values))
    graph.output("scores", FLOAT, ["batch", len(label_tokens)], scores)
    return graph.model("trie_scorer")


def _attend_tokens(writer: Writer, ids: Value, attention_mask: Value, trie: TrieValues) -> CrossAttention:
    graph = writer.graph
    states, mask = encode(writer, ids, attention_mask)
    cross = cross_cache(writer, states)
    one = np.array([1], np.int64)
    n_nodes = graph.op("Shape", trie.node_ids, start=1, end=2)
    mask = graph.op("Expand", mask, graph.op("Concat", one, one, n_nodes, one, axis=0))  # (B, 1, T, S)
    return attend_cache(cross, mask)


def score_trie(writer: Writer, batched: Value, trie: TrieValues, attend: CrossAttention) -> Value:
    """Return (B, K): the sum of log P(token | prefix) of every label.

    Args:
        writer: where to write.
        batched: a tensor whose first dimension is B.
        trie: the labels.
        attend: attention to the encoder's states.
    """
    graph, weights = writer.graph, writer.weights
    x = writer.precision.embedding(graph, weights.embedding, trie.node_ids)
    stream = writer.start(x, "decoder.block.0.layer.0.layer_norm")
    bias = ""
    for layer in range(weights.n_decoder_layers):
        block = f"decoder.block.{layer}.layer"
        own, cross_prefix = f"{block}.0.SelfAttention", f"{block}.1.EncDecAttention"
        if layer == 0 or weights.family == "umt5":
            bias = tree_bias(graph, weights, layer, trie.node_depth, trie.ancestors)
        q, k, v = writer.projections(stream, own)
        stream = writer.add(
            stream, writer.linear(writer.attend(q, k, v, bias), f"{own}.o", None), f"{block}.1.layer_norm"
        )
        joined = attend(writer, layer, stream)
        stream = writer.add(stream, writer.linear(joined, f"{cross_prefix}.o", None), f"{block}.2.layer_norm")
        last = layer + 1 == weights.n_decoder_layers
        stream = writer.add(
            stream,
            writer.feed_forward(stream, f"{block}.2.DenseReluDense"),
            LAST_NORM if last else f"decoder.block.{layer + 1}.layer.0.layer_norm",
        )
    logits = writer.widen(writer.logits(stream.normed))  # (B, T, V)
    log_softmax = graph.op("LogSoftmax", logits, axis=-1)
    batch_index = graph.op("Range", np.int64(0), graph.op("Squeeze", batch_of(writer, batched)), np.int64(1))
    rows = graph.op(
        "Expand",
        graph.op("Unsqueeze", batch_index, np.array([1], np.int64)),
        graph.op("Shape", trie.edge_node),
    )

    lifted = [
        graph.op("Unsqueeze", part, np.array([2], np.int64))
        for part in (rows, trie.edge_node, trie.edge_token)
    ]
    picked = graph.op("GatherND", log_softmax, graph.op("Concat", *lifted, axis=2))  # (B, E)
    log_p = graph.op("Unsqueeze", picked, np.array([2], np.int64))  # (B, E, 1)
    # Summed edge by edge: ReduceSum splits a sum depending on the batch, and MatMul depending on the padding.
    chosen = graph.op("Transpose", writer.widen(trie.label_edges), perm=[0, 2, 1])  # (B, E, K)
    sums = graph.op("CumSum", graph.op("Mul", chosen, log_p), np.array(1, np.int64))
    return str(graph.op("Gather", sums, np.array(-1, np.int64), axis=1))
