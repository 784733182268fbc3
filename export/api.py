"""``export`` turns a student directory into a sealed bundle, or leaves the destination unchanged.

Every target's graphs are written, run and compared with the float32 student on validation rows. A target
that loses too much accuracy is refused. Only a complete bundle takes the destination's name.
"""

from __future__ import annotations

import datetime
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from sbs_edge import __version__, files
from sbs_edge.data.example import Example
from sbs_edge.data.labels import fit_labels
from sbs_edge.data.tokenizer import check_covered
from sbs_edge.errors import UsageError
from sbs_edge.export import card
from sbs_edge.export.assemble import GraphInputs, write_target
from sbs_edge.export.check import accuracy
from sbs_edge.export.check.measure import (
    Answers,
    accuracy_figures,
    answer_rows,
    calibration_of,
    check_labels_known,
    rationale_tokens,
)
from sbs_edge.export.check.padding import padding_figures
from sbs_edge.export.check.parity import compare_with_pytorch
from sbs_edge.export.check.sensitivity import most_sensitive
from sbs_edge.export.checkpoint import CHECKPOINT_MODE, open_student
from sbs_edge.export.graphs.weights import weights_of
from sbs_edge.export.labels import LabelPlan, plan_labels
from sbs_edge.export.long import check_long, long_settings
from sbs_edge.export.quant.mixed import check_layers
from sbs_edge.export.quant.ranges import collect_calibration
from sbs_edge.export.targets import TARGETS, Target, check_runnable, providers_here, targets_named
from sbs_edge.export.vocabulary.input import SmallVocabulary, copy_tokenizer_and_config, small_vocabulary
from sbs_edge.export.vocabulary.output import output_tokens
from sbs_edge.runtime.bundle import Bundle, seal
from sbs_edge.runtime.manifest import FORMAT
from sbs_edge.runtime.student import Student
from sbs_edge.tokens import TextTokenizer, within_limit
from sbs_edge.training.student_dir import CALIBRATION, VALIDATION, StudentDir
from sbs_edge.windows import LongSettings

__all__ = ["ExportResult", "export"]

RATIONALE_ROWS = 32
MIN_RATIONALE_AGREEMENT = 0.9
REFERENCE = "cpu-fp32"

Layout = Literal["bundle", "optimum", "triton"]


@dataclass(frozen=True, slots=True)
class ExportResult:
    """The result of :func:`export`.

    Attributes:
        path: the directory that was written.
        manifest: the bundle's manifest.
        report: ``targets``: name -> figures of the accuracy check (None: nothing to measure on); ``pytorch``: largest
            differences from PyTorch; ``pruning``: the cost of a smaller vocabulary, where one was asked for.
    """

    path: Path
    manifest: dict[str, Any]
    report: dict[str, Any]


# What an earlier export of any layout left: a bundle, optimum's files, a Triton repository.
_EXPORTED = ("manifest.json", "encoder_model.onnx", "*/config.pbtxt")


class _GraphOptions(NamedTuple):
    """The caller's choices about the graphs; the fields are arguments of :func:`export`."""

    keep_float: tuple[str, ...]
    prune_vocabulary: bool
    prune_input_vocabulary: bool
    label_only: bool
    beams: tuple[int, ...]
    long: LongSettings | None


class _Limits(NamedTuple):
    """Limits of the accuracy check and of doubtful answers; the fields are arguments of :func:`export`."""

    max_drop: float
    min_rationale_agreement: float
    abstain_below: float


