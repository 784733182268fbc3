"""Rescale a checkpoint so that it computes the same with smaller numbers and fp16 cannot overflow.

T5 does not normalise its residual stream itself, so in fp16 the feed-forward's output and the stream overflow
(65504). The stream is only read through RMSNorms, which cancel a common factor. So dividing the embeddings and all
updates of the stream by a power of two s, and the norms' epsilon by s squared, changes exponents but no mantissa bit.
The hidden layer of the feed-forward is divided in the same way, through its linear factor (relu, or the gate's other
factor). The LM head reads a norm and keeps its weights.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from sbs_edge.export.graphs.weights import T5Weights
from sbs_edge.export.quant.ranges import CalibrationStats

__all__ = ["Rescale", "fp16_rescale", "rescale"]

# Other rows may have larger values than the calibration rows: three bits of headroom.
FP16_LIMIT = 65504.0 / 8.0


@dataclasses.dataclass(frozen=True, slots=True)
class Rescale:
    """Powers of two: the residual stream is divided by ``residual``, the hidden layer by ``hidden``."""

    residual: float = 1.0
    hidden: float = 1.0


def fp16_rescale(stats: CalibrationStats, weights: T5Weights) -> Rescale:
    """Return the smallest powers of two that keep measured values 8 times below fp16's end.

    They are no larger than needed, because smaller weights would lose bits below fp16's smallest normal number.
    """

    def power(largest: float) -> float:
        return 2.0 ** max(0, math.ceil(math.log2(max(largest, 1e-30) / FP16_LIMIT)))

    linear_half = weights.gated or weights.activation == "relu"
    hidden = power(stats.largest_hidden) if linear_half else 1.0
    return Rescale(max(power(stats.largest_residual), hidden), hidden)


def rescale(weights: T5Weights, by: Rescale) -> T5Weights:
    """Return the checkpoint divided by the factors of ``by``; its logits are the same, bit for bit in float32."""
    if by == Rescale():
        return weights
    for value in (by.residual, by.hidden):
        if math.frexp(value)[0] != 0.5 or value < 1:
            raise ValueError(f"rescaling is exact for powers of two from 1 on, not {value}")
    arrays = {}
    for name, array in weights.arrays.items():
        factor = 1.0
        if name == "shared.weight" or name.endswith(("embed_tokens.weight", "Attention.o.weight")):
            factor = by.residual
        elif name.endswith(".wo.weight"):
            factor = by.residual / by.hidden
        elif name.endswith((".wi.weight", ".wi_1.weight")):
            factor = by.hidden
        arrays[name] = array / np.float32(factor) if factor != 1.0 else array
    return dataclasses.replace(weights, arrays=arrays, epsilon=weights.epsilon / by.residual**2)
