"""Ask an exported student the rows of a split, analyse its errors, and time single answers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from sbs_edge.analysis.answers import analyse_answers
from sbs_edge.data.answers import same_answer
from sbs_edge.data.example import Example, TaskSpec

if TYPE_CHECKING:
    from sbs_edge.runtime.answers import Prediction
    from sbs_edge.runtime.student import Student

__all__ = [
    "LATENCY_CALLS",
    "analyse_bundle",
    "answer_rows",
    "answers",
    "label_latencies",
    "label_latency",
    "rationale_latency",
    "target_bytes",
]

LATENCY_CALLS = 200
_WARM_CALLS = 10


def answer_rows(student: Student, rows: Sequence[Example]) -> list[Prediction]:
    """Return the student's answer to every row; rows that bring choices are answered with one of them."""
    # As training and the accuracy check do: one long row must not cost the report.
    return student.predict([row.input for row in rows], labels=_choices(rows), truncate=True)


def answers(student: Any, rows: Sequence[Example]) -> list[str]:
    """Return the student's label of every row; see :func:`answer_rows`."""
    return [answer.label for answer in answer_rows(student, rows)]


def analyse_bundle(
    student: Student,
    rows: Sequence[Example],
    found: Sequence[Prediction],
    task: TaskSpec,
    slices: Mapping[str, Sequence[str]],
    *,
    explains: bool,
) -> dict[str, Any] | None:
    """Return the error analysis of a bundle's answers with its ``target``; ``explains``: it writes rationales."""

    def explain(wrong: Sequence[Example]) -> list[str]:
        return [text.rationale for text in student.explain([row.input for row in wrong], truncate=True)]

    analysis = analyse_answers(
        rows, [a.label for a in found], [a.probability for a in found], [a.n_input_tokens for a in found],
        task, partial(same_answer, compare=task.compare), slices, explain if explains else None,
    )  # fmt: skip
    return None if analysis is None else {"target": student.target, **analysis}


def target_bytes(student: Student) -> int:
    """Return the bytes of the files that only the student's target uses."""
    return sum(
        item["bytes"]
        for name, item in student.manifest["files"].items()
        if name.startswith(f"{student.target}/")
    )


def label_latencies(students: Sequence[Any], rows: Sequence[Example]) -> list[dict[str, float]]:
    """Time single labels of several students in turns, so that a busy moment meets them all; see :func:`label_latency`."""
    labels = _choices(rows)
    taken: list[list[float]] = [[] for _ in students]
    places = range(min(LATENCY_CALLS, len(rows)))
    for turn, index in enumerate([*places[:_WARM_CALLS], *places]):
        for student, own in zip(students, taken, strict=True):
            start = time.perf_counter()
            student.predict([rows[index].input], labels=labels and [labels[index]], truncate=True)
            if turn >= len(places[:_WARM_CALLS]):
                own.append((time.perf_counter() - start) * 1e3)
    return [_spread(own) for own in taken]


def label_latency(student: Any, rows: Sequence[Example], seconds: float | None = None) -> dict[str, float]:
    """Time single labels after a warm-up: ``p50`` and ``p90`` in milliseconds a call, and ``calls``.

    Args:
        student: a loaded bundle.
        rows: at least one; at most :data:`LATENCY_CALLS` are asked, one a call.
        seconds: end early after this time, with at least three calls; None: no limit.

    """
    labels = _choices(rows)

    def ask(index: int) -> None:
        student.predict([rows[index].input], labels=labels and [labels[index]], truncate=True)

    return _timed(ask, len(rows), _WARM_CALLS, LATENCY_CALLS, seconds)


def rationale_latency(
    student: Any, rows: Sequence[Example], seconds: float | None = None
) -> dict[str, float]:
    """Time single rationales, each as long as the student writes it; see :func:`label_latency`."""

    def ask(index: int) -> None:
        student.explain([rows[index].input], truncate=True)

    return _timed(ask, len(rows), 2, LATENCY_CALLS // 4, seconds)


def _choices(rows: Sequence[Example]) -> list[list[str]] | None:
    choices = [list(row.distinct_choices) for row in rows]
    return choices if choices and all(choices) else None


def _timed(
    ask: Callable[[int], None], n: int, warm: int, most: int, seconds: float | None
) -> dict[str, float]:
    for index in range(min(warm, n)):
        ask(index)
    taken: list[float] = []
    began = time.perf_counter()
    for index in range(min(most, n)):
        start = time.perf_counter()
        ask(index)
        taken.append((time.perf_counter() - start) * 1e3)
        if seconds is not None and len(taken) >= 3 and time.perf_counter() - began > seconds:
            break
    return _spread(taken)


def _spread(taken: Sequence[float]) -> dict[str, float]:
    cuts = statistics.quantiles(taken, n=100) if len(taken) > 1 else [*taken] * 99
    return {"p50": round(statistics.median(taken), 3), "p90": round(cuts[89], 3), "calls": len(taken)}
