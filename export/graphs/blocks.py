"""The blocks of every T5 graph: norms, attention, feed-forward.

The residual stream and the normalised stream are passed together, because the runtime adds and normalises
in one operator.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sbs_edge.export.graphs.builder import CONTRIB, FLOAT, Graph, Value
from sbs_edge.export.graphs.weights import T5Weights
from sbs_edge.export.quant.precision import Precision

__all__ = ["HEAD", "LAST_NORM", "Stream", "Writer", "mask_bias"]

LAST_NORM = "decoder.final_layer_norm"
HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class Stream:
    """The residual sum (B, T, d_model) and its RMSNorm; ``norm`` is the name of the norm's weight."""

    residual: Value
    normed: Value
    norm: str


def mask_bias(graph: Graph, attention_mask: Value) -> Value:
    """Return (B, 1, 1, S) float32: 0 where attended, -1e9 where padded."""
    padded = graph.op("Cast", graph.op("Sub", np.int64(1), attention_mask), to=1)
    return str(graph.op("Unsqueeze", graph.op("Mul", padded, np.float32(-1e9)), np.array([1, 2], np.int64)))


class Writer:
    """Writes blocks of a checkpoint into a graph, in a given precision."""

    def __init__(self, graph: Graph, weights: T5Weights, precision: Precision) -> None:
        """Bind a graph, a checkpoint and a number format."""
        self.graph = graph
        self.weights = weights
        self.precision = precision

    def linear(self, x: Value, name: str, norm: str | None, *, relu: bool = False) -> Value:
        """Multiply ``x``, or with ``relu`` max(x, 0), by the weight ``name``."""
        weight = self.weights.linear(name)
        return self.precision.linear(self.graph, x, weight, norm=norm, site=name, relu=relu)

    def start(self, x: Value, norm: str) -> Stream:
        """Normalise a fresh residual stream."""
        y = self.graph.op(
            "RMSNormalization", x, self.weights.vector(norm), axis=-1, epsilon=self.weights.epsilon
        )
        return Stream(x, y, norm)

    def add(self, stream: Stream, update: Value, norm: str) -> Stream:
        """Add ``update`` to the residual and normalise the sum with the weight ``norm``."""
        graph = self.graph
        if not self.precision.contrib:
            return self.start(graph.op("Add", stream.residual, update), norm)
        normed, residual = graph.fresh("normed"), graph.fresh("residual")
        graph.named_outputs(
            "SkipSimplifiedLayerNormalization",
            [stream.residual, update, self.weights.vector(norm)],
            [normed, "", "", residual],
            domain=CONTRIB,
            epsilon=self.weights.epsilon,
        )
        return Stream(residual, normed, norm)

    def feed_forward(self, stream: Stream, prefix: str) -> Value:
        """Return the (gated) feed-forward's output."""
        graph = self.graph
        if self.weights.gated:
            gate = self._activate(self.linear(stream.normed, prefix + ".wi_0", stream.norm))
            hidden = graph.op("Mul", gate, self.linear(stream.normed, prefix + ".wi_1", stream.norm))
        else:
            hidden = self.linear(stream.normed, prefix + ".wi", stream.norm)
            if self.weights.activation == "relu":
                return self.linear(hidden, prefix + ".wo", None, relu=True)
            hidden = self._activate(hidden)
        return self.linear(hidden, prefix + ".wo", None)

    def _activate(self, x: Value) -> Value:
        graph = self.graph
        match self.weights.activation:
            case "relu":
                return str(graph.op("Relu", x))
            case "gelu_new" if not self.precision.contrib:
                return str(graph.op("Gelu", x, approximate="tanh"))
            case "gelu_new":
                return str(graph.op("FastGelu", x, domain=CONTRIB))
            case "gelu":
                return str(graph.op("Gelu", x))
            case _:
                return str(graph.op("Mul", x, graph.op("Sigmoid", x)))

    def projections(self, stream: Stream, prefix: str, names: str = "qkv") -> list[Value]:
        """Return the (B, T, H * d_kv) projections ``names`` of the normalised stream."""
        return [self.linear(stream.normed, f"{prefix}.{name}", stream.norm) for name in names]

    def heads(self, x: Value, length: int = 0) -> Value:
        """Turn (B, T, H * d_kv) into (B, H, T, d_kv); ``length`` 0 keeps T as it is."""
        shape = np.array([0, length, self.weights.n_heads, self.weights.d_kv], np.int64)
        return str(self.graph.op("Transpose", self.graph.op("Reshape", x, shape), perm=[0, 2, 1, 3]))

    def unheads(self, x: Value) -> Value:
        """Turn (B, H, T, d_kv) into (B, T, H * d_kv)."""
        turned = self.graph.op("Transpose", x, perm=[0, 2, 1, 3])
        return str(self.graph.op("Reshape", turned, np.array([0, 0, self.weights.inner], np.int64)))

    def widen(self, x: Value) -> Value:
        """Mark ``x``, and values computed from it, as float32 for graphs that are converted to half precision."""
        if self.precision.contrib:
            return x
        wide = self.graph.fresh("wide")
        self.graph.named_outputs("Cast", [x], [wide], to=FLOAT)
        return wide

    def attend(self, q: Value, k: Value, v: Value, bias: Value) -> Value:
        """Compute attention of (B, T, H * d_kv) inputs with an additive bias; T5 does not scale by d_kv ** -0.5."""
        if self._plain_attention:
            return self.unheads(self.attend_heads(self.heads(q), self.heads(k), self.heads(v), bias))
        heads = self.weights.n_heads
        return str(
            self.graph.op("Attention", q, k, v, bias, q_num_heads=heads, kv_num_heads=heads, scale=1.0)
        )

    def attend_heads(self, q: Value, k: Value, v: Value, bias: Value) -> Value:
        """Compute attention of (B, H, T, d_kv) inputs with an additive bias."""
        graph = self.graph
        if not self._plain_attention:
            return str(graph.op("Attention", q, k, v, bias, scale=1.0))
        products = graph.op("MatMul", q, graph.op("Transpose", k, perm=[0, 1, 3, 2]))
        shares = graph.op("Softmax", graph.op("Add", products, bias), axis=-1)
        return str(graph.op("MatMul", shares, v))

    @property
    def _plain_attention(self) -> bool:
        """Return whether to write attention in basic operators: TensorRT's fused kernels need multiples of 16 per head."""
        return not self.precision.contrib and self.weights.d_kv % 16 != 0

    def logits(self, normed: Value, columns: np.ndarray | None = None) -> Value:
        """Multiply the decoder's normalised output by the LM head, or by ``columns`` of it.

        A head that is the embedding's table is not stored again, if the number format allows this.
        """
        weights, graph = self.weights, self.graph
        if columns is None and weights.tied:
            scale = weights.logit_scale
            shared = self.precision.tied_head(graph, normed, weights.embedding, scale, norm=LAST_NORM)
            if shared is not None:
                return shared
        return self.precision.linear(graph, normed, self.head_weight(columns), norm=LAST_NORM, site=HEAD)

    def head_weight(self, columns: np.ndarray | None = None) -> np.ndarray:
        """Return (d_model, columns) of the LM head, with the decoder's output scale folded in."""
        head = self.weights.head if columns is None else self.weights.head[columns]
        return np.ascontiguousarray(head.T * np.float32(self.weights.logit_scale))
