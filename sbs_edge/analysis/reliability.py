"""Reliability: how often answers of a given confidence are right."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["expected_calibration_error", "reliability"]

N_BINS = 15


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the mean gap between confidence and accuracy over 15 equal-width bins, weighted by rows.

    Args:
        confidence: (n,) probabilities of the answers given.
        right: (n,) whether they are right.

    """
    return float(
        sum(
            item["n"] * abs(item["confidence"] - item["accuracy"])
            for item in reliability(confidence, right)["bins"]
        )
        / max(len(confidence), 1)
    )


def reliability(confidence: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Return the bins that hold an answer, of 15 of equal width, with the rows, mean confidence and accuracy of each.

    Args:
        confidence: (n,) probabilities of the answers given.
        right: (n,) whether they are right.

    """
    bins = np.minimum((confidence * N_BINS).astype(int), N_BINS - 1)
    return {
        "n": len(confidence),
        "bins": [
            {
                "low": round(k / N_BINS, 4),
                "high": round((k + 1) / N_BINS, 4),
                "n": int((bins == k).sum()),
                "confidence": float(confidence[bins == k].mean()),
                "accuracy": float(right[bins == k].mean()),
            }
            for k in range(N_BINS)
            if (bins == k).any()
        ],
    }
