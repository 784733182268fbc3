"""What every route turns a request into, and what every route builds its answer from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sbs_edge.serve import errors

__all__ = ["Answer", "InferenceRequest", "Timing", "check_labels"]


@dataclass(slots=True)
class InferenceRequest:
    """One request, checked for form but not yet against a model.

    ``labels`` is ``None`` or, for each text, the answers to choose from (tasks with choices).
    """

    texts: list[str]
    labels: list[list[str]] | None = None
    explain: bool = False
    want_label: bool = True
    truncate: bool | None = None
    max_new_tokens: int | None = None


@dataclass(slots=True)
class Answer:
    """One answered text; fields of the task that was not asked for stay empty.

    ``probability`` and ``probabilities`` are the student's. Where the label is the larger model's (``escalated``)
    there are none, and ``student`` holds the student's own label and figures. The rationale is always the student's.
    """

    label: str | None = None
    probability: float | None = 0.0
    probabilities: Mapping[str, float] = field(default_factory=dict)
    abstained: bool = False
    escalated: bool = False
    truncated: bool = False
    rationale: str | None = None
    rationale_complete: bool = False
    student: Mapping[str, Any] | None = None

    def take_over(self, label: str) -> None:
        """Take the larger model's ``label``; the student's figures say nothing about it and move to ``student``."""
        self.student = {
            "label": self.label,
            "probability": self.probability,
            "probabilities": dict(self.probabilities),
        }
        self.label, self.probability, self.probabilities = label, None, {}
        self.escalated, self.abstained = True, False


@dataclass(slots=True)
class Timing:
    """Seconds spent on one request, stage by stage."""

    tokenize_s: float = 0.0
    queue_s: float = 0.0
    inference_s: float = 0.0
    escalate_s: float = 0.0


MAX_LABELS = 256  # of one text
MAX_LABEL_CHARACTERS = 1000


def check_labels(labels: Sequence[Sequence[str]], n_texts: int) -> None:
    """Raise 400 unless there is a list of 2 to 256 distinct, non-empty answers for each text."""
    if len(labels) != n_texts:
        raise errors.bad_request(f"labels has {len(labels)} lists for {n_texts} texts; send one for each.")
    for index, choices in enumerate(labels):
        if len(choices) < 2 or len(set(choices)) != len(choices) or not all(choices):
            raise errors.bad_request(f"labels[{index}] needs at least two different, non-empty answers.")
        if len(choices) > MAX_LABELS:
            raise errors.bad_request(
                f"labels[{index}] has {len(choices)} answers; the limit is {MAX_LABELS} for each text."
            )
        longest = max(map(len, choices))
        if longest > MAX_LABEL_CHARACTERS:
            raise errors.bad_request(
                f"labels[{index}] has an answer of {longest} characters; the limit is {MAX_LABEL_CHARACTERS}."
            )
