"""A first task file from a data file: label kind, label set and worked examples, for editing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from sbs_edge.data.arithmetic import evaluate_expression
from sbs_edge.data.example import Example
from sbs_edge.errors import DataError
from sbs_edge.teacher.task import TO_REPLACE, Shot, TaskFile

__all__ = ["PLACEHOLDER", "task_from_examples"]

PLACEHOLDER = f"{TO_REPLACE}: say in one or two sentences what in the input leads to the label."
MAX_CLOSED_LABELS = 50


def task_from_examples(name: str, rows: Sequence[Example], n_shots: int = 3) -> TaskFile:
    """Guess the task's shape from ``rows`` and take worked examples from them.

    Labels that repeat make a closed set, choices make a ``choices`` task, labels that are
    expressions are compared by value. Rows that have a rationale give complete worked examples;
    others get :data:`PLACEHOLDER` for a person to replace. Such a row may be annotated afterwards:
    :func:`sbs_edge.teacher.prompt.render` leaves its example out of its own prompt.
    """
    if not rows:
        raise DataError("There is no row to make a task file from.")
    labelled = [row for row in rows if row.label]
    labels = Counter(row.label or "" for row in labelled)
    shape: dict[str, object] = {}
    if any(row.choices for row in rows):
        shape = {"label_kind": "choices", "parser": "choice"}
    elif labels and all(
        any(c in label for c in "+-*/") and evaluate_expression(label) is not None for label in labels
    ):
        shape = {
            "label_kind": "open",
            "parser": "expression",
            "compare": "value",
            "answer_marker": "The answer is",
        }
    elif labels and len(labels) <= min(MAX_CLOSED_LABELS, max(2, len(labelled) // 2)):
        shape = {"label_kind": "closed", "labels": tuple(sorted(labels))}
    return TaskFile(
        name=name,
        instruction=f"{TO_REPLACE}: say in a sentence or two what is asked about the input.",
        shots=tuple(_shot(row) for row in _chosen(labelled, n_shots)),
        **shape,  # type: ignore[arg-type]
    )


def _shot(row: Example) -> Shot:
    return Shot(
        input=row.input, rationale=row.rationale or PLACEHOLDER, label=row.label or "", choices=row.choices
    )


def _chosen(rows: Sequence[Example], n_shots: int) -> list[Example]:
    """Take rows with a rationale and of different labels first, in file order."""
    ranked = sorted(rows, key=lambda row: row.rationale is None)
    chosen: list[Example] = []
    seen: set[str] = set()
    for row in ranked:
        if len(chosen) < n_shots and row.label not in seen:
            chosen.append(row)
            seen.add(row.label or "")
    chosen += [row for row in ranked if row not in chosen][: n_shots - len(chosen)]
    return chosen[:n_shots]
