"""``export``: a student directory in, a sealed bundle out, or nothing changed.

Each target's graphs are written, run, compared with the float32 student on validation rows and refused
when they cost too much; only a complete bundle takes the destination's name.
"""

from __future__ import annotations

import datetime
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from sbs_edge import __version__, files
from sbs_edge.data.answers import same_answer
from sbs_edge.data.example import Example
from sbs_edge.errors import SbsEdgeError
from sbs_edge.export import card, guard
from sbs_edge.export.calibrate import calibrate
from sbs_edge.export.explainer import build_explainer
from sbs_edge.export.graph import OPSET
from sbs_edge.export.label_scorer import build_label_scorer
from sbs_edge.export.labels import LabelPlan, plan_labels
from sbs_edge.export.precision import Float32, Int8, Precision
from sbs_edge.export.ranges import norm_ranges
from sbs_edge.export.store import save_graphs
from sbs_edge.export.targets import TARGETS, Target, targets_named
from sbs_edge.export.trie_scorer import build_choice_scorer, build_trie_scorer
from sbs_edge.export.weights import T5Weights, load_model, weights_of
from sbs_edge.runtime.bundle import Bundle, seal
from sbs_edge.runtime.manifest import FORMAT
from sbs_edge.runtime.student import Student
from sbs_edge.student.student_dir import StudentDir

__all__ = ["ExportResult", "export"]

FLOAT_TOLERANCE = 1e-4
RATIONALE_ROWS = 32
REFERENCE = "cpu-fp32"


@dataclass(frozen=True, slots=True)
class ExportResult:
    """Where the bundle is, its manifest, and what every target costs and gains."""

    path: Path
    manifest: dict[str, Any]
    report: dict[str, Any]


