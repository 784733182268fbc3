"""Two bundles on the same rows: which is right more often, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbs_edge.analysis.answers import analyse_answers
from sbs_edge.analysis.intervals import gain_of
from sbs_edge.data.answers import same_answer
from sbs_edge.data.example import Example, TaskSpec
from sbs_edge.data.labels import fit_labels
from sbs_edge.errors import DataError, UsageError
from sbs_edge.pipelines.measure import answer_rows, label_latencies, target_bytes

if TYPE_CHECKING:
    from sbs_edge.runtime.answers import Prediction
    from sbs_edge.runtime.student import Student

__all__ = ["compare_bundles", "task_of"]

SHOWN_ROWS = 20


def task_of(student: Student) -> TaskSpec:
    """Return the task that a bundle's manifest describes."""
    task = student.manifest["task"]
    return TaskSpec(task["name"], task["label_kind"], tuple(task["labels"]), task["compare"])


def compare_bundles(
    first: Path,
    second: Path,
    rows: Sequence[Example],
    *,
    target: str | None = None,
    threads: int = 1,
) -> dict[str, Any]:
    """Answer rows with two bundles and compare answers, accuracy, latency and size.

    Args:
        first: the bundle in use.
        second: the one that may replace it.
        rows: with gold labels; rows with a teacher's label alone are judged by it where no row has a gold one.
        target: which target of both bundles to run; None: each one's default.
        threads: of one inference.

    Returns:
        ``reference`` (``gold``, ``teacher`` or None), ``rows``, ``judged``, ``bundles`` (for each its ``path``,
        ``version``, ``target``, ``accuracy`` with ``low`` and ``high``, ``macro_f1``, ``ece``, ``label_ms``, ``bytes``),
        ``gain`` of the second over the first in points with its 95 % interval from a paired bootstrap, ``agreement``,
        ``outcomes`` (rows right in both, one or none), ``labels`` (recall of both, a label), and ``differing`` rows.

    Raises:
        DataError: there are no rows.
        UsageError: the bundles' labels are chosen in different ways.

    """
    if not rows:
        raise DataError("There are no rows to compare the bundles on; give a file with examples.")
    from sbs_edge.runtime.student import Student

    with ExitStack() as stack:
        students = [
            stack.enter_context(Student.load(path, target=target, threads=threads))
            for path in (first, second)
        ]
        tasks = [task_of(student) for student in students]
        if tasks[0].label_kind != tasks[1].label_kind or tasks[0].compare != tasks[1].compare:
            raise UsageError(
                f"The labels of {first} are {tasks[0].label_kind}, compared by {tasks[0].compare}, and those of {second} "
                f"are {tasks[1].label_kind}, compared by {tasks[1].compare}. Compare bundles of one task."
            )
        fitted = fit_labels(rows, tasks[0])[0]
        answers = [answer_rows(student, fitted) for student in students]
        latency = label_latencies(students, fitted)
        sizes = [target_bytes(student) for student in students]
        about = [(str(s.bundle.root), s.manifest.get("version"), s.target) for s in students]
    return _document(tasks[0], fitted, answers, about, latency, sizes)


def _document(
    task: TaskSpec,
    rows: Sequence[Example],
    answers: Sequence[Sequence[Prediction]],
    about: Sequence[tuple[str, Any, str]],
    latency: Sequence[dict[str, float]],
    sizes: Sequence[int],
) -> dict[str, Any]:
    def same(answer: str, wanted: str) -> bool:
        return same_answer(answer, wanted, task.compare)

    found = [
        analyse_answers(
            rows, [a.label for a in own], [a.probability for a in own], [a.n_input_tokens for a in own], task, same
        )
        for own in answers
    ]  # fmt: skip
    reference = found[0]["reference"] if found[0] else None
    wanted = [row.label if reference == "gold" else row.teacher_label for row in rows]
    right = [
        [same(answer.label, label) for answer, label in zip(own, wanted, strict=True) if label is not None]
        for own in answers
    ]
    agreeing = [same(a.label, b.label) for a, b in zip(*answers, strict=True)]
    return {
        "task": task.name,
        "reference": reference,
        "rows": len(rows),
        "judged": len(right[0]),
        "bundles": [
            {
                "path": path,
                "version": version,
                "target": target,
                **{key: (analysis or {}).get(key) for key in ("accuracy", "low", "high", "macro_f1")},
                "ece": analysis["reliability"]["ece"] if analysis and analysis["reliability"] else None,
                "label_ms": taken,
                "bytes": size,
            }
            for (path, version, target), analysis, taken, size in zip(
                about, found, latency, sizes, strict=True
            )
        ],
        "gain": gain_of(right[1], right[0]) if right[0] else None,
        "agreement": sum(agreeing) / len(rows),
        "outcomes": _outcomes(right) if right[0] else None,
        "labels": _labels(found) if found[0] and found[1] else [],
        "differing": _differing(rows, wanted, answers, agreeing, same),
    }


def _outcomes(right: Sequence[Sequence[bool]]) -> dict[str, int]:
    pairs = list(zip(*right, strict=True))
    return {
        "both_right": pairs.count((True, True)),
        "only_first": pairs.count((True, False)),
        "only_second": pairs.count((False, True)),
        "none_right": pairs.count((False, False)),
    }


def _labels(found: Sequence[Any]) -> list[dict[str, Any]]:
    first, second = ({item["label"]: item for item in analysis["labels"]} for analysis in found)
    return [
        {
            "label": label,
            "rows": item["rows"],
            "recall": [own.get(label, {}).get("recall") for own in (first, second)],
            "precision": [own.get(label, {}).get("precision") for own in (first, second)],
        }
        for label, item in first.items()
    ]


def _differing(
    rows: Sequence[Example],
    wanted: Sequence[str | None],
    answers: Sequence[Sequence[Prediction]],
    agreeing: Sequence[bool],
    same: Any,
) -> list[dict[str, Any]]:
    """Return the rows answered differently, those that only the first answers rightly first, then by its certainty."""
    found = []
    for row, label, first, second, alike in zip(rows, wanted, *answers, agreeing, strict=True):
        if alike:
            continue
        right = [None if label is None else bool(same(answer.label, label)) for answer in (first, second)]
        found.append(
            {
                "row": row.source or row.id,
                "input": row.input,
                "wanted": label,
                "labels": [first.label, second.label],
                "probabilities": [first.probability, second.probability],
                "right": right,
            }
        )
    found.sort(key=lambda item: (item["right"] != [True, False], -max(item["probabilities"])))
    return found[:SHOWN_ROWS]
