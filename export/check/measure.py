"""Answer rows with exported graphs and compare the answers with the float32 graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sbs_edge.data.answers import same_answer
from sbs_edge.data.example import Example
from sbs_edge.errors import DataError
from sbs_edge.export.check import accuracy
from sbs_edge.export.check.calibrate import calibrate
from sbs_edge.export.check.padding import padding_figures
from sbs_edge.export.labels import LabelPlan
from sbs_edge.runtime.student import Student
from sbs_edge.training.student_dir import StudentDir

__all__ = [
    "Answers",
    "accuracy_figures",
    "answer_rows",
    "calibration_of",
    "check_labels_known",
    "gold_of",
    "rationale_tokens",
]


def check_labels_known(rows: Sequence[Example], plan: LabelPlan, source: str) -> None:
    """Raise :class:`DataError` if the student cannot give a row's label."""
    if plan.kind == "open":
        return
    for number, row in enumerate(rows, start=1):
        known = plan.labels if plan.kind == "closed" else row.choices
        gold = gold_of(row)
        if known is None:
            raise DataError(
                f"{row.source or f'{source}, row {number}'} has no choices, which this task needs in every row."
            )
        if gold is not None and gold not in known:
            raise DataError(
                f"{row.source or f'{source}, row {number}'} has the label {gold!r}, which the student cannot give; "
                f"it has {', '.join(map(repr, known))}. Correct the row or leave it out."
            )


@dataclass(frozen=True, slots=True)
class Answers:
    """Labels of the float32 student and, for scored labels, their scores."""

    labels: list[str]
    scores: list[np.ndarray] | None
    names: list[Sequence[str]]


def answer_rows(student: Student, rows: Sequence[Example], plan: LabelPlan) -> Answers:
    """Answer ``rows`` with ``student``, cutting inputs over the limit."""
    texts = [row.input for row in rows]
    if not rows:
        return Answers([], None, [])
    if plan.method in ("first-token", "trie"):
        scores = list(student.label_scores(texts, truncate=True))
        names: list[Sequence[str]] = [plan.labels] * len(rows)
        return Answers([plan.labels[int(s.argmax())] for s in scores], scores, names)
    if plan.method == "choices":
        choices = [list(row.distinct_choices) for row in rows]
        predictions = student.predict(texts, labels=choices, truncate=True)
        logs = [np.log(np.maximum(list(p.probabilities.values()), 1e-300)) for p in predictions]
        return Answers([p.label for p in predictions], logs, list(choices))
    return Answers([p.label for p in student.predict(texts, truncate=True)], None, [])


def gold_of(row: Example) -> str | None:
    """Return the row's gold label, or the teacher's if there is none."""
    return row.label if row.label is not None else row.teacher_label


def calibration_of(answers: Answers, rows: Sequence[Example], abstain_below: float) -> dict[str, Any]:
    """Return the manifest's ``calibration``: the temperature fitted on the float32 student's scores."""
    if answers.scores is None:
        return {"temperature": 1.0, "n": 0, "abstain_below": abstain_below}
    known = [
        (scores, list(names).index(gold))
        for scores, names, row in zip(answers.scores, answers.names, rows, strict=True)
        if (gold := gold_of(row)) is not None and gold in names
    ]
    return {**calibrate([s for s, _ in known], [g for _, g in known]), "abstain_below": abstain_below}


def rationale_tokens(student: Student, texts: Sequence[str], opened: StudentDir) -> list[list[int]]:
    """Return the rationale of each text as tokens of the checkpoint's tokenizer, with end-of-sequence if it was reached."""
    tokenizer, eos = opened.tokenizer(), student.manifest["model"]["eos_token_id"]
    return [
        [*tokenizer.encode(e.rationale, add_special_tokens=False).ids, *([eos] if e.complete else [])]
        for e in (student.explain(texts, truncate=True) if texts else [])
    ]


def accuracy_figures(
    candidate: Student,
    reference: Answers,
    rationales: list[list[int]],
    texts: list[str],
    rows: Sequence[Example],
    opened: StudentDir,
    plan: LabelPlan,
    padding: dict[str, Any] | None = None,
) -> dict[str, Any] | None:
    """Return accuracies before and after, agreement, agreement of rationales, and the effect of padding.

    Returns None if no row has a label. ``padding`` is the effect of padding in float32, or None to leave it out.
    """
    got = answer_rows(candidate, rows, plan)
    judged = [i for i, row in enumerate(rows) if gold_of(row) is not None]
    if not judged:
        return None

    # A decoded label is right if it is the gold label as the tokenizer spells it, as in evaluate.
    spelled = opened.text_tokenizer().respelled if plan.method == "decode" else None

    def right(labels: Sequence[str]) -> list[bool]:
        wanted = [(labels[i], gold_of(rows[i]) or "") for i in judged]
        return [
            same_answer(answer, gold, opened.task.compare) or bool(spelled and answer == spelled(gold))
            for answer, gold in wanted
        ]

    figures = accuracy.compare_labels(
        [reference.labels[i] for i in judged],
        [got.labels[i] for i in judged],
        right(reference.labels),
        right(got.labels),
    )
    if texts:
        figures |= accuracy.compare_rationales(rationales, rationale_tokens(candidate, texts, opened))
    if padding is not None:
        figures["padding"] = padding_figures(candidate, rows, plan)
        figures["padding_float32"] = padding
    return figures
