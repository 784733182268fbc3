"""The parsed form of a request, shared by every route, and the times measured while it is answered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sbs_edge.serve import errors

__all__ = ["InferenceRequest", "Timing", "check_labels"]


@dataclass(slots=True)
class InferenceRequest:
    """A request whose form has been checked, but not against a model yet.

    ``labels`` is ``None`` or, for each text, the answers to choose from (tasks with choices).
    """

    texts: list[str]
    labels: list[list[str]] | None = None
    explain: bool = False
    want_label: bool = True
    truncate: bool | None = None
    max_new_tokens: int | None = None
    model: str | None = None
    version: str | None = None


@dataclass(slots=True)
class Timing:
    """Seconds spent on each stage of a request."""

    tokenize_s: float = 0.0
    queue_s: float = 0.0
    inference_s: float = 0.0
    escalate_s: float = 0.0


MAX_LABELS = 256  # of one text
MAX_LABEL_CHARACTERS = 1000


def check_labels(labels: Sequence[Sequence[str]], n_texts: int) -> None:
    """Raise 400 unless there is a list of 2 to 256 distinct, non-empty labels for each text."""
    if len(labels) != n_texts:
        raise errors.bad_request(f"labels has {len(labels)} lists for {n_texts} texts; send one for each.")
    for index, choices in enumerate(labels):
        if len(choices) < 2 or len(set(choices)) != len(choices) or not all(choices):
            raise errors.bad_request(f"labels[{index}] needs at least two different, non-empty labels.")
        if len(choices) > MAX_LABELS:
            raise errors.bad_request(
                f"labels[{index}] has {len(choices)} labels; the limit is {MAX_LABELS} for each text."
            )
        longest = max(map(len, choices))
        if longest > MAX_LABEL_CHARACTERS:
            raise errors.bad_request(
                f"labels[{index}] has a label of {longest} characters; the limit is {MAX_LABEL_CHARACTERS}."
            )
