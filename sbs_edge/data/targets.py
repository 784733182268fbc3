"""Choose the label and the rationale that each training mode learns from a row.

========================  ===============  ==========
mode                      label            rationale
========================  ===============  ==========
``finetune``              gold             none
``distill``               teacher's        none
``stepwise``              gold             teacher's
``stepwise-teacher``      teacher's        teacher's
========================  ===============  ==========
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

from sbs_edge.data.answers import same_answer
from sbs_edge.data.example import Example

__all__ = ["MODES", "Mode", "label_for", "rationale_for", "rationales_for", "soft_label", "teacher_agreement"]

Mode = Literal["finetune", "distill", "stepwise", "stepwise-teacher"]
MODES: tuple[Mode, ...] = get_args(Mode)


def label_for(example: Example, mode: Mode) -> str | None:
    """Return the label that ``mode`` learns from ``example``, or None if the row has none."""
    return example.label if mode in ("finetune", "stepwise") else example.teacher_label


def rationale_for(example: Example, mode: Mode) -> str | None:
    """Return the rationale that ``mode`` learns from ``example``, or None."""
    return example.rationale if mode in ("stepwise", "stepwise-teacher") else None


def rationales_for(example: Example, mode: Mode) -> tuple[str, ...]:
    """Return every rationale that ``mode`` may learn from ``example``, the row's own first."""
    first = rationale_for(example, mode)
    if first is None:
        return ()
    return tuple(dict.fromkeys((first, *example.rationales)))


def soft_label(
    example: Example, label: str, known: Sequence[str], share: float, temperature: float = 1.0
) -> dict[str, float]:
    """Return the target distribution ``(1 - share) * onehot(label) + share * teacher``, ``label`` first.

    Args:
        example: the row; without ``teacher_probs`` all weight stays on ``label``.
        label: the hard label.
        known: the labels a student can give. What the teacher gave to others is cut off before its
            probabilities are divided by ``temperature`` in log space and normalised; empty: nothing is cut.
        share: in [0, 1].
        temperature: above 1 flattens the teacher's distribution, below 1 sharpens it.

    Example:
        >>> row = Example("1", "x", teacher_label="a", teacher_probs=(("a", 0.6), ("b", 0.2), ("z", 0.2)))
        >>> soft_label(row, "a", ["a", "b"], share=0.5)
        {'a': 0.875, 'b': 0.125}

    """
    allowed = set(known)
    kept = {name: p for name, p in example.teacher_probs if p > 0 and (not allowed or name in allowed)}
    if not kept or not share:
        return {label: 1.0}
    largest = max(kept.values())
    powers = {name: (p / largest) ** (1.0 / temperature) for name, p in kept.items()}
    total = sum(powers.values())
    target = {label: 1.0 - share}
    for name, power in powers.items():
        target[name] = target.get(name, 0.0) + share * power / total
    return target


def teacher_agreement(examples: Iterable[Example], compare: Literal["text", "value"]) -> dict[str, int]:
    """Count the rows in which gold and teacher labels are known, and those in which they agree."""
    total = equal = 0
    for example in examples:
        if example.label is not None and example.teacher_label is not None:
            total += 1
            equal += same_answer(example.label, example.teacher_label, compare)
    return {"equal": equal, "total": total}
