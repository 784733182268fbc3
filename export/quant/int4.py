"""4-bit weights for the decoder's steps, whose cost is reading the weights.

Only steps gain. With many rows a product is limited by arithmetic, so the encoder stays in int8.
"""

from __future__ import annotations

import numpy as np

from sbs_edge.export.graphs.blocks import HEAD
from sbs_edge.export.graphs.builder import CONTRIB, Graph, Value
from sbs_edge.export.quant.gptq import pack_int4, quantise_int4
from sbs_edge.export.quant.precision import Int8, rectified
from sbs_edge.export.quant.ranges import CalibrationStats

__all__ = ["GROUP", "Int4"]

GROUP = 128
_INT8_ACTIVATIONS = (
    4  # MatMulNBits' accuracy_level: inputs rounded to int8 by block of a row, which is batch-invariant
)


class Int4:
    """Calibrated 4-bit products; see :class:`sbs_edge.export.quant.precision.Precision`.

    A product without calibration runs in int8; plain rounding to 4 bits is never used.
    """

    contrib = True

    def __init__(self, stats: CalibrationStats, group: int = GROUP) -> None:
        """Take second moments of inputs.

        Args:
            stats: calibration with moments.
            group: inputs that share a scale.
        """
        self.stats = stats
        self.group = group
        self.fallback = Int8(stats.norms)

    def linear(
        self, graph: Graph, x: Value, weight: np.ndarray, *, norm: str | None, site: str | None = None,
        relu: bool = False,
    ) -> Value:  # fmt: skip
        """See :class:`Precision`."""
        moments = self.stats.moments.get(site or "")
        if moments is None:
            return self.fallback.linear(graph, x, weight, norm=norm, site=site, relu=relu)
        x = rectified(graph, x, relu)
        packed, scales = pack_int4(
            *quantise_int4(np.asarray(weight, np.float32), moments, self.group), self.group
        )
        return str(
            graph.op(
                "MatMulNBits", x, packed, scales, domain=CONTRIB, K=weight.shape[0], N=weight.shape[1], bits=4,
                block_size=self.group, accuracy_level=_INT8_ACTIVATIONS,
            )
        )  # fmt: skip

    def embedding(self, graph: Graph, weight: np.ndarray, ids: Value) -> Value:
        """See :class:`Precision`."""
        return self.fallback.embedding(graph, weight, ids)

    def tied_head(
        self, graph: Graph, x: Value, table: np.ndarray, scale: float, *, norm: str
    ) -> Value | None:
        """See :class:`sbs_edge.export.quant.precision.Precision`; a calibrated head has 4 bits and its own storage."""
        if HEAD in self.stats.moments:
            return None
        return self.fallback.tied_head(graph, x, table, scale, norm=norm)
