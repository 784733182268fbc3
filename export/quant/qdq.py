"""int8 for TensorRT: explicit, symmetric quantise/dequantise pairs around products with constant weights.

Each activation has a calibrated scale, each column of a weight has a scale, and zero points are 0, as its builder
requires. A product whose input was not measured stays in the graph's own float type.
"""

from __future__ import annotations

import numpy as np

from sbs_edge.export.graphs.builder import Graph, Value
from sbs_edge.export.quant.half import HalfType, numpy_half
from sbs_edge.export.quant.precision import rectified
from sbs_edge.export.quant.ranges import CalibrationStats

__all__ = ["Int8Pairs"]


class Int8Pairs:
    """Quantise/dequantise pairs in standard operators; see :class:`sbs_edge.export.quant.precision.Precision`."""

    contrib = False

    def __init__(self, stats: CalibrationStats, half: HalfType = "fp16") -> None:
        """Take calibrated ranges; scales are rounded up to numbers that ``half`` can hold."""
        self.stats = stats
        self.half = half

    def linear(
        self, graph: Graph, x: Value, weight: np.ndarray, *, norm: str | None, site: str | None = None,
        relu: bool = False,
    ) -> Value:  # fmt: skip
        """See :class:`Precision`."""
        weight = np.ascontiguousarray(weight, dtype=np.float32)
        x = rectified(graph, x, relu)
        largest = self.stats.norms.get(norm) if norm else self.stats.inputs.get(site or "")
        if not largest:
            return str(graph.op("MatMul", x, weight))
        step = self._representable(np.asarray(largest / 127.0, np.float32))

        def pair() -> Value:
            rounded = graph.op("QuantizeLinear", x, step, np.int8(0))
            return str(graph.op("DequantizeLinear", rounded, step, np.int8(0)))

        steps = self._representable(np.maximum(np.abs(weight).max(axis=0), 1e-5) / 127.0)
        quantised = np.clip(np.rint(weight / steps), -127, 127).astype(np.int8)
        columns = graph.op("DequantizeLinear", quantised, steps, np.zeros(len(steps), np.int8), axis=1)
        return str(graph.op("MatMul", graph.once(("pair", x, float(step)), pair), columns))

    def _representable(self, scale: np.ndarray) -> np.ndarray:
        """Return the next number of the half type at or above ``scale``, as float32."""
        kind = numpy_half(self.half)
        near = scale.astype(kind).astype(np.float32)
        bits = near.astype(kind).view(np.uint16) + np.uint16(1)
        above = bits.astype(np.uint16).view(kind).astype(np.float32)
        return np.asarray(np.where(near >= scale, near, above), np.float32)

    def embedding(self, graph: Graph, weight: np.ndarray, ids: Value) -> Value:
        """See :class:`Precision`; rows stay in the graph's float type."""
        return str(graph.op("Gather", np.asarray(weight, np.float32), ids))

    def tied_head(
        self, graph: Graph, x: Value, table: np.ndarray, scale: float, *, norm: str
    ) -> Value | None:
        """See :class:`sbs_edge.export.quant.precision.Precision`; TensorRT wants the head's own int8 weight."""
        del graph, x, table, scale, norm
        return None
