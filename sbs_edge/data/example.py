"""The record of an example, the description of its task, and splits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Example", "LabelKind", "Splits", "TaskSpec"]

LabelKind = Literal["closed", "choices", "open"]
"""``closed``: a fixed label set. ``choices``: each row has its own. ``open``: free text."""


@dataclass(frozen=True, slots=True)
class Example:
    """An input x with its labels and rationale.

    Attributes:
        id: unique inside its split.
        input: the text x, without a task prefix.
        label: the gold label y, or None if unknown.
        teacher_label: the teacher's label, or None if the teacher gave none.
        rationale: the teacher's rationale r, or None.
        choices: the labels this row may take (``choices`` tasks), else None.
        confidence: weight of the row in training, in (0, 1]; the share of votes if the teacher
            was sampled several times, else 1.
        source: ``file:line`` of the row, for messages.
        rationales: every rationale that argues for ``teacher_label``, ``rationale`` first; empty if the
            teacher gave at most one.
        teacher_probs: ``(label, probability)`` as the teacher distributes them, summing to 1; empty if
            only its label is known.

    """

    id: str
    input: str
    label: str | None = None
    teacher_label: str | None = None
    rationale: str | None = None
    choices: tuple[str, ...] | None = None
    confidence: float = 1.0
    source: str = ""
    rationales: tuple[str, ...] = ()
    teacher_probs: tuple[tuple[str, float], ...] = ()

    @property
    def distinct_choices(self) -> tuple[str, ...]:
        """Return the labels to choose from, each once: 146 rows of the paper's cqa name a choice twice."""
        return tuple(dict.fromkeys(self.choices or ()))


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """The description of a task, besides its examples.

    Attributes:
        name: short name, used in reports and manifests.
        label_kind: see :data:`LabelKind`.
        labels: the closed label set in a fixed order; empty unless ``label_kind == "closed"``.
        compare: ``text`` compares stripped strings, ``value`` compares arithmetic values.

    """

    name: str
    label_kind: LabelKind
    labels: tuple[str, ...] = ()
    compare: Literal["text", "value"] = "text"


@dataclass(slots=True)
class Splits:
    """Disjoint rows: training, model selection, and a test split that is read once, at the end.

    ``unparsed`` counts, by split, teacher outputs in which no label could be read.
    """

    task: TaskSpec
    train: list[Example] = field(default_factory=list)
    validation: list[Example] = field(default_factory=list)
    test: list[Example] = field(default_factory=list)
    unparsed: dict[str, int] = field(default_factory=dict, kw_only=True)
