"""``run``: calls the stages one after another and compares the students.

Data, training, export and prediction are called through their public functions. Every compared student sees the same
label examples for the same number of optimiser steps. The test split is read once, after the last of them is trained.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sbs_edge.data.example import Example, Splits
from sbs_edge.data.targets import Mode

__all__ = ["Arm", "RunConfig", "arms_for", "gain_of", "run"]

LABEL_ONLY: dict[str, Mode] = {"stepwise": "finetune", "stepwise-teacher": "distill"}
RESAMPLES = 10_000


class RunConfig(BaseModel):
    """Configuration of ``sbs-edge run``.

    Attributes:
        mode: how the main student learns; with rationales, a label-only student is trained beside it.
        steps: optimiser steps of every student (the "twice the steps" control takes twice as many).
        controls: also train on shuffled rationales, and label-only for twice the steps.
        targets: export targets of the main student.
        training: further fields of the training configuration.

    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Mode = "stepwise"
    steps: int = Field(600, ge=1)
    controls: bool = False
    targets: tuple[str, ...] = ("cpu-int8", "cpu-fp32")
    seed: int = 0
    max_drop: float = Field(1.0, ge=0)
    min_rationale_agreement: float = Field(0.9, ge=0, le=1)
    training: dict[str, Any] = Field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Arm:
    """A student of the comparison."""

    name: str
    mode: Mode
    steps: int
    shuffled: bool = False


def arms_for(config: RunConfig) -> list[Arm]:
    """Return the students to train: the main one first, then those it is compared with."""
    if config.mode not in LABEL_ONLY:
        return [Arm("label-only", config.mode, config.steps)]
    label_only = LABEL_ONLY[config.mode]
    arms = [
        Arm("step-by-step", config.mode, config.steps),
        Arm("label-only", label_only, config.steps),
    ]
    if config.controls:
        arms.append(Arm("step-by-step, rationales shuffled", config.mode, config.steps, shuffled=True))
        arms.append(Arm("label-only, twice the steps", label_only, 2 * config.steps))
    return arms


def _train_arm(arm: Arm, splits: Splits, out: Path, config: RunConfig) -> dict[str, Any]:
    from sbs_edge.data.splits import shuffle_rationales
    from sbs_edge.training.train import train

    if arm.shuffled:
        splits = dataclasses.replace(splits, train=shuffle_rationales(splits.train, seed=config.seed))
    result = train(splits, out=out, mode=arm.mode, max_steps=arm.steps, seed=config.seed, **config.training)
    return {
        "name": arm.name,
        "mode": arm.mode,
        "steps": arm.steps,
        "train_seconds": round(result.seconds, 1),
        "student_dir": str(result.student_dir),
        "history": result.history,
        "metrics": result.metrics,
    }


def gain_of(right: Sequence[bool], baseline_right: Sequence[bool]) -> dict[str, Any]:
    """Return by how many points of accuracy a student is better than another on the same rows.

    Args:
        right: (n,) whether the student's answer to each row is right.
        baseline_right: (n,) the same for the other student.

    Returns:
        ``points``, the ends ``low`` and ``high`` of its 95 % interval, and ``n``. The interval is the
        percentile interval of a paired bootstrap, which resamples rows with both answers.

    """
    import numpy as np

    difference = np.asarray(right, float) - np.asarray(baseline_right, float)
    draws = np.random.default_rng(0).multinomial(len(difference), _shares(difference), RESAMPLES)
    means = 100 * (draws[:, 2] - draws[:, 0]) / len(difference)
    low, high = np.percentile(means, (2.5, 97.5))
    return {
        "points": round(float(100 * difference.mean()), 2),
        "low": round(float(low), 2),
        "high": round(float(high), 2),
        "n": len(difference),
    }


def _shares(difference: Any) -> Any:
    """Return the shares of -1, 0 and 1, because resampling rows is drawing from these three values."""
    return [float((difference == value).mean()) for value in (-1, 0, 1)]


