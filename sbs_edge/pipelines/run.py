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

from sbs_edge.analysis.intervals import gain_of
from sbs_edge.data.answers import same_answer
from sbs_edge.data.columns import column_values
from sbs_edge.data.example import Example, Splits, TaskSpec
from sbs_edge.data.targets import Mode
from sbs_edge.pipelines.measure import analyse_bundle, answer_rows, label_latency, target_bytes

__all__ = ["Arm", "RunConfig", "arms_for", "run"]

LABEL_ONLY: dict[str, Mode] = {"stepwise": "finetune", "stepwise-teacher": "distill"}


class RunConfig(BaseModel):
    """Configuration of ``sbs-edge run``.

    Attributes:
        mode: how the main student learns; with rationales, a label-only student is trained beside it.
        steps: optimiser steps of every student (the "twice the steps" control takes twice as many).
        controls: also train on shuffled rationales, and label-only for twice the steps.
        targets: export targets of the main student.
        training: further fields of the training configuration.
        slices: columns of the test rows' file by whose values accuracy is reported.

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
    slices: tuple[str, ...] = ()


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


def _measure_bundle(
    bundle: Path, test: Sequence[Example], task: TaskSpec, slices: dict[str, list[str]], *, explains: bool
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Answer the test rows with every target that runs on a CPU; analyse the errors of the first."""
    from sbs_edge.runtime.student import Student

    rows: list[dict[str, Any]] = []
    reference: list[str] | None = None
    analysis: dict[str, Any] | None = None
    manifest = Student.load(bundle).manifest
    for target, entry in manifest["targets"].items():
        if "CPUExecutionProvider" not in entry.get("providers", ["CPUExecutionProvider"]):
            continue
        with Student.load(bundle, target=target, threads=1) as student:
            answers = answer_rows(student, test)
            got = [answer.label for answer in answers]
            if reference is None:
                reference = got
                analysis = analyse_bundle(student, test, answers, task, slices, explains=explains)
            judged = [(a, row.label) for a, row in zip(got, test, strict=True) if row.label is not None]
            right = sum(same_answer(answer, label, task.compare) for answer, label in judged)
            first = test[0].input if test else ""
            rows.append(
                {
                    "target": target,
                    "label_accuracy": right / len(judged) if judged else None,
                    "agreement_with_first": sum(a == b for a, b in zip(got, reference, strict=True))
                    / max(len(test), 1),
                    "bytes": target_bytes(student),
                    "label_ms": label_latency(student, test) if test else None,
                    "example_rationale": student.explain([first], truncate=True)[0].rationale
                    if first and explains
                    else "",
                    "guard": entry.get("accuracy"),
                }
            )
    return rows, analysis


def run(
    splits: Splits,
    out: Path,
    config: RunConfig,
    *,
    served: Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Train, compare, export and predict; return the report as plain values.

    Args:
        splits: disjoint rows; ``splits.test`` is used once, at the end.
        out: directory for ``students/``, ``bundle/``, ``report.json`` and ``report.html``.
        config: see :class:`RunConfig`.
        served: the bundle in use. The new bundle is written to ``candidate/`` and replaces it only if it is not worse
            on the test rows; ``replacement`` in the report says so. None: the bundle is written to ``bundle/``.
        say: receives one line a stage.

    """
    from sbs_edge.data.targets import teacher_agreement
    from sbs_edge.export.api import export
    from sbs_edge.export.targets import check_runnable, targets_named
    from sbs_edge.pipelines.linear import linear_baseline, linear_sentence
    from sbs_edge.pipelines.replace import judge_replacement, next_version, replace_bundle
    from sbs_edge.runtime.manifest import read_manifest
    from sbs_edge.training.evaluate import evaluate

    check_runnable(targets_named(config.targets))  # now, not after an hour of training
    slices = column_values(splits.test, config.slices)
    started = time.perf_counter()
    students: list[dict[str, Any]] = []
    for arm in arms_for(config):
        say(f"training {arm.name}: {arm.steps} steps, mode {arm.mode}")
        slug = arm.name.replace(", ", "-").replace(" ", "-")
        students.append(_train_arm(arm, splits, out / "students" / slug, config))

    main = students[0]
    say(f"exporting for {', '.join(config.targets)}")
    version = "1" if served is None else next_version(read_manifest(served)["version"])
    exported = export(
        main["student_dir"], out / ("bundle" if served is None else "candidate"), targets=config.targets,
        max_drop=config.max_drop, min_rationale_agreement=config.min_rationale_agreement, version=version,
    )  # fmt: skip

    say(f"reading the test split once: {len(splits.test)} rows")
    for student in students:
        student["test"] = evaluate(student["student_dir"], splits.test, predictions=True, progress=True)
    rights = [
        [row["right"] for row in student["test"].pop("predictions") if row["right"] is not None]
        for student in students
    ]
    gain = gain_of(rights[0], rights[1]) if len(students) > 1 and rights[0] else None
    bundle, analysis = _measure_bundle(
        Path(exported.path), splits.test, splits.task, slices, explains=config.mode in LABEL_ONLY
    )
    linear = linear_baseline(splits, gold=config.mode in ("finetune", "stepwise"))
    best = max((s["test"]["label_accuracy"] for s in students if rights[0]), default=None)
    path, replacement = Path(exported.path), None
    if served is not None:
        say(f"comparing with {served}")
        replacement = judge_replacement(served, path, splits.test, config.max_drop)
        if replacement["accepted"]:
            replace_bundle(served, path)
            path = served
    return {
        "task": dataclasses.asdict(splits.task),
        "mode": config.mode,
        "rows": {name: len(getattr(splits, name)) for name in ("train", "validation", "test")},
        "teacher_agreement": teacher_agreement(splits.train, splits.task.compare),
        "students": students,
        "gain": gain,
        "analysis": analysis,
        "replacement": replacement,
        "linear": {**linear, "sentence": linear_sentence(linear, "test", best)},
        "bundle": {
            "path": str(path),
            "targets": bundle,
            "calibration": exported.manifest.get("calibration"),
        },
        "seconds": round(time.perf_counter() - started, 1),
    }
