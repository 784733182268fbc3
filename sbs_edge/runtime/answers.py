"""The answers of a student."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Explanation", "Prediction"]


@dataclass(frozen=True, slots=True)
class Prediction:
    """A label with its probability, from :meth:`Student.predict`.

    Attributes:
        label: the answer.
        probability: calibrated probability of ``label`` among the labels asked about; for an open
            label, the probability of its tokens.
        probabilities: the same for every label; for an open label, only the answer.
        abstained: the probability is below the bundle's (or the call's) ``abstain_below``.
        truncated: the input was longer than the limit and cut, as the caller allowed.
        n_input_tokens: tokens read, prefix and end-of-sequence included.
    """

    label: str
    probability: float
    probabilities: dict[str, float]
    abstained: bool
    truncated: bool
    n_input_tokens: int


@dataclass(frozen=True, slots=True)
class Explanation:
    """A rationale, from :meth:`Student.explain`.

    Attributes:
        rationale: the text.
        n_tokens: tokens written, end-of-sequence included.
        truncated: the input was longer than the limit and cut, as the caller allowed.
        complete: the student ended by itself, before the limit of new tokens.
        n_input_tokens: tokens read, prefix and end-of-sequence included.
    """

    rationale: str
    n_tokens: int
    truncated: bool
    complete: bool
    n_input_tokens: int
