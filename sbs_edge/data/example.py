"""The one record that travels from data to report, and what kind of label it carries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Example", "LabelKind", "Splits", "TaskSpec"]

LabelKind = Literal["closed", "choices", "open"]
"""``closed``: one fixed label set. ``choices``: each row brings its own. ``open``: free text."""


@dataclass(frozen=True, slots=True)
class Example:
    """One input x with what is known about it.

    Attributes:
        id: unique inside its split.
        input: the text x, without a task prefix.
        label: the gold label y, or None when unknown.
        teacher_label: the teacher's label, or None when the teacher gave none.
        rationale: the teacher's rationale r, or None.
        choices: the labels this row may take (``choices`` tasks), else None.
        confidence: weight of the row in training, in (0, 1]; the vote share when the teacher
            was sampled several times, else 1.
        source: ``file:line`` the row came from, for messages.
        rationales: every rationale that argues for ``teacher_label``, ``rationale`` first; empty where the
            teacher gave at most one.
        teacher_probs: ``(label, probability)`` as the teacher distributes them, summing to 1; empty where
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
        """The labels to choose from, each once: 146 rows of the paper's cqa name one of theirs twice."""
        return tuple(dict.fromkeys(self.choices or ()))


@dataclass(frozen=True, slots=True)
class TaskSpec:
    """What the student must know about the task besides its examples.

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
    """Disjoint rows: training, model selection, and a test read once at the end.

    ``unparsed`` counts, by split, teacher outputs in which no label could be read.
    """

    task: TaskSpec
    train: list[Example] = field(default_factory=list)
    validation: list[Example] = field(default_factory=list)
    test: list[Example] = field(default_factory=list)
    unparsed: dict[str, int] = field(default_factory=dict, kw_only=True)
