"""Write a bundle and check the accuracy of each target; a target that loses too much stops the export."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sbs_edge import files
from sbs_edge.data.example import Example
from sbs_edge.export import card
from sbs_edge.export.assemble import write_target
from sbs_edge.export.check import accuracy
from sbs_edge.export.check.measure import (
    Answers,
    accuracy_figures,
    answer_rows,
    calibration_of,
    rationale_tokens,
)
from sbs_edge.export.check.padding import padding_figures
from sbs_edge.export.check.parity import compare_with_pytorch
from sbs_edge.export.check.sensitivity import most_sensitive
from sbs_edge.export.job import ExportJob
from sbs_edge.export.targets import TARGETS, Target, providers_here
from sbs_edge.export.vocabulary.input import copy_tokenizer_and_config
from sbs_edge.runtime.bundle import Bundle, seal
from sbs_edge.runtime.student import Student

__all__ = ["write_bundle"]

REFERENCE = "cpu-fp32"


@dataclass(frozen=True, slots=True)
class _Reference:
    """The float32 student's answers on the rows of the accuracy check, in the full vocabulary."""

    answers: Answers
    rationales: list[list[int]]
    padding: dict[str, Any] | None
    calibration: dict[str, Any]
    pytorch: dict[str, Any]


def write_bundle(
    out: Path, job: ExportJob, wanted: Sequence[Target], manifest: dict[str, Any], single_file: bool
) -> dict[str, Any]:
    """Write, check and seal a bundle in one step; return the report of the accuracy check.

    ``manifest`` is completed with targets, figures and calibration.

    Raises:
        GuardError: a target, or the smaller vocabulary, lost too much accuracy.
        SbsEdgeError: the float32 graphs differ from PyTorch.
    """
    report: dict[str, Any] = {"targets": {}}
    with files.atomic_directory(out) as work:
        for target in wanted:
            manifest["targets"][target.name] = _write_graphs(work, target, job, single_file)
        copy_tokenizer_and_config(job.opened, job.small, work)
        seal(work, manifest)
        reference = _measure_reference(job, manifest)
        manifest["calibration"], report["pytorch"] = reference.calibration, reference.pytorch
        if job.pruning_options and job.rows:
            job.say(f"checking the accuracy of the smaller vocabulary on {len(job.rows)} rows")
            manifest["pruning"] = report["pruning"] = _judge_pruning(job, manifest, reference)
        for target in wanted if job.rows else ():
            if not providers_here(target):
                why = f"the machine that exported it has no {' or '.join(target.providers)}"
                manifest["targets"][target.name]["unmeasured"] = why
                job.say(f"{target.name} is written without an accuracy check: {why}")
                continue
            figures = _judge(work, target, job, manifest, reference)
            manifest["targets"][target.name]["accuracy"] = report["targets"][target.name] = figures
        (work / "README.md").write_text(card.render(manifest), encoding="utf-8")
        seal(work, manifest)
        Bundle.open(work)
    return report


def _write_graphs(work: Path, target: Target, job: ExportJob, single_file: bool) -> dict[str, Any]:
    """Write the graphs of a target; return its entry in the manifest."""
    job.say(f"writing graphs for {target.name}")
    entry = write_target(work / target.name, target, job.pruned)
    if single_file:
        from sbs_edge.export.layouts.single_file import write_single_file

        entry["single_file"] = write_single_file(work, target, job.opened, job.pruned)
    return entry


def _measure_reference(job: ExportJob, manifest: dict[str, Any]) -> _Reference:
    """Answer the rows with float32 graphs in the full vocabulary, which never become part of the bundle."""
    with tempfile.TemporaryDirectory() as scratch, _open_reference(Path(scratch), manifest, job) as student:
        job.say("comparing with PyTorch")
        entry = student.bundle.target(REFERENCE)[1]
        pytorch = compare_with_pytorch(
            student.bundle.root, entry, job.model, job.opened, job.rows, job.plan, job.long
        )
        answers = answer_rows(student, job.rows, job.plan)
        return _Reference(
            answers,
            rationale_tokens(student, job.texts, job.opened),
            padding_figures(student, job.rows, job.plan),
            calibration_of(answers, job.rows, job.limits.abstain_below),
            pytorch,
        )


