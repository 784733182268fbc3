"""Intervals of 95 % for an accuracy, and for the difference of two on the same rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["accuracy_of", "gain_of"]

RESAMPLES = 10_000
_Z = 1.959964  # the 97.5th percentile of the normal distribution


def accuracy_of(right: Sequence[bool]) -> dict[str, Any]:
    """Return an accuracy with its Wilson interval, which holds for few rows and for 0 and 100 % too.

    Args:
        right: (n,) whether each answer is right.

    Returns:
        ``n``, ``accuracy``, and the ends ``low`` and ``high`` of its 95 % interval, as shares; None without rows.

    Example:
        >>> accuracy_of([True] * 8 + [False] * 2)
        {'n': 10, 'accuracy': 0.8, 'low': 0.4902, 'high': 0.9433}

    """
    n = len(right)
    if not n:
        return {"n": 0, "accuracy": None, "low": None, "high": None}
    share = sum(map(bool, right)) / n
    middle = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    return {"n": n, "accuracy": share, "low": round(low, 4), "high": round(high, 4)}


def gain_of(right: Sequence[bool], baseline_right: Sequence[bool]) -> dict[str, Any]:
    """Return by how many points of accuracy one student is ahead of another on the same rows.

    Args:
        right: (n,) whether the student's answer to each row is right.
        baseline_right: (n,) the same of the student it is compared with.

    Returns:
        ``points``, the ends ``low`` and ``high`` of its 95 % interval, and ``n``. The interval is the
        percentile interval of a paired bootstrap: whole rows are drawn again, with both answers.

    """
    difference = np.asarray(right, float) - np.asarray(baseline_right, float)
    # Drawing rows again is drawing from their three values.
    shares = [float((difference == value).mean()) for value in (-1, 0, 1)]
    draws = np.random.default_rng(0).multinomial(len(difference), shares, RESAMPLES)
    means = 100 * (draws[:, 2] - draws[:, 0]) / len(difference)
    low, high = np.percentile(means, (2.5, 97.5))
    return {
        "points": round(float(100 * difference.mean()), 2),
        "low": round(float(low), 2),
        "high": round(float(high), 2),
        "n": len(difference),
    }
