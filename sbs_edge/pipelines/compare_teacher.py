"""Compare the teacher with a student trained on its labels and a student trained on gold labels.

Both students are trained on the same inputs for the same number of steps, exported, and evaluated through their
bundles. The student on the teacher's labels never sees a gold label: they are removed before training, from the
validation rows too. All three are evaluated on the gold labels of the test rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from sbs_edge.data.answers import same_answer
from sbs_edge.data.example import Example, Splits, TaskSpec
from sbs_edge.errors import DataError
from sbs_edge.pipelines.measure import answer_rows, label_latency, target_bytes
from sbs_edge.report.page import Page

__all__ = ["COLUMNS", "compare_with_teacher", "comparison_page", "without_gold"]

COLUMNS = (
    "arm",
    "label accuracy",
    "parameters",
    "bytes",
    "label p50 ms",
    "cost per 1000 answers",
)


def without_gold(rows: Sequence[Example]) -> list[Example]:
    """Return the rows without their gold labels."""
    return [dataclasses.replace(row, label=None) for row in rows]


def compare_with_teacher(
    task: TaskSpec,
    train_rows: Sequence[Example],
    validation_rows: Sequence[Example],
    test_rows: Sequence[Example],
    out: Path,
    *,
    annotation: dict[str, Any] | None = None,
    teacher_parameters: int | None = None,
    steps: int = 600,
    target: str = "cpu-int8",
    core_hour_price: float = 0.0,
    training: dict[str, Any] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Train, export and evaluate both students; return the comparison as plain values.

    Args:
        task: the description of the task.
        train_rows: annotated rows; without gold labels in them, the student on gold is left out.
        validation_rows: annotated rows for model selection, with each student's own kind of label.
        test_rows: rows with gold labels; if they also have teacher labels, the teacher is evaluated on them.
        out: directory for students and bundles.
        annotation: the report of ``annotate``: the teacher's latency and cost.
        teacher_parameters: the teacher's size, if known.
        steps: optimiser steps of each student.
        target: the export target of both.
        core_hour_price: price of a CPU core for an hour, in the unit of the teacher's prices; a
            student's cost is that of the time that one core takes for 1000 single answers.
        training: further fields of the training configuration.
        say: receives a line for each stage.

    """
    judged = [row for row in test_rows if row.label is not None]
    if not judged:
        raise DataError(
            "The comparison needs test rows with gold labels. They are used to evaluate, not to train."
        )
    arms = [_teacher_arm(task, judged, annotation or {}, teacher_parameters)]
    plain = Splits(task, without_gold(train_rows), without_gold(validation_rows))
    common = {"max_steps": steps, **(training or {})}
    arms.append(
        _student_arm(
            "student on teacher's labels", "stepwise-teacher", plain, judged, out / "teacher-labels",
            target, core_hour_price, common, say,
        )
    )  # fmt: skip
    known = [row for row in train_rows if row.label is not None]
    if len(known) == len(train_rows):
        golden = Splits(task, list(train_rows), list(validation_rows))
        arms.append(
            _student_arm(
                "student on gold labels", "stepwise", golden, judged, out / "gold-labels",
                target, core_hour_price, common, say,
            )
        )  # fmt: skip
    return {
        "task": task.name,
        "rows": {"train": len(train_rows), "validation": len(validation_rows), "test": len(judged)},
        "gold_in_training_rows": len(known),
        "steps": steps,
        "target": target,
        "core_hour_price": core_hour_price,
        "arms": arms,
    }


def _teacher_arm(
    task: TaskSpec, judged: Sequence[Example], annotation: dict[str, Any], parameters: int | None
) -> dict[str, Any]:
    answered = [row for row in judged if row.teacher_label is not None]
    right = sum(same_answer(row.label or "", row.teacher_label or "", task.compare) for row in answered)
    calls = annotation.get("calls") or {}
    seconds = (calls.get("seconds") or {}).get("p50")
    return {
        "arm": f"teacher {annotation.get('teacher', '')}".strip(),
        # A row without a usable answer of the teacher counts as wrong.
        "label_accuracy": right / len(judged) if answered else None,
        "parameters": parameters,
        "bytes": None,
        "label_p50_ms": None if seconds is None else 1e3 * seconds,
        "cost_per_1000": calls.get("cost_per_1000_rows"),
    }


def _student_arm(
    name: str,
    mode: Literal["stepwise", "stepwise-teacher"],
    splits: Splits,
    judged: Sequence[Example],
    out: Path,
    target: str,
    core_hour_price: float,
    training: dict[str, Any],
    say: Callable[[str], None],
) -> dict[str, Any]:
    from sbs_edge.export.api import export
    from sbs_edge.runtime.student import Student
    from sbs_edge.training.train import train

    say(f"training the {name}")
    trained = train(splits, out=out / "student", mode=mode, **training)
    say(f"exporting the {name}")
    exported = export(trained.student_dir, out / "bundle", targets=(target,))
    with Student.load(exported.path, threads=1) as student:
        rows = [without_teacher(row) for row in judged]
        answers = answer_rows(student, rows)
        p50 = label_latency(student, rows)["p50"]
        size = target_bytes(student)
    right = sum(
        same_answer(row.label or "", answer.label, splits.task.compare)
        for row, answer in zip(judged, answers, strict=True)
    )
    return {
        "arm": name,
        "label_accuracy": right / len(judged),
        "parameters": trained.metrics["parameters"],
        "bytes": size,
        "label_p50_ms": p50,
        "cost_per_1000": p50 / 1e3 * 1000 / 3600 * core_hour_price,
        "train_seconds": round(trained.seconds, 1),
        "bundle": str(exported.path),
    }


def without_teacher(row: Example) -> Example:
    """Return the row without the teacher's parts: the input and its choices."""
    return Example(row.id, row.input, choices=row.choices)


def comparison_page(report: dict[str, Any]) -> str:
    """Return the comparison as one HTML page that needs no network."""
    page = Page(f"Teacher and students: {report['task']}")
    rows = report["rows"]
    page.text(
        f"{rows['train']:,} annotated training rows, {rows['validation']:,} for model selection, "
        f"{rows['test']:,} test rows with gold labels, which judge all arms. The student on the teacher's labels "
        "saw no gold label, neither in training nor in model selection."
    )
    page.table(
        COLUMNS,
        [
            [
                arm["arm"],
                None if arm["label_accuracy"] is None else f"{100 * arm['label_accuracy']:.1f} %",
                arm["parameters"],
                arm["bytes"],
                arm["label_p50_ms"],
                arm["cost_per_1000"],
            ]
            for arm in report["arms"]
        ],
    )
    page.text(
        f"Students: target {report['target']}, {report['steps']} steps, one text a call, one thread; cost at "
        f"{report['core_hour_price']} a core and hour. Teacher: latency and cost as annotation measured them, a "
        "row without a usable answer counts as wrong; – where unknown.",
        note=True,
    )
    if len(report["arms"]) == 2:
        page.text("The student on gold labels is left out: not every training row has one.", note=True)
    return page.html()