def export(
    student: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    targets: Sequence[str] = ("cpu-int8",),
    guard_data: Sequence[Example] | None = None,
    max_drop: float = 1.0,
    calibration_rows: int = 256,
    abstain_below: float = 0.0,
    name: str | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> ExportResult:
    """Write a bundle.

    Args:
        student: a student directory.
        out: the bundle's directory; an existing bundle is replaced only by a complete one.
        targets: names from :data:`sbs_edge.export.targets.TARGETS`; the first is the default target.
        guard_data: labelled rows for the guard and for calibrated probabilities; None: the student's
            own validation rows.
        max_drop: points of label accuracy a lossy target may lose against float32.
        calibration_rows: at most this many training rows set the ranges of int8 activations.
        abstain_below: probability under which ``predict`` marks an answer as doubtful.
        name: the bundle's name; None: the task's.
        say: receives one line a stage.

    Raises:
        UsageError: the student, a target or the labels cannot be exported.
        GuardError: a lossy target lost more than ``max_drop``; the old bundle stays.
    """
    wanted = targets_named(tuple(targets))
    opened = StudentDir.load(student)
    model = load_model(opened.path)
    weights = weights_of(model)
    tokenizer = opened.tokenizer()
    plan = plan_labels(opened.task, tokenizer, weights.eos_id)
    rows = list(guard_data) if guard_data is not None else opened.validation()
    ranges = norm_ranges(model, _calibration_pairs(opened, tokenizer, calibration_rows))
    manifest = _manifest(opened, weights, plan, wanted, abstain_below, name)
    report: dict[str, Any] = {"targets": {}}

    with files.atomic_directory(out) as work, tempfile.TemporaryDirectory() as scratch:
        for target in wanted:
            say(f"writing graphs for {target.name}")
            manifest["targets"][target.name] = _write_target(
                work / target.name, target, weights, plan, ranges, _explains(opened, plan)
            )
        for companion in ("tokenizer.json", "config.json", "generation_config.json"):
            if (opened.path / companion).is_file():
                shutil.copyfile(opened.path / companion, work / companion)
        reference_root = work
        if REFERENCE not in manifest["targets"]:
            # What the guard compares with; never part of the bundle.
            reference_root = Path(scratch)
            _write_reference(reference_root, manifest, opened, weights, plan)
        seal(work, manifest)
        with Student(Bundle.open(reference_root), REFERENCE) as reference:
            say("comparing with PyTorch")
            report["pytorch"] = _compare_with_pytorch(reference, model, opened, rows, plan)
            answers = _answer(reference, rows, plan)
            manifest["calibration"] = _calibration(answers, rows, abstain_below)
            texts = [row.input for row in rows[:RATIONALE_ROWS]] if _explains(opened, plan) else []
            rationales = [e.rationale.split() for e in reference.explain(texts, truncate=True)]
        for target in wanted:
            if not rows:
                manifest["targets"][target.name]["accuracy"] = None
                continue
            say(f"guarding {target.name} on {len(rows)} rows")
            with Student(Bundle.open(work, verify=False), target.name) as candidate:
                figures = _guard_figures(candidate, answers, rationales, texts, rows, opened, plan)
            manifest["targets"][target.name]["accuracy"] = figures
            report["targets"][target.name] = figures
            if target.lossy and figures is not None:
                guard.check(target.name, figures, max_drop)
        (work / "README.md").write_text(card.render(manifest), encoding="utf-8")
        seal(work, manifest)
        Bundle.open(work)
    return ExportResult(Path(out), manifest, report)


def _explains(opened: StudentDir, plan: LabelPlan) -> bool:
    return opened.mode.startswith("stepwise") or plan.method == "decode"


def _calibration_pairs(opened: StudentDir, tokenizer: Any, limit: int) -> list[tuple[list[int], list[int]]]:
    """Return (source ids, target ids) of both tasks for the rows that set int8 ranges."""
    pairs = []
    most, longest = opened.limits["max_source_tokens"], opened.limits["max_target_tokens"]
    for row in opened.calibration()[:limit]:
        label = row.label or row.teacher_label
        for prefix, target in (
            (opened.prefixes["label"], label),
            (opened.prefixes["rationale"], row.rationale if opened.mode.startswith("stepwise") else None),
        ):
            if target:
                pairs.append(
                    (tokenizer.encode(prefix + row.input).ids[:most], tokenizer.encode(target).ids[:longest])
                )
    return pairs


def _precision(target: Target, ranges: dict[str, float]) -> Precision:
    return Float32() if target.numbers == "float32" else Int8(ranges)


def _write_target(
    folder: Path,
    target: Target,
    weights: T5Weights,
    plan: LabelPlan,
    ranges: dict[str, float],
    explains: bool,
) -> dict[str, Any]:
    models = {}
    if plan.method == "first-token":
        models["label_scorer"] = build_label_scorer(
            weights, _precision(target, ranges), [ids[0] for ids in plan.token_ids]
        )
    elif plan.method == "trie":
        models["label_scorer"] = build_trie_scorer(weights, _precision(target, ranges), plan.token_ids)
    elif plan.method == "choices":
        models["choice_scorer"] = build_choice_scorer(weights, _precision(target, ranges))
    if explains:
        models["explainer"] = build_explainer(weights, _precision(target, ranges))
    save_graphs(models, folder)
    return {
        **{name: f"{target.name}/{name}.onnx" for name in models},
        "providers": list(target.providers),
        "opset": OPSET,
        "quantisation": {
            "numbers": target.numbers,
            "lossy": target.lossy,
            "calibrated_norms": len(ranges) if target.numbers == "int8" else 0,
        },
        "accuracy": None,
    }


def _write_reference(
    root: Path, manifest: dict[str, Any], opened: StudentDir, weights: T5Weights, plan: LabelPlan
) -> None:
    target = TARGETS[REFERENCE]
    entry = _write_target(root / REFERENCE, target, weights, plan, {}, _explains(opened, plan))
    shutil.copyfile(opened.path / "tokenizer.json", root / "tokenizer.json")
    seal(root, {**manifest, "targets": {REFERENCE: entry}, "default_target": REFERENCE})


def _manifest(
    opened: StudentDir,
    weights: T5Weights,
    plan: LabelPlan,
    wanted: Sequence[Target],
    abstain_below: float,
    name: str | None,
) -> dict[str, Any]:
    versions = {"sbs-edge": __version__}
    for package in ("onnx", "onnxruntime", "torch", "transformers", "tokenizers"):
        versions[package] = metadata.version(package)
    return {
        "format": FORMAT,
        "name": name or opened.task.name,
        "version": "1",
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "task": StudentDir.task_card(opened.task),
        "prefixes": dict(opened.prefixes),
        "limits": {
            "max_source_tokens": opened.limits["max_source_tokens"],
            "max_new_tokens": opened.limits["max_target_tokens"],
            "max_label_tokens": opened.limits["max_label_tokens"],
        },
        "labels": plan.describe(),
        "calibration": {"temperature": 1.0, "n": 0, "abstain_below": abstain_below},
        "targets": {},
        "default_target": wanted[0].name,
        "model": weights.describe(),
        "files": {},
        "versions": versions,
        "seed": opened.card.get("seed"),
        "training": {
            "mode": opened.mode,
            "rationale_weight": opened.card.get("rationale_weight"),
            "metrics": opened.card.get("training"),
        },
    }


@dataclass(frozen=True, slots=True)
class _Answers:
    """Labels of the float32 student, and for scored labels the scores behind them."""

    labels: list[str]
    scores: list[np.ndarray] | None
    names: list[Sequence[str]]


def _answer(student: Student, rows: Sequence[Example], plan: LabelPlan) -> _Answers:
    texts = [row.input for row in rows]
    if not rows:
        return _Answers([], None, [])
    if plan.method in ("first-token", "trie"):
        scores = list(student.label_scores(texts, truncate=True))
        names: list[Sequence[str]] = [plan.labels] * len(rows)
        return _Answers([plan.labels[int(s.argmax())] for s in scores], scores, names)
    if plan.method == "choices":
        choices = [list(row.choices or ()) for row in rows]
        predictions = student.predict(texts, labels=choices, truncate=True)
        logs = [np.log(np.maximum(list(p.probabilities.values()), 1e-300)) for p in predictions]
        return _Answers([p.label for p in predictions], logs, list(choices))
    return _Answers([p.label for p in student.predict(texts, truncate=True)], None, [])


def _gold(row: Example) -> str | None:
    return row.label if row.label is not None else row.teacher_label


def _calibration(answers: _Answers, rows: Sequence[Example], abstain_below: float) -> dict[str, Any]:
    if answers.scores is None:
        return {"temperature": 1.0, "n": 0, "abstain_below": abstain_below}
    known = [
        (scores, list(names).index(gold))
        for scores, names, row in zip(answers.scores, answers.names, rows, strict=True)
        if (gold := _gold(row)) is not None and gold in names
    ]
    return {**calibrate([s for s, _ in known], [g for _, g in known]), "abstain_below": abstain_below}


def _guard_figures(
    candidate: Student,
    reference: _Answers,
    rationales: list[list[str]],
    texts: list[str],
    rows: Sequence[Example],
    opened: StudentDir,
    plan: LabelPlan,
) -> dict[str, Any] | None:
    got = _answer(candidate, rows, plan)
    judged = [i for i, row in enumerate(rows) if _gold(row) is not None]
    if not judged:
        return None

    def right(labels: Sequence[str]) -> list[bool]:
        return [same_answer(labels[i], _gold(rows[i]) or "", opened.task.compare) for i in judged]

    figures = guard.compare_labels(
        [reference.labels[i] for i in judged],
        [got.labels[i] for i in judged],
        right(reference.labels),
        right(got.labels),
    )
    if texts:
        explained = [e.rationale.split() for e in candidate.explain(texts, truncate=True)]
        figures["rationale_token_agreement"] = guard.token_agreement(rationales, explained)
        figures["n_rationales"] = len(texts)
    return figures


def _compare_with_pytorch(
    reference: Student, model: Any, opened: StudentDir, rows: Sequence[Example], plan: LabelPlan
) -> dict[str, Any]:
    """Compare the float32 graph's label scores with the PyTorch model's logits on real rows."""
    if plan.method != "first-token" or not rows:
        return {}
    import torch

    texts = [row.input for row in rows[:64]]
    ours = reference.label_scores(texts, truncate=True)
    columns = [ids[0] for ids in plan.token_ids]
    theirs = []
    tokenizer = opened.tokenizer()
    start = torch.tensor([[model.config.decoder_start_token_id or 0]])
    for text in texts:
        ids = tokenizer.encode(opened.prefixes["label"] + text).ids
        if len(ids) > opened.limits["max_source_tokens"]:
            ids = [*ids[: opened.limits["max_source_tokens"] - 1], model.config.eos_token_id]
        with torch.no_grad():
            out = model(input_ids=torch.tensor([ids]), decoder_input_ids=start)
        theirs.append(out.logits[0, 0, columns].numpy())
    expected = np.stack(theirs)
    error = float(np.abs(ours - expected).max() / max(float(np.abs(expected).max()), 1e-9))
    same = bool((ours.argmax(axis=1) == expected.argmax(axis=1)).all())
    if error > FLOAT_TOLERANCE or not same:
        raise SbsEdgeError(
            f"The exported float32 graph differs from PyTorch by {error:.2e} relative on {len(texts)} rows "
            f"(limit {FLOAT_TOLERANCE:.0e}); nothing was replaced. Please report the checkpoint's config.json."
        )
    return {"max_relative_error": error, "rows": len(texts), "same_labels": same}
