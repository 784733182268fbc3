"""Graphs for long inputs: the encoder alone, and decoders that attend to the states of all chunks.

Attending to all of them is SLED's fusion in the decoder (Ivgi et al., 2023). With ``top_k``, every head attends to its
best states only, as in Unlimiformer (Bertsch et al., 2023). The key projection is absorbed into the queries, and the
value projection is applied to the mean, so that heads and layers share one copy of the states. Both identities hold
because T5's cross-attention has no position bias. Memory is then that of the states, whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper

from sbs_edge.export.graphs.blocks import Stream, Writer
from sbs_edge.export.graphs.builder import FLOAT, INT64, Graph, Value
from sbs_edge.export.graphs.decoder import CrossAttention
from sbs_edge.export.graphs.encoder import FINAL_NORM, encode
from sbs_edge.export.graphs.generate import generate
from sbs_edge.export.graphs.label import first_token_scores
from sbs_edge.export.graphs.trie import score_trie, trie_constants, trie_inputs
from sbs_edge.export.graphs.weights import T5Weights
from sbs_edge.export.quant.precision import Precision
from sbs_edge.runtime.trie import build_trie

__all__ = [
    "build_state_choice_classifier",
    "build_state_encoder",
    "build_state_label_classifier",
    "build_state_rationale_generator",
    "build_state_trie_classifier",
]

_MASKED = np.float32(-1e9)


def build_state_encoder(weights: T5Weights, precision: Precision) -> onnx.ModelProto:
    """Write ``input_ids, attention_mask (B, S) int64 -> states (B, S, d_model) float32``, after the final norm."""
    graph = Graph()
    ids = graph.input("input_ids", INT64, ["batch", "source"])
    attention = graph.input("attention_mask", INT64, ["batch", "source"])
    states, _ = encode(Writer(graph, weights, precision), ids, attention)
    graph.output("states", FLOAT, ["batch", "source", weights.d_model], states)
    return graph.model("long_encoder")


class _States:
    """The inputs ``states (1, N, d_model)`` float32 and ``top_k ()`` int64 of a graph, and attention to them.

    A ``top_k`` of N or more reads all states.
    """

    def __init__(self, graph: Graph, weights: T5Weights) -> None:
        self.states = graph.input("states", FLOAT, [1, "states", weights.d_model])
        self._top_k = graph.input("top_k", INT64, [])
        self._weights = weights

    def pool(self, graph: Graph, absorbed: Value) -> Value:
        """Return (1, R, d_model), the mean of states for each of the queries (1, R, d_model)."""
        # states x queries, not queries x states: no transposed copy of the states.
        columns = graph.op("MatMul", self.states, graph.op("Transpose", absorbed, perm=[0, 2, 1]))
        scores = self._best(graph, graph.op("Transpose", columns, perm=[0, 2, 1]))  # (1, R, N)
        return str(graph.op("MatMul", graph.op("Softmax", scores, axis=-1), self.states))

    def _best(self, graph: Graph, scores: Value) -> Value:
        """Mask the scores (1, R, N) below each row's ``top_k``-th; leave them if ``top_k`` is at least N."""
        n_states = graph.op("Squeeze", graph.op("Shape", self.states, start=1, end=2))
        fewer = graph.op("Less", self._top_k, n_states)
        some, every = graph.body(graph.fresh("some") + "_"), graph.body(graph.fresh("every") + "_")
        count = some.op("Unsqueeze", self._top_k, np.array([0], np.int64))
        best, _ = some.op("TopK", scores, count, outputs=2, axis=-1)
        least = some.op("Slice", best, np.array([-1], np.int64), np.array([2**31], np.int64),
                        np.array([2], np.int64))  # fmt: skip
        kept = some.op("Where", some.op("Less", scores, least), _MASKED, scores)
        shape: list[int | str] = [1, "queries", "states"]
        some.output(some.fresh("scores"), FLOAT, shape, kept)
        every.output(every.fresh("scores"), FLOAT, shape, scores)
        chosen = graph.fresh("chosen")
        graph.nodes.append(
            helper.make_node(
                "If", [fewer], [chosen], then_branch=some.as_proto("best"), else_branch=every.as_proto("all")
            )
        )
        return chosen

    def attend(self, writer: Writer, layer: int, stream: Stream) -> Value:
        """Cross-attention of a (1, T, d_model) stream; see :data:`CrossAttention`."""
        graph, weights = writer.graph, self._weights
        cross = f"decoder.block.{layer}.layer.1.EncDecAttention"
        (q,) = writer.projections(stream, cross, "q")
        # 1 where a column belongs to the head. With this mask, one product replaces a product for each head.
        mask = np.kron(np.eye(weights.n_heads), np.ones((1, weights.d_kv))).astype(np.float32)[None, None]
        by_head = graph.op("Mul", graph.op("Unsqueeze", q, np.array([2], np.int64)), mask)  # (1, T, H, inner)
        rows = graph.op("Reshape", by_head, np.array([1, -1, weights.inner], np.int64))
        absorbed = writer.precision.linear(graph, rows, weights.vector(f"{cross}.k"), norm=None)
        # A mean of normalised states: within the range of the norm that made them.
        values = writer.precision.linear(
            graph, self.pool(graph, absorbed), weights.linear(f"{cross}.v"), norm=FINAL_NORM
        )
        split = graph.op("Reshape", values, np.array([1, -1, weights.n_heads, weights.inner], np.int64))
        return str(graph.op("ReduceSum", graph.op("Mul", split, mask), np.array([2], np.int64), keepdims=0))