def _measure_bundle(bundle: Path, test: Sequence[Example], splits: Splits) -> list[dict[str, Any]]:
    from sbs_edge.data.answers import same_answer
    from sbs_edge.pipelines.measure import answers, label_latency
    from sbs_edge.runtime.student import Student

    rows: list[dict[str, Any]] = []
    reference: list[str] | None = None
    manifest = Student.load(bundle).manifest
    for target, entry in manifest["targets"].items():
        if "CPUExecutionProvider" not in entry.get("providers", ["CPUExecutionProvider"]):
            continue
        with Student.load(bundle, target=target, threads=1) as student:
            got = answers(student, test)
            reference = reference or got
            judged = [(a, row.label) for a, row in zip(got, test, strict=True) if row.label is not None]
            right = sum(same_answer(answer, label, splits.task.compare) for answer, label in judged)
            size = sum(
                item["bytes"] for name, item in manifest["files"].items() if name.startswith(f"{target}/")
            )
            first = test[0].input if test else ""
            rows.append(
                {
                    "target": target,
                    "label_accuracy": right / len(judged) if judged else None,
                    "agreement_with_first": sum(a == b for a, b in zip(got, reference, strict=True))
                    / max(len(test), 1),
                    "bytes": size,
                    "label_ms": label_latency(student, test) if test else None,
                    "example_rationale": student.explain([first], truncate=True)[0].rationale
                    if first and "explainer" in entry
                    else "",
                    "guard": entry.get("accuracy"),
                }
            )
    return rows


def run(
    splits: Splits,
    out: Path,
    config: RunConfig,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Train, compare, export and predict; return the report as plain values.

    Args:
        splits: disjoint rows; ``splits.test`` is used once, at the end.
        out: directory for ``students/``, ``bundle/``, ``report.json`` and ``report.html``.
        config: see :class:`RunConfig`.
        say: receives one line a stage.

    """
    from sbs_edge.data.targets import teacher_agreement
    from sbs_edge.export.api import export
    from sbs_edge.export.targets import check_runnable, targets_named
    from sbs_edge.pipelines.linear import linear_baseline, linear_sentence
    from sbs_edge.training.evaluate import evaluate

    check_runnable(targets_named(config.targets))  # now, not after an hour of training
    started = time.perf_counter()
    students: list[dict[str, Any]] = []
    for arm in arms_for(config):
        say(f"training {arm.name}: {arm.steps} steps, mode {arm.mode}")
        slug = arm.name.replace(", ", "-").replace(" ", "-")
        students.append(_train_arm(arm, splits, out / "students" / slug, config))

    main = students[0]
    say(f"exporting for {', '.join(config.targets)}")
    exported = export(
        main["student_dir"], out / "bundle", targets=config.targets, max_drop=config.max_drop,
        min_rationale_agreement=config.min_rationale_agreement,
    )  # fmt: skip

    say(f"reading the test split once: {len(splits.test)} rows")
    for student in students:
        student["test"] = evaluate(student["student_dir"], splits.test, predictions=True, progress=True)
    rights = [
        [row["right"] for row in student["test"].pop("predictions") if row["right"] is not None]
        for student in students
    ]
    gain = gain_of(rights[0], rights[1]) if len(students) > 1 and rights[0] else None
    bundle = _measure_bundle(Path(exported.path), splits.test, splits)
    linear = linear_baseline(splits, gold=config.mode in ("finetune", "stepwise"))
    best = max((s["test"]["label_accuracy"] for s in students if rights[0]), default=None)
    return {
        "task": dataclasses.asdict(splits.task),
        "mode": config.mode,
        "rows": {name: len(getattr(splits, name)) for name in ("train", "validation", "test")},
        "teacher_agreement": teacher_agreement(splits.train, splits.task.compare),
        "students": students,
        "gain": gain,
        "linear": {**linear, "sentence": linear_sentence(linear, "test", best)},
        "bundle": {
            "path": str(exported.path),
            "targets": bundle,
            "calibration": exported.manifest.get("calibration"),
        },
        "seconds": round(time.perf_counter() - started, 1),
    }