@dataclass(frozen=True, slots=True)
class _Job:
    """Everything one export works with.

    Attributes:
        pruned: inputs of the targets' graphs, in the smaller vocabulary if ``small`` is given.
        full: the same in the student's full vocabulary: the reference of the accuracy check.
    """

    opened: StudentDir
    model: Any
    pruned: GraphInputs
    full: GraphInputs
    small: SmallVocabulary | None
    rows: list[Example]
    limits: _Limits
    long: LongSettings | None
    say: Callable[[str], None]

    @property
    def texts(self) -> list[str]:
        """Inputs whose rationales are compared; empty if the student learnt no rationales."""
        compared = self.pruned.explains and _learnt_rationales(self.opened)
        return [row.input for row in self.rows[:RATIONALE_ROWS]] if compared else []

    @property
    def plan(self) -> LabelPlan:
        return self.full.plan

    @property
    def pruning_flags(self) -> list[str]:
        """The flags that made the vocabulary smaller."""
        given = {
            "--prune-vocabulary": self.pruned.output_tokens is not None,
            "--prune-input-vocabulary": self.small is not None,
        }
        return [flag for flag, on in given.items() if on]


def export(
    student: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    targets: Sequence[str] = ("cpu-int8",),
    guard_data: Sequence[Example] | None = None,
    max_drop: float = 1.0,
    min_rationale_agreement: float = MIN_RATIONALE_AGREEMENT,
    calibration_rows: int = 256,
    abstain_below: float = 0.0,
    name: str | None = None,
    labels: Sequence[str] | None = None,
    label_prefix: str | None = None,
    rationale_prefix: str | None = None,
    max_source_tokens: int | None = None,
    keep_float: Sequence[str] = (),
    prune_vocabulary: bool = False,
    prune_input_vocabulary: bool = False,
    label_only: bool = False,
    beams: Sequence[int] = (),
    layout: Layout = "bundle",
    single_file: bool = False,
    unguarded: bool = False,
    long: bool | Mapping[str, Any] | None = None,
    version: str = "1",
    say: Callable[[str], None] = lambda _: None,
) -> ExportResult:
    """Export a trained student as a bundle, or change nothing.

    Every lossy target is compared with the float32 student on labelled rows before it takes its place.

    Args:
        student: a student directory, or a T5-family checkpoint that ``save_pretrained`` wrote.
        out: the bundle's directory; an existing bundle is replaced only by a complete one.
        targets: names from :data:`sbs_edge.export.targets.TARGETS`; the first is the default target.
        guard_data: labelled rows for the accuracy check and for calibrated probabilities; None: the student's
            own validation rows.
        max_drop: points of label accuracy a lossy target may lose against float32; for pruning also per cent
            of the rationales' tokens.
        min_rationale_agreement: share of steps, in [0, 1], in which a lossy target must go on with the float32
            student's next token while it writes rationales.
        calibration_rows: at most this many training rows set the ranges of int8 activations.
        abstain_below: probability under which ``predict`` marks an answer as doubtful.
        name: the bundle's name; None: the task's.
        labels: closed label set of a checkpoint without ``sbs_edge.json``.
        label_prefix: prefix of such a checkpoint's label task.
        rationale_prefix: prefix of such a checkpoint's rationale task.
        max_source_tokens: most tokens of an input, prefix included; None: the student's own limit.
        keep_float: layers that stay in float32 in lossy targets; a failed accuracy check names candidates.
        prune_vocabulary: let the student write only tokens that its rows use, and a margin; gated.
        prune_input_vocabulary: let the student read and write only tokens that its rows use, what it takes to
            spell other texts, and a margin: a smaller embedding and tokenizer; gated.
        label_only: write no graph that generates; ``explain`` is then refused.
        beams: widths of beam search to write a graph for, on CPU targets; greedy decoding is always there.
        layout: ``bundle``; ``optimum`` writes what ``ORTModelForSeq2SeqLM`` loads; ``triton`` a model
            repository for NVIDIA Triton Inference Server.
        single_file: add a graph per target that takes text and gives the label, tokenizer inside.
        unguarded: write targets that cannot run on this machine too, without measuring what they cost.
        long: read inputs over ``max_source_tokens`` in chunks; CPU targets and the bundle layout only. None: if the
            student was trained on them. A mapping sets fields of :class:`~sbs_edge.windows.LongSettings`,
            for example ``{"max_tokens": 32768, "top_k": 512}``.
        version: the bundle's version, as serving shows it.
        say: receives one line of progress per stage.

    Raises:
        UsageError: the student, a target or the labels cannot be exported, or a target cannot run here.
        DataError: a row of ``guard_data`` or of the student's own rows has a label the student cannot give.
        SbsEdgeError: the float32 graphs differ from PyTorch.
        GuardError: a lossy step lost more than ``max_drop`` or ``min_rationale_agreement`` allow; the old
            bundle stays.

    Example:
        >>> from sbs_edge import export
        >>> result = export("runs/student", "runs/bundle", targets=("cpu-int8", "cpu-fp32"))
        >>> print(result.path, result.report["targets"]["cpu-int8"])
    """
    wanted = targets_named(tuple(targets))
    limits = _Limits(max_drop, min_rationale_agreement, abstain_below)
    options = _GraphOptions(
        tuple(keep_float),
        prune_vocabulary,
        prune_input_vocabulary,
        label_only,
        tuple(sorted(set(beams))),
        None,
    )
    _check_request(student, out, wanted, options, layout, single_file)
    if not unguarded:
        check_runnable(wanted)
    opened = open_student(student, labels, label_prefix, rationale_prefix, max_source_tokens)
    options = options._replace(long=long_settings(opened, long))
    if options.long is not None:
        check_long(wanted, layout, single_file)
    job = _build(opened, wanted, options, limits, guard_data, calibration_rows, say)
    manifest = _manifest(job, wanted, name, version)
    report = _write(Path(out), job, wanted, manifest, layout, single_file)
    return ExportResult(Path(out), manifest, report)