def _figures(
    student: Student, job: ExportJob, reference: _Reference, padding: dict[str, Any] | None = None
) -> dict[str, Any] | None:
    return accuracy_figures(
        student, reference.answers, reference.rationales, job.texts, job.rows, job.opened, job.plan, padding
    )


def _judge_pruning(job: ExportJob, manifest: dict[str, Any], reference: _Reference) -> dict[str, Any] | None:
    """Return the float32 cost of the smaller vocabulary alone; raise :class:`GuardError` above the limit."""
    with tempfile.TemporaryDirectory() as scratch:
        entry = write_target(Path(scratch) / REFERENCE, TARGETS[REFERENCE], job.pruned)
        with _candidate(job, manifest, REFERENCE)(Path(scratch), entry) as pruned:
            figures = _figures(pruned, job, reference)
    if figures is not None and (
        refused := accuracy.pruning_refusal(figures, job.limits.max_drop, job.pruning_options)
    ):
        raise refused
    return figures


def _candidate(
    job: ExportJob, manifest: dict[str, Any], target: str
) -> Callable[[Path, dict[str, Any]], Student]:
    """Return a function that opens the graphs in a scratch directory as a student."""

    def opened(root: Path, entry: dict[str, Any]) -> Student:
        copy_tokenizer_and_config(job.opened, job.small, root)
        seal(root, {**manifest, "targets": {target: entry}, "default_target": target})
        return Student(Bundle.open(root, verify=False), target, prepacked_cache=False)

    return opened


def _judge(
    work: Path, target: Target, job: ExportJob, manifest: dict[str, Any], reference: _Reference
) -> dict[str, Any] | None:
    """Return the target's figures; raise :class:`GuardError`, naming the layers that cost most, if it lost too much."""
    job.say(f"checking the accuracy of {target.name} on {len(job.rows)} rows")
    with Student(Bundle.open(work, verify=False), target.name) as student:
        figures = _figures(student, job, reference, reference.padding if target.lossy else None)
    if figures is None or not target.lossy:
        return figures

    def label_distance(student: Student, rows: Sequence[Example]) -> float:
        got, answers = answer_rows(student, rows, job.plan), reference.answers
        if answers.scores is None or got.scores is None:  # open labels: texts
            return float(np.mean([a != b for a, b in zip(got.labels, answers.labels, strict=False)]))
        pairs = zip(got.scores, answers.scores, strict=False)
        return float(np.mean([np.abs(a - b).mean() for a, b in pairs]))

    def rationale_distance(student: Student, rows: Sequence[Example]) -> float:
        written = rationale_tokens(student, job.texts, job.opened)
        same = accuracy.compare_rationales(reference.rationales, written)
        return 1.0 - float(same["rationale_next_token_agreement"])

    def layers(distance: Callable[[Student, Sequence[Example]], float]) -> list[tuple[str, float]]:
        job.say(f"{target.name} lost too much; measuring every layer")
        make = _candidate(job, manifest, target.name)
        return most_sensitive(target, job.pruned, job.rows, make, distance)

    limits = job.limits
    if accuracy.too_much(figures, limits.max_drop):
        costly = layers(label_distance)
        raise accuracy.refusal(target.name, figures, limits.max_drop, costly, job.pruning_options)
    if accuracy.drifted(figures, limits.min_rationale_agreement):
        costly = layers(rationale_distance)
        raise accuracy.rationale_refusal(target.name, figures, limits.min_rationale_agreement, costly)
    return figures


def _open_reference(root: Path, manifest: dict[str, Any], job: ExportJob) -> Student:
    target = TARGETS[REFERENCE]
    entry = write_target(root / REFERENCE, target, job.full)
    copy_tokenizer_and_config(job.opened, None, root)
    own = {"labels": job.full.plan.describe(), "model": job.full.weights.describe()}
    seal(root, {**manifest, **own, "targets": {REFERENCE: entry}, "default_target": REFERENCE})
    return Student(Bundle.open(root, verify=False), REFERENCE, prepacked_cache=False)
