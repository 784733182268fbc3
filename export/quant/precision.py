"""Matrix products with constant weights in plain float32 or batch-invariant int8.

Only products with constant weights are quantised. QK and PV stay in float: quantising them would make
a generated token more expensive the longer the input is, without a gain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from sbs_edge.export.graphs.builder import CONTRIB, FLOAT, Graph, Value

__all__ = ["Float32", "Int8", "Precision", "quantise_columns", "quantise_rows", "rectified", "turned"]


class Precision(Protocol):
    """The interface between the graphs' blocks and a number format.

    Attributes:
        contrib: whether onnxruntime's own operators may be used besides the standard ones.
    """

    contrib: bool

    def linear(
        self, graph: Graph, x: Value, weight: np.ndarray, *, norm: str | None, site: str | None = None,
        relu: bool = False,
    ) -> Value:  # fmt: skip
        """Multiply (..., in) by a constant (in, out).

        Args:
            graph: the graph to add to.
            x: the input.
            weight: (in, out) float32.
            norm: the RMSNorm that computed ``x``, if any.
            site: the checkpoint's name of the weight, if it is in the checkpoint.
            relu: multiply max(x, 0) instead; rounding to unsigned integers can do both in one step.
        """
        ...

    def embedding(self, graph: Graph, weight: np.ndarray, ids: Value) -> Value:
        """Look up rows of a constant (V, d)."""
        ...

    def tied_head(
        self, graph: Graph, x: Value, table: np.ndarray, scale: float, *, norm: str
    ) -> Value | None:
        """Multiply (..., d) by the transpose of the (V, d) ``table`` that :meth:`embedding` stores, times ``scale``.

        Returns:
            (..., V), or None if this format must store the product's weight separately.
        """
        ...


class Float32:
    """All products in float32."""

    def __init__(self, *, contrib: bool = True) -> None:
        """Write for onnxruntime, or with ``contrib=False`` in standard operators only."""
        self.contrib = contrib

    def linear(
        self, graph: Graph, x: Value, weight: np.ndarray, *, norm: str | None, site: str | None = None,
        relu: bool = False,
    ) -> Value:  # fmt: skip
        """See :class:`Precision`."""
        del norm, site
        x = rectified(graph, x, relu)
        return str(graph.op("MatMul", x, np.ascontiguousarray(weight, dtype=np.float32)))

    def embedding(self, graph: Graph, weight: np.ndarray, ids: Value) -> Value:
        """See :class:`Precision`."""
        return str(graph.op("Gather", np.asarray(weight, dtype=np.float32), ids))

    def tied_head(
        self, graph: Graph, x: Value, table: np.ndarray, scale: float, *, norm: str
    ) -> Value | None:
        """See :class:`Precision`; graphs in standard operators, for other runtimes, store a weight for each product."""
        del norm
        if not self.contrib:
            return None
        if scale != 1.0:
            x = graph.op("Mul", x, np.float32(scale))
        return str(graph.op("MatMul", x, turned(graph, np.asarray(table, dtype=np.float32))))


def turned(graph: Graph, table: np.ndarray) -> Value:
    """Return (d, V) of a constant (V, d) that is stored once; onnxruntime transposes it while it loads the graph.

    The transpose is in the graph that uses it, which may be a loop's body. When it is folded there, its result is an
    initialiser of the body, which the runtime's passes over int8 weights reach.
    """
    table_of = graph.constant(table)
    return str(graph.once(("turned", table_of), lambda: graph.op("Transpose", table_of, perm=[1, 0])))


def rectified(graph: Graph, x: Value, relu: bool) -> Value:
    """Return max(x, 0) if ``relu``, else ``x``."""
    return str(graph.op("Relu", x)) if relu else x


def quantise_columns(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round (in, out) to int8 with a symmetric scale for each column; return (int8, (out,) float32 scales)."""
    scale = np.maximum(np.abs(weight).max(axis=0), 1e-12) / 127.0
    return np.clip(np.rint(weight / scale), -127, 127).astype(np.int8), scale.astype(np.float32)