def _check_request(
    student: str | os.PathLike[str],
    out: str | os.PathLike[str],
    wanted: Sequence[Target],
    options: _GraphOptions,
    layout: Layout,
    single_file: bool,
) -> None:
    """Raise :class:`UsageError` for arguments that contradict each other, before anything is read."""
    if any(width < 2 for width in options.beams):
        raise UsageError(
            f"A beam has a width of at least 2, not {min(options.beams)}; greedy decoding needs no option."
        )
    if layout != "bundle" and single_file:
        raise UsageError("A single file is part of a bundle; leave --single-file or --layout out.")
    for target in wanted:
        if (layout == "optimum" or single_file) and target.numbers not in ("float32", "int8"):
            raise UsageError(
                f"{'A single file' if single_file else 'The optimum layout'} runs on the CPU in float32 or int8 and "
                f"rules {target.name} out; choose cpu-fp32 or cpu-int8 with it."
            )
    if options.prune_input_vocabulary and (layout == "optimum" or single_file):
        raise UsageError(
            "A single file and the optimum layout keep the student's own tokenizer; leave --prune-input-vocabulary out."
        )
    source, there = Path(student).resolve(), Path(out).resolve()
    if there == source or there in source.parents:
        raise UsageError(
            f"{out} holds the student itself, and a bundle replaces its directory; give another one."
        )
    files.check_replaceable(out, _EXPORTED, "bundle or other output of export")


