"""Label sets: the kind of the labels, and one spelling for each label.

Files spell a label in several ways (``Refund``, ``refund ``; ``1`` in JSON, ``1.0`` in CSV). Every
command that learns or evaluates labels uses :func:`infer_task` and
:func:`fit_labels`, so that a file means the same everywhere.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from sbs_edge.data.answers import label_key, match_label
from sbs_edge.data.arithmetic import evaluate_expression
from sbs_edge.data.example import Example, LabelKind, TaskSpec
from sbs_edge.errors import DataError

__all__ = [
    "MAX_CLOSED_LABELS",
    "ROWS_PER_LABEL",
    "Respelling",
    "are_expressions",
    "fit_labels",
    "infer_task",
    "spellings",
]

MAX_CLOSED_LABELS = 64
"""With more labels than this, a closed set is not inferred."""

ROWS_PER_LABEL = 2
"""A closed set is inferred if labels have at least this many rows on average, because labels that repeat are classes."""

_OPERATION = re.compile(r"[\d)]\s*[-+*/]")


@dataclasses.dataclass(frozen=True, slots=True)
class Respelling:
    """A label that was written differently from its set.

    Attributes:
        field: ``label``, ``teacher_label`` or ``teacher_probs``.
        written: how the rows spell it, stripped.
        label: the member of the set that it means.
        rows: number of rows.
        first: ``file:line`` of the first one.

    """

    field: str
    written: str
    label: str
    rows: int
    first: str

    def __str__(self) -> str:
        return f"{self.written!r} is read as {self.label!r} ({self.rows} row(s), first {self.first})"


def spellings(labels: Sequence[str]) -> tuple[str, ...]:
    """Return each label once, sorted, in its most frequent spelling, or the first of equally frequent ones."""
    counts: dict[str, Counter[str]] = {}
    for label in labels:
        counts.setdefault(label_key(label), Counter())[label.strip()] += 1
    return tuple(sorted(own.most_common(1)[0][0] for own in counts.values()))


def are_expressions(labels: Sequence[str]) -> bool:
    """Return whether all labels are arithmetic, such as ``( 84 / 2 )``; plain and signed numbers are not."""
    return bool(labels) and all(
        _OPERATION.search(label) is not None and evaluate_expression(label) is not None for label in labels
    )


def infer_task(
    name: str,
    examples: Sequence[Example],
    kind: LabelKind | None = None,
    compare: Literal["text", "value"] = "text",
) -> TaskSpec:
    """Return the task of the rows, with the kind of its labels.

    The kind is ``choices`` if every row has choices, ``open`` if labels are compared by value or are
    arithmetic, and ``closed`` if there are at most :data:`MAX_CLOSED_LABELS` different labels with at least
    :data:`ROWS_PER_LABEL` labelled rows each on average. Otherwise it is ``open``. A closed set has
    the gold labels, or the teacher's if no row has a gold label, in alphabetical order.

    Args:
        name: of the task.
        examples: rows of all splits.
        kind: instead of the inferred one.
        compare: how labels are compared.

    Raises:
        DataError: some rows have choices and others do not.

    """
    gold = [example.label for example in examples if example.label is not None]
    known = gold or [example.teacher_label for example in examples if example.teacher_label]
    labels = spellings(known)
    with_choices = next((example for example in examples if example.choices), None)
    without = next((example for example in examples if not example.choices), None)
    if with_choices and without and kind in (None, "choices"):
        raise DataError(
            f"{without.source or without.id} has no choices, but {with_choices.source or with_choices.id} has. Give "
            "every row a value in the column 'choices', or remove the column"
            + (", or choose another label_kind." if kind else ".")
        )
    if kind == "choices" and without:
        raise DataError(
            f"{without.source or without.id} has no choices, which a task of kind 'choices' needs in every row. "
            "Add a column 'choices', or choose another label_kind."
        )
    if kind is None:
        if with_choices:
            kind = "choices"
        elif compare == "value" or are_expressions(labels):
            kind = "open"
        elif 0 < len(labels) <= min(MAX_CLOSED_LABELS, len(known) // ROWS_PER_LABEL):
            kind = "closed"
        else:
            kind = "open"
    return TaskSpec(name, kind, labels if kind == "closed" else (), compare)


def fit_labels(rows: Sequence[Example], task: TaskSpec) -> tuple[list[Example], list[Respelling]]:
    """Return the rows with their labels in the spelling of the task's set or the row's choices.

    A label outside the set is not changed; the caller decides what to do about it. Labels of
    open tasks are only stripped.
    """
    members: dict[str, str | None] = {}
    counts: dict[tuple[str, str, str], list[str]] = {}

    def spelled(label: str | None, field: str, row: Example) -> str | None:
        if label is None:
            return None
        plain = label.strip()
        if task.label_kind == "open":
            return plain
        if task.label_kind == "closed":
            if plain not in members:
                members[plain] = match_label(plain, task.labels)
            found = members[plain]
        else:
            found = match_label(plain, row.choices or ())
        if found is None or found == plain:
            return plain
        counts.setdefault((field, plain, found), []).append(row.source or row.id)
        return found

    fitted = []
    for row in rows:
        label = spelled(row.label, "label", row)
        teacher_label = spelled(row.teacher_label, "teacher_label", row)
        shares: dict[str, float] = {}
        for written, share in row.teacher_probs:
            name = spelled(written, "teacher_probs", row) or written
            shares[name] = shares.get(name, 0.0) + share
        probs = tuple(shares.items())
        if (label, teacher_label, probs) != (row.label, row.teacher_label, row.teacher_probs):
            row = dataclasses.replace(row, label=label, teacher_label=teacher_label, teacher_probs=probs)
        fitted.append(row)
    return fitted, [
        Respelling(field, written, label, len(places), places[0])
        for (field, written, label), places in counts.items()
    ]
