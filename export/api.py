"""``export`` turns a student directory into a bundle, or leaves the destination unchanged.

The graphs of each target are written, run and compared with the float32 student on validation rows. A target
that loses too much accuracy is refused. Only a complete bundle replaces the destination.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sbs_edge import files
from sbs_edge.data.example import Example
from sbs_edge.errors import UsageError
from sbs_edge.export.checkpoint import open_student
from sbs_edge.export.job import ExportJob, GraphOptions, Limits, build_job
from sbs_edge.export.long import check_long, long_settings
from sbs_edge.export.manifest import new_manifest
from sbs_edge.export.targets import Target, check_runnable, targets_named
from sbs_edge.export.write import write_bundle

__all__ = ["ExportResult", "export"]

MIN_RATIONALE_AGREEMENT = 0.9

Layout = Literal["bundle", "optimum", "triton"]


@dataclass(frozen=True, slots=True)
class ExportResult:
    """The result of :func:`export`.

    Attributes:
        path: the directory that was written.
        manifest: the bundle's manifest.
        report: ``targets``: name -> figures of the accuracy check (None without rows); ``pytorch``: largest
            differences from PyTorch; ``pruning``: the cost of a smaller vocabulary, if there is one.
    """

    path: Path
    manifest: dict[str, Any]
    report: dict[str, Any]


# Marks of an earlier export of any layout: a bundle, optimum's files, a Triton repository.
_EXPORTED = ("manifest.json", "encoder_model.onnx", "*/config.pbtxt")


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

    Every lossy target is compared with the float32 student on labelled rows before the bundle is replaced.

    Args:
        student: a student directory, or a T5-family checkpoint that ``save_pretrained`` wrote.
        out: the bundle's directory; an existing bundle is replaced only by a complete one.
        targets: names from :data:`sbs_edge.export.targets.TARGETS`; the first is the default target.
        guard_data: labelled rows for the accuracy check and for calibrated probabilities; None: the student's
            own validation rows.
        max_drop: points of label accuracy that a lossy target may lose against float32; for pruning also per cent
            of the rationales' tokens.
        min_rationale_agreement: share of steps, in [0, 1], in which a lossy target must write the float32
            student's next token of a rationale.
        calibration_rows: largest number of training rows that set the ranges of int8 activations.
        abstain_below: probability below which ``predict`` marks an answer as uncertain.
        name: the bundle's name; None: the task's.
        labels: closed label set of a checkpoint without ``sbs_edge.json``.
        label_prefix: prefix of such a checkpoint's label task.
        rationale_prefix: prefix of such a checkpoint's rationale task.
        max_source_tokens: longest input in tokens, prefix included; None: the student's own limit.
        keep_float: layers that stay in float32 in lossy targets; a failed accuracy check names candidates.
        prune_vocabulary: write rationales only with tokens of the student's rows and a margin; its accuracy is checked.
        prune_input_vocabulary: read and write only tokens of the student's rows, tokens that spell other texts, and
            a margin, which makes embedding and tokenizer smaller; its accuracy is checked.
        label_only: write no graph that generates; ``explain`` then raises an error.
        beams: widths of beam search for which to add a graph, on CPU targets; greedy decoding is always there.
        layout: ``bundle``; ``optimum``, for ``ORTModelForSeq2SeqLM``; ``triton``, a model
            repository for NVIDIA Triton Inference Server.
        single_file: add a graph per target from text to label, with the tokenizer inside.
        unguarded: also write targets that cannot run on this machine, without measuring their accuracy.
        long: read inputs over ``max_source_tokens`` in chunks; CPU targets and the bundle layout only. None: if the
            student was trained on them. A mapping sets fields of :class:`~sbs_edge.windows.LongSettings`, for
            example ``{"max_tokens": 32768, "top_k": 512}``.
        version: the bundle's version, shown by the server.
        say: receives a line of progress for each stage.

    Raises:
        UsageError: the student, a target or the labels cannot be exported, or a target cannot run here.
        DataError: a row of ``guard_data`` or of the student's own rows has a label that the student cannot give.
        SbsEdgeError: the float32 graphs differ from PyTorch.
        GuardError: a lossy step lost more than ``max_drop`` or ``min_rationale_agreement`` allow; the old
            bundle is kept.

    Example:
        >>> from sbs_edge import export
        >>> result = export("runs/student", "runs/bundle", targets=("cpu-int8", "cpu-fp32"))
        >>> print(result.path, result.report["targets"]["cpu-int8"])
    """
    wanted = targets_named(tuple(targets))
    options = GraphOptions(
        tuple(keep_float),
        prune_vocabulary,
        prune_input_vocabulary,
        label_only,
        tuple(sorted(set(beams))),
        None,
    )
    limits = Limits(max_drop, min_rationale_agreement, abstain_below)
    _check_request(student, out, wanted, options, layout, single_file)
    if not unguarded:
        check_runnable(wanted)
    opened = open_student(student, labels, label_prefix, rationale_prefix, max_source_tokens)
    options = options._replace(long=long_settings(opened, long))
    if options.long is not None:
        check_long(wanted, layout, single_file)
    job = build_job(opened, wanted, options, limits, guard_data, calibration_rows, say)
    manifest = new_manifest(job, wanted, name, version)
    report = _write(Path(out), job, wanted, manifest, layout, single_file)
    return ExportResult(Path(out), manifest, report)


def _check_request(
    student: str | os.PathLike[str],
    out: str | os.PathLike[str],
    wanted: Sequence[Target],
    options: GraphOptions,
    layout: Layout,
    single_file: bool,
) -> None:
    """Raise :class:`UsageError` for arguments that contradict each other, before anything is read."""
    if any(width < 2 for width in options.beams):
        raise UsageError(
            f"A beam has a width of at least 2, not {min(options.beams)}; greedy decoding needs no option."
        )
    if layout != "bundle" and single_file:
        raise UsageError("A single file is part of a bundle: use single_file only with layout='bundle'.")
    for target in wanted:
        if (layout == "optimum" or single_file) and target.numbers not in ("float32", "int8"):
            raise UsageError(
                f"{'A single file' if single_file else 'The optimum layout'} runs on the CPU in float32 or int8, not as "
                f"{target.name}; choose cpu-fp32 or cpu-int8."
            )
    if options.prune_input_vocabulary and (layout == "optimum" or single_file):
        raise UsageError(
            "A single file and the optimum layout keep the student's own tokenizer; leave out prune_input_vocabulary."
        )
    source, there = Path(student).resolve(), Path(out).resolve()
    if there == source or there in source.parents:
        raise UsageError(
            f"{out} is the student's own directory, and a bundle replaces its directory. Choose another one."
        )
    files.check_replaceable(out, _EXPORTED, "bundle or other output of export")


def _write(
    out: Path,
    job: ExportJob,
    wanted: Sequence[Target],
    manifest: dict[str, Any],
    layout: Layout,
    single_file: bool,
) -> dict[str, Any]:
    """Write the layout and return the accuracy check's report; the check always runs on a bundle."""
    if layout == "bundle":
        return write_bundle(out, job, wanted, manifest, single_file)
    with tempfile.TemporaryDirectory() as scratch:
        report = write_bundle(Path(scratch) / "bundle", job, wanted, manifest, False)
        if layout == "optimum":
            from sbs_edge.export.layouts.optimum import write_optimum

            write_optimum(out, job.opened, job.pruned, wanted, manifest)
        else:
            from sbs_edge.export.layouts.triton import write_triton_repository

            write_triton_repository(Path(scratch) / "bundle", out)
    return report