def _build(
    opened: StudentDir,
    wanted: Sequence[Target],
    options: _GraphOptions,
    limits: _Limits,
    guard_data: Sequence[Example] | None,
    calibration_rows: int,
    say: Callable[[str], None],
) -> _Job:
    """Read the student, check its rows, calibrate, and collect what its graphs are made from."""
    model = opened.load_model()
    weights = weights_of(model)
    check_layers(weights, options.keep_float)
    tokenizer = opened.tokenizer()
    check_covered(tokenizer, len(weights.embedding), opened.path)
    plan = plan_labels(opened.task, tokenizer, weights.eos_id)
    rows = _checked_rows(opened, plan, guard_data)
    if options.label_only and plan.method == "decode":
        raise UsageError(
            "Open labels are generated, so there is nothing to leave out; leave --label-only out."
        )
    explains = not options.label_only and (_learnt_rationales(opened) or plan.method == "decode")
    kept = None
    if options.prune_vocabulary and explains:
        seen = [*opened.calibration(), *opened.validation(), *rows]
        kept = output_tokens(seen, tokenizer, weights.eos_id, weights.pad_id, len(weights.head))
    small = None
    if options.prune_input_vocabulary:
        small = small_vocabulary(opened, rows, weights, () if kept is None else kept.tolist())
    calibration = opened.calibration()[:calibration_rows] or rows[:calibration_rows]
    stats = collect_calibration(
        model, _calibration_pairs(opened, tokenizer, calibration, weights.eos_id),
        moments=any(target.numbers == "int4" for target in wanted),
    )  # fmt: skip
    for target in wanted:
        if not stats.rows and target.numbers in ("int4", "fp16", "int8-pairs"):
            raise UsageError(
                f"{target.name} is calibrated on rows, and this student kept none; give labelled rows as guard data, "
                "or choose cpu-int8 or cuda-bf16."
            )
    full = GraphInputs(
        weights, plan, stats.norms, explains, None, options.keep_float, stats,
        opened.limits["max_source_tokens"],
        max(opened.limits["max_target_tokens"], opened.limits["max_label_tokens"] + 1),
        options.beams, options.long is not None,
    )  # fmt: skip
    pruned = replace(full, output_tokens=kept)
    if small is not None:
        less = small.weights(weights)
        pruned = replace(
            full, weights=less, plan=plan_labels(opened.task, small.tokenizer(), less.eos_id),
            output_tokens=None if kept is None else small.moved(kept),
        )  # fmt: skip
    return _Job(opened, model, pruned, full, small, rows, limits, options.long, say)


def _checked_rows(opened: StudentDir, plan: LabelPlan, guard_data: Sequence[Example] | None) -> list[Example]:
    """Return the rows of the accuracy check; raise :class:`DataError` for a label the student cannot give."""
    rows = opened.validation() if guard_data is None else fit_labels(guard_data, opened.task)[0]
    if guard_data is not None:
        check_labels_known(rows, plan, "the guard's data")
    for file, own in ((VALIDATION, opened.validation()), (CALIBRATION, opened.calibration())):
        # Training allows a teacher's label outside the label set, but not a gold label outside it.
        judged = [row for row in own if row.label is not None and (plan.kind == "closed" or row.choices)]
        check_labels_known(judged, plan, str(opened.path / file))
    return rows


def _learnt_rationales(opened: StudentDir) -> bool:
    return opened.mode.startswith("stepwise") or opened.mode == CHECKPOINT_MODE


def _write(
    out: Path,
    job: _Job,
    wanted: Sequence[Target],
    manifest: dict[str, Any],
    layout: Layout,
    single_file: bool,
) -> dict[str, Any]:
    """Write the layout and return the accuracy check's report; the check always runs on a bundle."""
    if layout == "bundle":
        return _write_bundle(out, job, wanted, manifest, single_file)
    with tempfile.TemporaryDirectory() as scratch:
        report = _write_bundle(Path(scratch) / "bundle", job, wanted, manifest, False)
        if layout == "optimum":
            from sbs_edge.export.layouts.optimum import write_optimum

            write_optimum(out, job.opened, job.pruned, wanted, manifest)
        else:
            from sbs_edge.export.layouts.triton import write_triton_repository

            write_triton_repository(Path(scratch) / "bundle", out)
    return report


