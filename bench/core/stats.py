"""Percentiles and ratios with their spread. Needs numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Ratio", "paired_ratio", "percentiles", "unpaired_ratio"]

RESAMPLES = 2000


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio and its 95 % bootstrap interval; ``low == high == value`` with a single round."""

    value: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        return f"{self.value:.2f}x ({self.low:.2f} to {self.high:.2f})"


def percentiles(samples: Sequence[float], levels: Sequence[float] = (50, 90, 99)) -> dict[str, float]:
    """Return ``{"p50": ..., ...}`` by linear interpolation, as :func:`numpy.percentile` does."""
    found = np.percentile(np.asarray(samples, dtype=np.float64), levels)
    return {f"p{level:g}": float(value) for level, value in zip(levels, found, strict=True)}


def _interval(statistics: np.ndarray, value: float, rounds: int) -> Ratio:
    low, high = np.percentile(statistics, (2.5, 97.5))
    return Ratio(float(value), float(low), float(high), rounds)


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float], *, seed: int = 0) -> Ratio:
    """Return the ratio of medians over interleaved rounds, which are resampled together.

    Args:
        numerator: one value per round (the peer).
        denominator: one value per round, of the same rounds (the system that the ratio describes).
        seed: seed of the resampling.

    A slow minute affects both systems of a round, so pairs are drawn instead of single values.

    Raises:
        ValueError: the lengths differ, or there is no round.
    """
    top, bottom = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    if top.shape != bottom.shape or top.ndim != 1 or not len(top):
        raise ValueError(f"paired rounds are needed, found {top.shape} and {bottom.shape}")
    value = np.median(top) / np.median(bottom)
    picks = np.random.default_rng(seed).integers(0, len(top), (RESAMPLES, len(top)))
    return _interval(np.median(top[picks], axis=1) / np.median(bottom[picks], axis=1), value, len(top))


def unpaired_ratio(numerator: Sequence[float], denominator: Sequence[float], *, seed: int = 0) -> Ratio:
    """Return the ratio of medians of two separate runs; each side is resampled separately.

    Raises:
        ValueError: a side is empty.
    """
    top, bottom = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    if not len(top) or not len(bottom):
        raise ValueError("each side needs at least one round")
    rng = np.random.default_rng(seed)
    upper = np.median(top[rng.integers(0, len(top), (RESAMPLES, len(top)))], axis=1)
    lower = np.median(bottom[rng.integers(0, len(bottom), (RESAMPLES, len(bottom)))], axis=1)
    return _interval(upper / lower, np.median(top) / np.median(bottom), min(len(top), len(bottom)))