def build_state_label_classifier(
    weights: T5Weights, precision: Precision, first_tokens: Sequence[int]
) -> onnx.ModelProto:
    """Write ``states (1, N, d_model), top_k () -> scores (1, K)``: the label classifier's decoder."""
    graph = Graph()
    source, writer = _States(graph, weights), Writer(graph, weights, precision)
    scores = first_token_scores(
        writer, source.states, lambda absorbed: source.pool(graph, absorbed), first_tokens
    )
    graph.output("scores", FLOAT, [1, len(first_tokens)], scores)
    return graph.model("long_label_scorer")


def build_state_trie_classifier(
    weights: T5Weights, precision: Precision, label_tokens: Sequence[Sequence[int]]
) -> onnx.ModelProto:
    """Write ``states (1, N, d_model), top_k () -> scores (1, K)`` for labels whose first tokens collide."""
    graph = Graph()
    source = _States(graph, weights)
    trie = trie_constants(graph, source.states, build_trie(label_tokens, weights.start_id))
    attend: CrossAttention = source.attend
    scores = score_trie(Writer(graph, weights, precision), source.states, trie, attend)
    graph.output("scores", FLOAT, [1, len(label_tokens)], scores)
    return graph.model("long_label_scorer")


def build_state_choice_classifier(weights: T5Weights, precision: Precision) -> onnx.ModelProto:
    """Write ``states (1, N, d_model), top_k () and a trie -> scores (1, K)`` for labels of the request."""
    graph = Graph()
    source = _States(graph, weights)
    trie = trie_inputs(graph)
    scores = score_trie(Writer(graph, weights, precision), source.states, trie, source.attend)
    graph.output("scores", FLOAT, [1, "labels"], scores)
    return graph.model("long_choice_scorer")


def build_state_rationale_generator(
    weights: T5Weights,
    precision: Precision,
    output_tokens: np.ndarray | None = None,
    step_precision: Precision | None = None,
) -> onnx.ModelProto:
    """Write ``states (1, N, d_model), top_k (), max_new_tokens () -> tokens (1, M), log_probability (1,)``.

    The first token attends to the same states as the others.
    """
    graph = Graph()
    source = _States(graph, weights)
    limit = graph.input("max_new_tokens", INT64, [])
    generate(
        Writer(graph, weights, precision), source.states, source.attend, limit, output_tokens,
        step_precision or precision,
    )  # fmt: skip
    return graph.model("long_explainer")
