"""Answers of a student, and their JSON form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Explanation", "Prediction", "answer_document", "prediction_of", "probabilities_of"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """A label with its probability, from :meth:`Student.predict`.

    Attributes:
        label: the answer.
        probability: calibrated probability of ``label`` among the possible labels; for an open
            label, the probability of its tokens.
        probabilities: the same for every label; for an open label, only the answer.
        abstained: the probability is below the bundle's (or the call's) ``abstain_below``.
        truncated: the input was longer than the limit and cut, as the caller allowed.
        n_input_tokens: tokens read, prefix and end-of-sequence included.
        n_chunks: chunks the input was read in: 1, or more where it was over ``max_source_tokens``.
    """

    label: str
    probability: float
    probabilities: dict[str, float]
    abstained: bool
    truncated: bool
    n_input_tokens: int
    n_chunks: int = 1


@dataclass(frozen=True, slots=True)
class Explanation:
    """A rationale, from :meth:`Student.explain`.

    Attributes:
        rationale: the text.
        n_tokens: tokens written, end-of-sequence included.
        truncated: the input was longer than the limit and cut, as the caller allowed.
        complete: the student ended by itself, before the limit of new tokens.
        n_input_tokens: tokens read, prefix and end-of-sequence included.
        n_chunks: chunks the input was read in: 1, or more where it was over ``max_source_tokens``.
    """

    rationale: str
    n_tokens: int
    truncated: bool
    complete: bool
    n_input_tokens: int
    n_chunks: int = 1


def answer_document(prediction: Any, explanation: Any = None) -> dict[str, Any]:
    """Return the JSON document of an answer: a prediction, and an explanation if there is one.

    ``n_chunks`` is there only for an input that was read in more than one chunk.

    Args:
        prediction: a :class:`Prediction`, or ``None`` where only the rationale was asked for.
        explanation: an :class:`Explanation`, or ``None``.

    Example:
        >>> answer_document(None, Explanation("it is cold", 4, False, True, 9))
        {'rationale': 'it is cold', 'rationale_complete': True}
    """
    document: dict[str, Any] = {}
    if prediction is not None:
        document = {
            "label": prediction.label,
            "probability": prediction.probability,
            "probabilities": prediction.probabilities,
            "abstained": prediction.abstained,
            "truncated": prediction.truncated,
        }
    if explanation is not None:
        document["rationale"] = explanation.rationale
        document["rationale_complete"] = explanation.complete
    n_chunks = max(getattr(answer, "n_chunks", 1) for answer in (prediction, explanation))
    if n_chunks > 1:
        document["n_chunks"] = n_chunks
    return document


def probabilities_of(scores: np.ndarray, temperature: float) -> np.ndarray:
    """Return the softmax of ``scores`` (K,), divided by ``temperature``, in float64."""
    scaled = scores.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    normalised: np.ndarray = weights / weights.sum()
    return normalised


def prediction_of(
    labels: Sequence[str],
    scores: np.ndarray,  # (K,), one for each label
    temperature: float,
    abstain_below: float,
    truncated: bool,
    n_tokens: int,
    n_chunks: int = 1,
) -> Prediction:
    """Return the answer behind the scores of one text."""
    weights = probabilities_of(scores, temperature)
    best = int(weights.argmax())
    probability = float(weights[best])
    return Prediction(
        labels[best],
        probability,
        {label: float(weight) for label, weight in zip(labels, weights, strict=True)},
        probability < abstain_below,
        truncated,
        n_tokens,
        n_chunks,
    )
