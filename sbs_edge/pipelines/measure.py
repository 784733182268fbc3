"""Ask an exported student the rows of a split, and time single answers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from sbs_edge.data.example import Example

__all__ = ["LATENCY_CALLS", "answers", "label_latency", "rationale_latency"]

LATENCY_CALLS = 200
_WARM_CALLS = 10


def answers(student: Any, rows: Sequence[Example]) -> list[str]:
    """Return the student's label of every row; rows that bring choices are answered with one of them."""
    # As training and the accuracy check do: one long row must not cost the report.
    found = student.predict([row.input for row in rows], labels=_choices(rows), truncate=True)
    return [answer.label for answer in found]


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
    return choices if any(choices) else None


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
    cuts = statistics.quantiles(taken, n=100) if len(taken) > 1 else taken * 99
    return {"p50": round(statistics.median(taken), 3), "p90": round(cuts[89], 3), "calls": len(taken)}