def _write_bundle(
    out: Path, job: _Job, wanted: Sequence[Target], manifest: dict[str, Any], single_file: bool
) -> dict[str, Any]:
    report: dict[str, Any] = {"targets": {}}
    with files.atomic_directory(out) as work, tempfile.TemporaryDirectory() as scratch:
        for target in wanted:
            job.say(f"writing graphs for {target.name}")
            entry = write_target(work / target.name, target, job.pruned)
            if single_file:
                from sbs_edge.export.layouts.single_file import write_single_file

                entry["single_file"] = write_single_file(work, target, job.opened, job.pruned)
            manifest["targets"][target.name] = entry
        copy_tokenizer_and_config(job.opened, job.small, work)
        seal(work, manifest)
        # The reference of the accuracy check: float32, full vocabulary. It never becomes part of the bundle.
        with _reference(Path(scratch), manifest, job) as reference:
            job.say("comparing with PyTorch")
            report["pytorch"] = compare_with_pytorch(
                reference.bundle.root,
                reference.bundle.target(REFERENCE)[1],
                job.model,
                job.opened,
                job.rows,
                job.plan,
                job.long,
            )
            answers = answer_rows(reference, job.rows, job.plan)
            manifest["calibration"] = calibration_of(answers, job.rows, job.limits.abstain_below)
            padding = padding_figures(reference, job.rows, job.plan)
            rationales = rationale_tokens(reference, job.texts, job.opened)
        if job.pruning_flags and job.rows:
            job.say(f"checking the accuracy of the smaller vocabulary on {len(job.rows)} rows")
            manifest["pruning"] = report["pruning"] = _judge_pruning(job, manifest, answers, rationales)
        for target in wanted if job.rows else ():
            if not providers_here(target):
                why = f"the machine that exported it has no {' or '.join(target.providers)}"
                manifest["targets"][target.name]["unmeasured"] = why
                job.say(f"{target.name} is written without an accuracy check: {why}")
                continue
            job.say(f"checking the accuracy of {target.name} on {len(job.rows)} rows")
            with Student(Bundle.open(work, verify=False), target.name) as candidate:
                figures = accuracy_figures(
                    candidate, answers, rationales, job.texts, job.rows, job.opened, job.plan,
                    padding if target.lossy else None,
                )  # fmt: skip
            manifest["targets"][target.name]["accuracy"] = figures
            report["targets"][target.name] = figures
            _judge(target, figures, job, manifest, answers, rationales)
        (work / "README.md").write_text(card.render(manifest), encoding="utf-8")
        seal(work, manifest)
        Bundle.open(work)
    return report


def _judge_pruning(
    job: _Job, manifest: dict[str, Any], answers: Answers, rationales: list[list[int]]
) -> dict[str, Any] | None:
    """Return the float32 cost of the smaller vocabulary alone; raise :class:`GuardError` above the limit."""
    with tempfile.TemporaryDirectory() as scratch:
        entry = write_target(Path(scratch) / REFERENCE, TARGETS[REFERENCE], job.pruned)
        with _candidate(job, manifest, REFERENCE)(Path(scratch), entry) as pruned:
            figures = accuracy_figures(pruned, answers, rationales, job.texts, job.rows, job.opened, job.plan)
    if figures is not None and (
        refused := accuracy.pruning_refusal(figures, job.limits.max_drop, job.pruning_flags)
    ):
        raise refused
    return figures


def _candidate(job: _Job, manifest: dict[str, Any], target: str) -> Callable[[Path, dict[str, Any]], Student]:
    """Return a function that opens the graphs in a scratch directory as a student."""

    def opened(root: Path, entry: dict[str, Any]) -> Student:
        copy_tokenizer_and_config(job.opened, job.small, root)
        seal(root, {**manifest, "targets": {target: entry}, "default_target": target})
        return Student(Bundle.open(root, verify=False), target, prepacked_cache=False)

    return opened


