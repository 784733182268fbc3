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

from collections.abc import Iterable
from typing import Literal, get_args

from sbs_edge.data.answers import same_answer
from sbs_edge.data.example import Example

__all__ = ["MODES", "Mode", "label_for", "rationale_for", "teacher_agreement"]

Mode = Literal["finetune", "distill", "stepwise", "stepwise-teacher"]
MODES: tuple[Mode, ...] = get_args(Mode)


def label_for(example: Example, mode: Mode) -> str | None:
    """Return the label that ``mode`` learns from ``example``, or None if the row has none."""
    return example.label if mode in ("finetune", "stepwise") else example.teacher_label


def rationale_for(example: Example, mode: Mode) -> str | None:
    """Return the rationale that ``mode`` learns from ``example``, or None."""
    return example.rationale if mode in ("stepwise", "stepwise-teacher") else None


def teacher_agreement(examples: Iterable[Example], compare: Literal["text", "value"]) -> dict[str, int]:
    """Count the rows in which gold and teacher labels are known, and those in which they agree."""
    total = equal = 0
    for example in examples:
        if example.label is not None and example.teacher_label is not None:
            total += 1
            equal += same_answer(example.label, example.teacher_label, compare)
    return {"equal": equal, "total": total}
