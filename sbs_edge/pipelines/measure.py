"""Measurements of a loaded bundle: its answers to rows, their errors, latency and size."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sbs_edge.analysis.answers import analyse_answers
from sbs_edge.data.answers import same_answer
from sbs_edge.data.example import Example, TaskSpec

if TYPE_CHECKING:
    from sbs_edge.runtime.answers import Prediction
    from sbs_edge.runtime.student import Student

__all__ = ["analyse_bundle", "answer_rows", "latencies_ms", "latency_ms", "target_bytes"]

LATENCY_CALLS = 200
WARM_UP_CALLS = 10


def _choices(rows: Sequence[Example]) -> list[list[str]] | None:
    choices = [list(row.distinct_choices) for row in rows]
    return choices if choices and all(choices) else None


def answer_rows(student: Student, rows: Sequence[Example]) -> list[Prediction]:
    """Answer rows, each with its own choices if it has some; inputs over the limit are cut, as in training."""
    return student.predict([row.input for row in rows], labels=_choices(rows), truncate=True)


def analyse_bundle(
    student: Student,
    rows: Sequence[Example],
    answers: Sequence[Prediction],
    task: TaskSpec,
    slices: Mapping[str, Sequence[str]],
    *,
    explains: bool,
) -> dict[str, Any] | None:
    """Return the error analysis of a bundle's answers with its ``target``; ``explains``: it writes rationales."""

    def explain(wrong: Sequence[Example]) -> list[str]:
        return [found.rationale for found in student.explain([row.input for row in wrong], truncate=True)]

    found = analyse_answers(
        rows, [a.label for a in answers], [a.probability for a in answers], [a.n_input_tokens for a in answers],
        task, partial(same_answer, compare=task.compare), slices, explain if explains else None,
    )  # fmt: skip
    return None if found is None else {"target": student.target, **found}


def latency_ms(student: Student, rows: Sequence[Example]) -> dict[str, float]:
    """Time single label predictions after a warm-up; milliseconds a call, one text a call."""
    return latencies_ms([student], rows)[0]


def latencies_ms(students: Sequence[Student], rows: Sequence[Example]) -> list[dict[str, float]]:
    """Time single label predictions of several students in turns, so that a busy moment meets them all."""
    taken: list[list[float]] = [[] for _ in students]
    n_warm = len(rows[:WARM_UP_CALLS])
    for number, row in enumerate([*rows[:WARM_UP_CALLS], *rows[:LATENCY_CALLS]]):
        labels = _choices([row])
        for student, own in zip(students, taken, strict=True):
            start = time.perf_counter()
            student.predict([row.input], labels=labels, truncate=True)
            if number >= n_warm:
                own.append((time.perf_counter() - start) * 1e3)
    return [_spread(own) for own in taken]


def _spread(taken: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(taken, n=100) if len(taken) > 1 else [*taken] * 99
    return {"p50": round(statistics.median(taken), 3), "p90": round(cuts[89], 3), "calls": len(taken)}


def target_bytes(student: Student) -> int:
    """Return the bytes of the files that only the student's target uses."""
    return sum(
        item["bytes"]
        for name, item in student.manifest["files"].items()
        if name.startswith(f"{student.target}/")
    )