def _judge(
    target: Target, figures: dict[str, Any] | None, job: _Job, manifest: dict[str, Any],
    answers: Answers, rationales: list[list[int]],
) -> None:  # fmt: skip
    """Raise :class:`GuardError` when the target lost too much, naming the layers that cost most."""
    if figures is None or not target.lossy:
        return

    def label_distance(student: Student, rows: Sequence[Example]) -> float:
        got = answer_rows(student, rows, job.plan)
        if answers.scores is None or got.scores is None:  # open labels: texts
            return float(np.mean([a != b for a, b in zip(got.labels, answers.labels, strict=False)]))
        pairs = zip(got.scores, answers.scores, strict=False)
        return float(np.mean([np.abs(a - b).mean() for a, b in pairs]))

    def rationale_distance(student: Student, rows: Sequence[Example]) -> float:
        written = rationale_tokens(student, job.texts, job.opened)
        return 1.0 - float(accuracy.compare_rationales(rationales, written)["rationale_next_token_agreement"])

    def layers(distance: Callable[[Student, Sequence[Example]], float]) -> list[tuple[str, float]]:
        job.say(f"{target.name} lost too much; measuring every layer")
        make = _candidate(job, manifest, target.name)
        return most_sensitive(target, job.pruned, job.rows, make, distance)

    if accuracy.too_much(figures, job.limits.max_drop):
        raise accuracy.refusal(
            target.name, figures, job.limits.max_drop, layers(label_distance), job.pruning_flags
        )
    if accuracy.drifted(figures, job.limits.min_rationale_agreement):
        least = job.limits.min_rationale_agreement
        raise accuracy.rationale_refusal(target.name, figures, least, layers(rationale_distance))


def _reference(root: Path, manifest: dict[str, Any], job: _Job) -> Student:
    target = TARGETS[REFERENCE]
    entry = write_target(root / REFERENCE, target, job.full)
    copy_tokenizer_and_config(job.opened, None, root)
    own = {"labels": job.full.plan.describe(), "model": job.full.weights.describe()}
    seal(root, {**manifest, **own, "targets": {REFERENCE: entry}, "default_target": REFERENCE})
    return Student(Bundle.open(root, verify=False), REFERENCE, prepacked_cache=False)


def _calibration_pairs(
    opened: StudentDir, tokenizer: Any, rows: Sequence[Example], eos_id: int
) -> list[tuple[list[int], list[int]]]:
    """Return (source ids, target ids) of both tasks for the rows that set int8 ranges."""
    pairs, texts = [], TextTokenizer(tokenizer)
    most, longest = opened.limits["max_source_tokens"], opened.limits["max_target_tokens"]
    for row in rows:
        for prefix, target in (
            (opened.prefixes["label"], row.label or row.teacher_label),
            (opened.prefixes["rationale"], row.rationale if opened.mode.startswith("stepwise") else None),
        ):
            if target:
                source, _ = texts.encode_within(row.input, most, eos_id, prefix)
                pairs.append((source, within_limit(texts.encode_target(target, eos_id), longest, eos_id)))
    return pairs


def _versions() -> dict[str, str]:
    versions = {"sbs-edge": __version__}
    for package in ("onnx", "onnxruntime", "onnxruntime-gpu", "torch", "transformers", "tokenizers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _manifest(job: _Job, wanted: Sequence[Target], name: str | None, version: str) -> dict[str, Any]:
    opened, weights = job.opened, job.pruned.weights
    if not version or any(not (character.isalnum() or character in "._-") for character in version):
        raise UsageError(
            f"The version {version!r} must be made of letters, digits, dots, dashes and underscores."
        )
    return {
        "format": FORMAT,
        "name": name or opened.task.name,
        "version": version,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "task": StudentDir.task_card(opened.task),
        "prefixes": dict(opened.prefixes),
        "limits": {
            "max_source_tokens": opened.limits["max_source_tokens"],
            "max_new_tokens": opened.limits["max_target_tokens"],
            "max_label_tokens": opened.limits["max_label_tokens"],
        },
        "labels": job.pruned.plan.describe(),
        "calibration": {"temperature": 1.0, "n": 0, "abstain_below": job.limits.abstain_below},
        "targets": {},
        "default_target": wanted[0].name,
        "model": weights.describe(),
        "vocabulary": job.small.figures if job.small else None,
        "files": {},
        "versions": _versions(),
        **({} if job.long is None else {"long": job.long.describe()}),
        "seed": opened.card.get("seed"),
        "training": {
            "mode": opened.mode,
            "rationale_weight": opened.card.get("rationale_weight"),
            "metrics": opened.card.get("training"),
        },
    }
