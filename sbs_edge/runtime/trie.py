"""Prefix tries of label tokens, as the arrays that the scoring graphs take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Trie", "batch_tries", "build_trie"]

PAD_MULTIPLE = 4


@dataclass(frozen=True, slots=True)
class Trie:
    """A prefix trie with T nodes, E edges and K labels.

    Attributes:
        node_ids: (T,) int64 token of every node; node 0 is the decoder's start token.
        node_depth: (T,) int64, 0 at node 0.
        ancestors: (T, T) float32, 1 where the column's node is the row's node or above it.
        edge_node: (E,) int64 node whose next token the edge predicts.
        edge_token: (E,) int64 that token.
        label_edges: (K, E) float32, 1 where the edge is on the label's path.
    """

    node_ids: np.ndarray
    node_depth: np.ndarray
    ancestors: np.ndarray
    edge_node: np.ndarray
    edge_token: np.ndarray
    label_edges: np.ndarray

    @property
    def padded_shape(self) -> tuple[int, int, int]:
        """Return the padded (nodes, edges, labels), which depend only on its own size: equal shapes share a call."""
        sizes = len(self.node_ids), len(self.edge_node), len(self.label_edges)
        nodes, edges, labels = (-(-size // PAD_MULTIPLE) * PAD_MULTIPLE for size in sizes)
        return nodes, edges, labels


def build_trie(label_tokens: Sequence[Sequence[int]], start_id: int) -> Trie:
    """Return the trie of labels whose token lists end with end-of-sequence, which needs no node."""
    nodes: dict[tuple[int, ...], int] = {(): 0}
    edges: dict[tuple[int, int], int] = {}
    paths: list[list[int]] = []
    for tokens in label_tokens:
        path = []
        for position, token in enumerate(tokens):
            parent = nodes[tuple(tokens[:position])]
            path.append(edges.setdefault((parent, token), len(edges)))
            if position + 1 < len(tokens):
                nodes.setdefault(tuple(tokens[: position + 1]), len(nodes))
        paths.append(path)
    ancestors = np.zeros((len(nodes), len(nodes)), np.float32)
    for prefix, index in nodes.items():
        for length in range(len(prefix) + 1):
            ancestors[index, nodes[prefix[:length]]] = 1.0
    label_edges = np.zeros((len(paths), len(edges)), np.float32)
    for row, path in enumerate(paths):
        label_edges[row, path] = 1.0
    return Trie(
        node_ids=np.array([prefix[-1] if prefix else start_id for prefix in nodes], np.int64),
        node_depth=np.array([len(prefix) for prefix in nodes], np.int64),
        ancestors=ancestors,
        edge_node=np.array([node for node, _ in edges], np.int64),
        edge_token=np.array([token for _, token in edges], np.int64),
        label_edges=label_edges,
    )


def batch_tries(tries: Sequence[Trie]) -> dict[str, np.ndarray]:
    """Pad tries to one shape and stack them; return the scoring graph's inputs by name.

    A padding node attends only to itself, and a padding edge is on no label's path. The amount of padding still
    affects the last bits of the scores, so the runtime stacks only tries of equal padded shape.
    """
    nodes, edges, labels = (max(sizes) for sizes in zip(*(trie.padded_shape for trie in tries), strict=True))
    batch = len(tries)
    out: dict[str, np.ndarray] = {
        "node_ids": np.zeros((batch, nodes), np.int64),
        "node_depth": np.zeros((batch, nodes), np.int64),
        "ancestors": np.tile(np.eye(nodes, dtype=np.float32), (batch, 1, 1)),
        "edge_node": np.zeros((batch, edges), np.int64),
        "edge_token": np.zeros((batch, edges), np.int64),
        "label_edges": np.zeros((batch, labels, edges), np.float32),
    }
    for row, trie in enumerate(tries):
        n, e, k = len(trie.node_ids), len(trie.edge_node), len(trie.label_edges)
        out["node_ids"][row, :n] = trie.node_ids
        out["node_depth"][row, :n] = trie.node_depth
        out["ancestors"][row, :n, :n] = trie.ancestors
        out["edge_node"][row, :e] = trie.edge_node
        out["edge_token"][row, :e] = trie.edge_token
        out["label_edges"][row, :k, :e] = trie.label_edges
    return out
