"""Probabilities that mean what they say: a temperature fitted on validation rows (Guo et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["calibrate", "expected_calibration_error", "fit_temperature"]

N_BINS = 15


def _log_probabilities(scores: np.ndarray, temperature: float) -> np.ndarray:
    scaled = scores.astype(np.float64) / temperature
    scaled -= scaled.max()
    return np.asarray(scaled - np.log(np.exp(scaled).sum()))


def fit_temperature(scores: Sequence[np.ndarray], gold: Sequence[int]) -> float:
    """Return the temperature in [0.05, 20] with the least smoothed negative log-likelihood.

    Args:
        scores: one (K_i,) array of scores a row; K may differ between rows.
        gold: index of the right label in every row.

    The likelihood is unimodal in log T, so a golden-section search finds it. As in Platt's scaling, a share
    1 / (n + 2) of every target goes to all labels alike: where every row is answered right the plain
    likelihood would ask for certainty, whatever the number of rows.
    """
    smoothing = 1.0 / (len(scores) + 2)

    def loss(log_t: float) -> float:
        t = float(np.exp(log_t))
        total = 0.0
        for row, right in zip(scores, gold, strict=True):
            log_p = _log_probabilities(row, t)
            total -= (1.0 - smoothing) * log_p[right] + smoothing * log_p.mean()
        return total / len(scores)

    low, high = np.log(0.05), np.log(20.0)
    ratio = (np.sqrt(5.0) - 1.0) / 2.0
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    loss_a, loss_b = loss(a), loss(b)
    for _ in range(40):
        if loss_a <= loss_b:
            high, b, loss_b = b, a, loss_a
            a = high - ratio * (high - low)
            loss_a = loss(a)
        else:
            low, a, loss_a = a, b, loss_b
            b = low + ratio * (high - low)
            loss_b = loss(b)
    return float(np.exp((low + high) / 2))


def expected_calibration_error(confidence: np.ndarray, right: np.ndarray) -> float:
    """Return the mean gap between confidence and accuracy over 15 equal-width bins, weighted by rows."""
    bins = np.minimum((confidence * N_BINS).astype(int), N_BINS - 1)
    return float(
        sum(
            abs(confidence[bins == k].mean() - right[bins == k].mean()) * (bins == k).mean()
            for k in range(N_BINS)
            if (bins == k).any()
        )
    )


def calibrate(scores: Sequence[np.ndarray], gold: Sequence[int]) -> dict[str, Any]:
    """Fit the temperature and return it with calibration error and accuracy against coverage.

    ``coverage`` lists, for a number of thresholds, the share of rows answered when rows below the
    threshold are passed on, and the accuracy on those answered.
    """
    if not scores:
        return {"temperature": 1.0, "n": 0, "abstain_below": 0.0}
    temperature = fit_temperature(scores, gold)

    def confidence(t: float) -> tuple[np.ndarray, np.ndarray]:
        rows = [np.exp(_log_probabilities(s, t)) for s in scores]
        return (
            np.array([row.max() for row in rows]),
            np.array([row.argmax() == g for row, g in zip(rows, gold, strict=True)]),
        )

    raw, right = confidence(1.0)
    fitted, _ = confidence(temperature)
    order = np.argsort(-fitted, kind="stable")
    coverage = []
    for share in (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5):
        kept = order[: max(1, round(share * len(order)))]
        coverage.append(
            {
                "coverage": len(kept) / len(order),
                "accuracy": float(right[kept].mean()),
                "threshold": float(fitted[kept].min()),
            }
        )
    return {
        "temperature": temperature,
        "ece_before": expected_calibration_error(raw, right),
        "ece_after": expected_calibration_error(fitted, right),
        "n": len(scores),
        "abstain_below": 0.0,
        "coverage": coverage,
    }
