"""The record of one finding of a check on data, and what every check needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sbs_edge.data.example import Example, Splits
from sbs_edge.data.targets import Mode, label_for

__all__ = ["SHOWN", "Check", "Finding", "learnt_label", "parts", "places"]

SHOWN = 5
LISTED = 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a check found.

    Attributes:
        level: ``warn`` or ``stop``.
        code: stable name, for programs.
        message: the problem with its numbers, and what to do.
        rows: the first rows concerned, as ``file:line``, the worst first where one is worse than another.
        others: for each of ``rows`` the row it is compared with, where a finding is about pairs.
        figures: the numbers of the message, for programs.

    """

    level: Literal["warn", "stop"]
    code: str
    message: str
    rows: tuple[str, ...] = ()
    others: tuple[str, ...] = field(default=(), kw_only=True)
    figures: Mapping[str, Any] = field(default_factory=dict, kw_only=True)


Check = Callable[[Splits, Mode | None], Iterator[Finding]]


def parts(splits: Splits) -> list[tuple[str, list[Example]]]:
    """Return name and rows of the splits that have rows."""
    return [(name, rows) for name in ("train", "validation", "test") if (rows := getattr(splits, name))]


def places(rows: Iterable[Example]) -> tuple[str, ...]:
    """Return where the first rows stand: ``file:line``, or the id of a row without a file."""
    return tuple(row.source or row.id for row, _ in zip(rows, range(LISTED), strict=False))


def learnt_label(row: Example, mode: Mode | None) -> str | None:
    """Return the label that a student learns; without a mode the gold one, or the teacher's where there is none."""
    if mode is not None:
        return label_for(row, mode)
    return row.label if row.label is not None else row.teacher_label