def quantise_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Round (V, d) to int8 with a symmetric scale for each row; return (int8, (V, 1) float32 scales)."""
    quantised, scale = quantise_columns(weight.T)
    return np.ascontiguousarray(quantised.T), scale[:, None]


class Int8:
    """int8 weights with a scale per column, and int8 activations whose scale does not depend on other rows.

    After an RMSNorm values are bounded, so a constant, calibrated scale serves every row. Everywhere
    else (after attention, after the activation) each row has its own scale. A scale of the whole
    tensor would be a little faster, but an answer would depend on the other rows of its batch.
    """

    contrib = True

    def __init__(self, norm_ranges: Mapping[str, float]) -> None:
        """Take the largest magnitude after every norm; a norm without one gets a scale per row."""
        self.norm_ranges = norm_ranges

    def linear(
        self, graph: Graph, x: Value, weight: np.ndarray, *, norm: str | None, site: str | None = None,
        relu: bool = False,
    ) -> Value:  # fmt: skip
        """See :class:`Precision`."""
        quantised, scales = quantise_columns(np.asarray(weight, np.float32))
        if relu:
            return self._rectified(graph, x, quantised, scales, many=(site or "").startswith("encoder."))
        return self._signed(graph, x, quantised, scales, norm)

    def _signed(
        self, graph: Graph, x: Value, quantised: np.ndarray | Value, scales: np.ndarray, norm: str | None
    ) -> Value:
        """Multiply (..., in) by an int8 (in, out) with a scale per column."""
        largest = self.norm_ranges.get(norm) if norm is not None else None
        if largest is not None:
            step = np.float32(max(largest, 1e-6) / 127.0)
            rounded = graph.once(("rounded", x), lambda: graph.op("QuantizeLinear", x, step, np.uint8(128)))
            return self._product(graph, rounded, step, quantised, scales, np.uint8(128))
        unit = np.float32(1.0 / 127.0)

        def by_row() -> tuple[Value, Value]:
            size = graph.op("ReduceMax", graph.op("Abs", x), np.array([-1], np.int64), keepdims=1)
            size = graph.op("Max", size, np.float32(1e-12))
            return graph.op("QuantizeLinear", graph.op("Div", x, size), unit, np.uint8(128)), size

        rounded, size = graph.once(("rounded", x), by_row)
        return str(
            graph.op("Mul", self._product(graph, rounded, unit, quantised, scales, np.uint8(128)), size)
        )

    def _rectified(
        self, graph: Graph, x: Value, weight: np.ndarray, scales: np.ndarray, *, many: bool
    ) -> Value:
        """Multiply max(x, 0): with zero point 0, rounding to unsigned integers sets negative numbers to 0.

        The remaining values have no sign, so a row has 255 steps instead of 127, and its largest value
        needs no absolute values.

        Args:
            graph: the graph to add to.
            x: (..., in).
            weight: (in, out) int8.
            scales: (out,) float32.
            many: whether ``x`` has so many rows that a pass over it costs more than two small operators.
        """
        one, zero = np.float32(1.0), np.uint8(0)
        flat = graph.op("Reshape", x, np.array([-1, weight.shape[0]], np.int64)) if many else x
        largest = graph.op("ReduceMax", flat, np.array([-1], np.int64), keepdims=1)
        step = graph.op("Max", graph.op("Mul", largest, np.float32(1.0 / 255.0)), np.float32(1e-12))
        if not many:
            rounded = graph.op("QuantizeLinear", graph.op("Div", x, step), one, zero)
            return str(graph.op("Mul", self._product(graph, rounded, one, weight, scales, zero), step))
        by_row = graph.op("Reshape", step, np.array([-1], np.int64))
        rounded = graph.op("QuantizeLinear", flat, by_row, axis=0)
        product = graph.op("Mul", self._product(graph, rounded, one, weight, scales, zero), step)
        width = np.array([weight.shape[1]], np.int64)
        return str(
            graph.op("Reshape", product, graph.op("Concat", graph.op("Shape", x, end=-1), width, axis=0))
        )

    @staticmethod
    def _product(
        graph: Graph, x: Value, step: np.float32, weight: np.ndarray | Value, scales: np.ndarray,
        zero: np.uint8,
    ) -> Value:  # fmt: skip
        return str(graph.op("MatMulIntegerToFloat", x, weight, step, scales, zero, domain=CONTRIB))

    def embedding(self, graph: Graph, weight: np.ndarray, ids: Value) -> Value:
        """See :class:`Precision`."""
        quantised, scales = quantise_rows(np.asarray(weight, np.float32))
        rows = graph.op("Cast", graph.op("Gather", quantised, ids), to=FLOAT)
        return str(graph.op("Mul", rows, graph.op("Gather", scales, ids)))

    def tied_head(
        self, graph: Graph, x: Value, table: np.ndarray, scale: float, *, norm: str
    ) -> Value | None:
        """See :class:`Precision`; the scale of a row of the embedding is that of a column of the head."""
        quantised, scales = quantise_rows(np.asarray(table, np.float32))
        return self._signed(graph, x, turned(graph, quantised), scales[:, 0] * np.float32(scale), norm)
