"""Write a first task file from a data file, with label kind, label set and worked examples, for editing."""

from __future__ import annotations

import re
from collections.abc import Sequence

from sbs_edge.data.example import Example
from sbs_edge.data.labels import are_expressions, fit_labels, infer_task
from sbs_edge.errors import DataError
from sbs_edge.teacher.task import TO_REPLACE, Shot, TaskFile

__all__ = ["PLACEHOLDER", "task_from_examples"]

PLACEHOLDER = f"{TO_REPLACE}: say in one or two sentences what in the input leads to the label."


def task_from_examples(name: str, rows: Sequence[Example], n_shots: int = 3) -> TaskFile:
    """Infer the task from ``rows`` and take worked examples from them.

    Labels that repeat make a closed set, choices make a ``choices`` task, and labels that are
    expressions are compared by value. Rows with a rationale give complete worked examples;
    others get :data:`PLACEHOLDER` for a person to replace. Such a row can be annotated afterwards, because
    :func:`sbs_edge.teacher.prompt.render` leaves its example out of its own prompt.
    """
    if not rows:
        raise DataError("There is no row to make a task file from.")
    spec = infer_task(name, rows)
    rows, _ = fit_labels(rows, spec)
    labelled = [row for row in rows if row.label]
    shape: dict[str, object] = {}
    if spec.label_kind == "choices":
        shape = {"label_kind": "choices", "parser": "choice"}
    elif are_expressions([row.label or "" for row in labelled]):
        shape = {
            "label_kind": "open",
            "parser": "expression",
            "compare": "value",
            "answer_marker": "The answer is",
        }
    elif spec.label_kind == "closed":
        if len(spec.labels) < 2:
            raise DataError(
                f"All {len(labelled)} labelled rows have the label {spec.labels[0]!r}. A closed set needs at least two "
                "labels; give a file in which every label occurs."
            )
        shape = {"label_kind": "closed", "labels": spec.labels}
    marker = str(shape.get("answer_marker", TaskFile.model_fields["answer_marker"].default))
    return TaskFile(
        name=name,
        instruction=f"{TO_REPLACE}: say in a sentence or two what is asked about the input.",
        shots=tuple(_shot(row, marker) for row in _chosen(labelled, n_shots)),
        **shape,  # type: ignore[arg-type]
    )


def _shot(row: Example, marker: str) -> Shot:
    """Return a worked example; a rationale that already ends in the answer is cut before the marker."""
    rationale = re.split(re.escape(marker), row.rationale or "", maxsplit=1, flags=re.IGNORECASE)[0].strip()
    return Shot(
        input=row.input, rationale=rationale or PLACEHOLDER, label=row.label or "", choices=row.choices
    )


def _chosen(rows: Sequence[Example], n_shots: int) -> list[Example]:
    """Choose rows with a rationale and of different labels first, in file order."""
    ranked = sorted(rows, key=lambda row: row.rationale is None)
    chosen: list[Example] = []
    seen: set[str] = set()
    for row in ranked:
        if len(chosen) < n_shots and row.label not in seen:
            chosen.append(row)
            seen.add(row.label or "")
    chosen += [row for row in ranked if row not in chosen][: n_shots - len(chosen)]
    return chosen[:n_shots]
