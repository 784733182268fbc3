"""int4 weights by GPTQ (Frantar et al. 2023): round one input at a time and let the rest absorb the error.

Plain rounding to 4 bits changes a T5's logits by a fifth of their spread. With the second moments of the real inputs,
the error of every rounded row is compensated in the rows that are not rounded yet, weighted by their correlation.
"""

from __future__ import annotations

import numpy as np

__all__ = ["pack_int4", "quantise_int4", "unpack_int4"]

_DAMPING = 0.01  # share of the mean diagonal, as in the paper
_LEVELS = 8  # signed 4 bits: -8 .. 7
# Clipping the largest weight of a group can cost less than a coarse step for all its weights.
_SHRINK = np.array([1.0, 0.95, 0.9, 0.85, 0.8], np.float32)


def quantise_int4(
    weight: np.ndarray, moments: np.ndarray | None, group: int
) -> tuple[np.ndarray, np.ndarray]:
    """Round (in, out) float32 to 4 bits, with a scale for each ``group`` of inputs of a column.

    Args:
        weight: (in, out).
        moments: (in, in) sum of x x^T over calibration rows; None rounds to nearest.
        group: inputs that share a scale.

    Returns:
        (in, out) int8 of values -8..7, and (ceil(in / group), out) float32 scales.
    """
    n_in, n_out = weight.shape
    left = weight.astype(np.float32).copy()
    quantised = np.zeros((n_in, n_out), np.int8)
    scales = np.zeros((-(-n_in // group), n_out), np.float32)
    factor = None if moments is None else _factor(moments)
    importance = np.ones(n_in, np.float32) if moments is None else np.diag(moments).astype(np.float32) + 1e-12
    for low in range(0, n_in, group):
        high = min(low + group, n_in)
        scale = _scale(left[low:high], importance[low:high])
        scales[low // group] = scale
        errors = np.zeros((high - low, n_out), np.float32)
        for row in range(low, high):
            quantised[row] = np.clip(np.rint(left[row] / scale), -_LEVELS, _LEVELS - 1)
            if factor is None:
                continue
            errors[row - low] = (left[row] - quantised[row] * scale) / factor[row, row]
            left[row + 1 : high] -= np.outer(factor[row, row + 1 : high], errors[row - low])
        if factor is not None:
            left[high:] -= factor[low:high, high:].T @ errors
    return quantised, scales


def _factor(moments: np.ndarray) -> np.ndarray:
    """Return the upper Cholesky factor of the inverse of the damped moments."""
    damped = moments.astype(np.float64)
    dead = np.diag(damped) == 0
    damped[dead, dead] = 1.0
    damped += np.eye(len(damped)) * (_DAMPING * np.diag(damped).mean())
    inverse = np.linalg.inv(damped)
    return np.asarray(np.linalg.cholesky((inverse + inverse.T) / 2).T, np.float32)


def _scale(block: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Return (out,) scales: the signed extreme maps to -8, or less if that reduces the error."""
    extreme = np.take_along_axis(block, np.abs(block).argmax(axis=0)[None], axis=0)[0]
    full = np.where(extreme == 0, np.float32(1e-8), extreme / -_LEVELS).astype(np.float32)
    best, least = full, np.full(full.shape, np.inf, np.float32)
    for shrink in _SHRINK:
        scale = full * shrink
        error = block - np.clip(np.rint(block / scale), -_LEVELS, _LEVELS - 1) * scale
        cost = importance @ (error * error)
        best = np.where(cost < least, scale, best)
        least = np.minimum(cost, least)
    return np.asarray(best, np.float32)


def pack_int4(quantised: np.ndarray, scales: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ``MatMulNBits``' layout: (out, groups, group / 2) uint8 and (out, groups) float32.

    Inputs beyond the last whole group are filled with zeros; the operator adds 8 to every value.
    """
    n_in, n_out = quantised.shape
    groups = len(scales)
    full = np.zeros((groups * group, n_out), np.int8)
    full[:n_in] = quantised
    shifted = (full + _LEVELS).astype(np.uint8).T.reshape(n_out, groups, group)
    packed = np.asarray(shifted[..., 0::2] | (shifted[..., 1::2] << 4), np.uint8)
    return packed, np.ascontiguousarray(scales.T)


def unpack_int4(quantised: np.ndarray, scales: np.ndarray, group: int) -> np.ndarray:
    """Return the (in, out) float32 weight of the rounded values."""
    return np.asarray(quantised.astype(np.float32) * np.repeat(scales, group, axis=0)[: len(quantised)])
