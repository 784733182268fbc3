"""Calibrate probabilities with a temperature fitted on validation rows (Guo et al. 2017)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sbs_edge.analysis.reliability import expected_calibration_error

__all__ = ["calibrate", "fit_temperature"]


def _log_probabilities(scores: np.ndarray, temperature: float) -> np.ndarray:
    scaled = scores.astype(np.float64) / temperature
    scaled -= scaled.max()
    return np.asarray(scaled - np.log(np.exp(scaled).sum()))


def fit_temperature(scores: Sequence[np.ndarray], gold: Sequence[int]) -> float:
    """Return the temperature in [0.05, 20] with the least smoothed negative log-likelihood.

    Args:
        scores: an array (K_i,) of scores for each row; K may differ between rows.
        gold: index of the right label in every row.

    The likelihood is unimodal in log T, so a golden-section search finds the maximum. As in Platt scaling, a share
    1 / (n + 2) of every target is spread over all labels: if every answer were right, the plain likelihood would
    be highest at certainty, whatever the number of rows.
    """
    smoothing = 1.0 / (len(scores) + 2)
    counts = np.array([len(row) for row in scores])
    table = np.full((len(scores), counts.max()), -np.inf)
    for place, row in enumerate(scores):
        table[place, : len(row)] = row
    table -= table.max(axis=1, keepdims=True)
    real, rows, right = np.isfinite(table), np.arange(len(scores)), np.asarray(gold)

    def loss(log_t: float) -> float:
        scaled = table / float(np.exp(log_t))
        log_p = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
        mean = np.where(real, log_p, 0.0).sum(axis=1) / counts
        return float(-((1.0 - smoothing) * log_p[rows, right] + smoothing * mean).mean())

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


def _confidence(scores: np.ndarray, temperature: float) -> float:
    return float(np.exp(_log_probabilities(scores, temperature)).max())


def _out_of_fold(scores: Sequence[np.ndarray], gold: Sequence[int]) -> np.ndarray:
    """Return (n,) confidences, each at the temperature fitted on the other half of the rows.

    Halves are drawn at random with a fixed seed, because rows may be sorted.
    """
    order = np.random.default_rng(0).permutation(len(scores))
    halves = order[: len(order) // 2], order[len(order) // 2 :]
    found = np.zeros(len(scores))
    for fitted_on, measured_on in (halves, halves[::-1]):
        temperature = fit_temperature([scores[i] for i in fitted_on], [gold[i] for i in fitted_on])
        for i in measured_on:
            found[i] = _confidence(scores[i], temperature)
    return found


def calibrate(scores: Sequence[np.ndarray], gold: Sequence[int]) -> dict[str, Any]:
    """Fit the temperature and return it with calibration error and accuracy against coverage.

    The temperature is fitted on all rows. ``ece_after`` is cross-fitted: the confidence of each row comes from the
    temperature of the other half of the rows (``ece_folds`` 2), so that no row tests a temperature that it helped to
    choose. It is None for a single row. ``coverage`` lists, for several thresholds, the share of rows with a
    confidence above the threshold, and the accuracy on them.
    """
    if not scores:
        return {"temperature": 1.0, "n": 0, "abstain_below": 0.0}
    temperature = fit_temperature(scores, gold)
    right = np.array([row.argmax() == g for row, g in zip(scores, gold, strict=True)])
    raw = np.array([_confidence(row, 1.0) for row in scores])
    fitted = np.array([_confidence(row, temperature) for row in scores])
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
        "ece_after": expected_calibration_error(_out_of_fold(scores, gold), right)
        if len(scores) > 1
        else None,
        "ece_folds": 2,
        "n": len(scores),
        "abstain_below": 0.0,
        "coverage": coverage,
    }
