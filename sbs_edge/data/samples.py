"""Rows worth reading before training: those that checks complain of, the worst first, and some drawn at random."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sbs_edge.data.answers import same_answer
from sbs_edge.data.example import Example, Splits
from sbs_edge.data.finding import Finding, learnt_label, parts
from sbs_edge.data.rationale_checks import CHECKED_ROWS, COPIED_SHARE, SHORT_WORDS, traits_of
from sbs_edge.data.targets import Mode

__all__ = ["samples_to_read"]

SHOWN_SAMPLES = 20
MOST_ALIKE = 5  # samples with the same complaints
AT_RANDOM = 5
_WEIGHT = {"stop": 3.0, "warn": 2.0}


@dataclass(slots=True)
class _Suspect:
    split: str
    row: Example
    weight: float = 0.0
    kinds: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    other: str | None = None

    def add(self, kind: str, weight: float, reason: str) -> None:
        self.kinds.append(kind)
        self.reasons.append(reason)
        self.weight += weight


def samples_to_read(
    splits: Splits, findings: Sequence[Finding], mode: Mode | None, seed: int = 0
) -> list[dict[str, Any]]:
    """Return up to 20 rows with what is suspicious about them, the worst first, then five drawn at random.

    The first 20,000 rows of each split are read, and those that findings name. At most five rows have the same
    complaints, so that one fault does not hide the others.
    """
    named = {place for finding in findings for place in (*finding.rows, *finding.others)}
    suspects = {
        place: _Suspect(name, row)
        for name, rows in parts(splits)
        for number, row in enumerate(rows)
        if number < CHECKED_ROWS or (row.source or row.id) in named
        for place in (row.source or row.id,)
    }
    for finding in findings:
        others = finding.others or ("",) * len(finding.rows)
        for place, other in zip(finding.rows, others, strict=True):
            if (suspect := suspects.get(place)) is not None:
                suspect.add(finding.code, _WEIGHT[finding.level], finding.code.replace("-", " "))
                if other in suspects:
                    suspect.other = suspects[other].row.input
    for suspect in suspects.values():
        _judge(suspect, splits, mode)
    chosen: list[_Suspect] = []
    shown: Counter[tuple[str, ...]] = Counter()
    for suspect in sorted(suspects.values(), key=lambda item: -item.weight):
        kinds = tuple(sorted(suspect.kinds))
        if suspect.weight and shown[kinds] < MOST_ALIKE and len(chosen) < SHOWN_SAMPLES:
            shown[kinds] += 1
            chosen.append(suspect)
    rest = [suspect for suspect in suspects.values() if not suspect.weight]
    drawn = random.Random(seed).sample(rest, min(AT_RANDOM, len(rest)))
    for suspect in drawn:
        suspect.reasons.append("drawn at random")
    return [_document(suspect) for suspect in [*chosen, *drawn]]


def _judge(suspect: _Suspect, splits: Splits, mode: Mode | None) -> None:
    row = suspect.row
    both = mode != "finetune" and row.label is not None and row.teacher_label is not None
    if both and not same_answer(row.label or "", row.teacher_label or "", splits.task.compare):
        suspect.add("teacher-wrong", 1.0, "the teacher's label is not the gold one")
    if row.rationale and mode not in ("finetune", "distill"):
        traits = traits_of(row, learnt_label(row, mode))
        if traits.beyond < SHORT_WORDS:
            suspect.add("short", 1.0, f"{traits.beyond} word(s) of the rationale besides the label")
        if traits.copied >= COPIED_SHARE:
            suspect.add("copied", 1.0, f"{traits.copied:.0%} of the rationale is copied from the input")
        if traits.marked:
            suspect.add("marked", 1.0, "the rationale announces the answer")


def _document(suspect: _Suspect) -> dict[str, Any]:
    row = suspect.row
    return {
        "row": row.source or row.id,
        "split": suspect.split,
        "reasons": suspect.reasons,
        "input": row.input,
        "label": row.label,
        "teacher_label": row.teacher_label,
        "rationale": row.rationale,
        "other_input": suspect.other,
    }
