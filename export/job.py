"""The data of an export: the student, the inputs of its graphs, and the rows of the accuracy check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from sbs_edge.data.example import Example
from sbs_edge.data.labels import fit_labels
from sbs_edge.data.tokenizer import check_covered
from sbs_edge.errors import UsageError
from sbs_edge.export.assemble import GraphInputs
from sbs_edge.export.check.measure import check_labels_known
from sbs_edge.export.checkpoint import CHECKPOINT_MODE
from sbs_edge.export.graphs.weights import weights_of
from sbs_edge.export.labels import LabelPlan, plan_labels
from sbs_edge.export.quant.mixed import check_layers
from sbs_edge.export.quant.ranges import collect_calibration
from sbs_edge.export.targets import Target
from sbs_edge.export.vocabulary.input import SmallVocabulary, small_vocabulary
from sbs_edge.export.vocabulary.output import output_tokens
from sbs_edge.tokens import TextTokenizer, within_limit
from sbs_edge.training.student_dir import CALIBRATION, VALIDATION, StudentDir
from sbs_edge.windows import LongSettings

__all__ = ["ExportJob", "GraphOptions", "Limits", "build_job"]

RATIONALE_ROWS = 32


class GraphOptions(NamedTuple):
    """The options of the graphs; the fields are arguments of :func:`export`."""

    keep_float: tuple[str, ...]
    prune_vocabulary: bool
    prune_input_vocabulary: bool
    label_only: bool
    beams: tuple[int, ...]
    long: LongSettings | None


class Limits(NamedTuple):
    """The limits of the accuracy check and of uncertain answers; the fields are arguments of :func:`export`."""

    max_drop: float
    min_rationale_agreement: float
    abstain_below: float


@dataclass(frozen=True, slots=True)
class ExportJob:
    """The data of an export.

    Attributes:
        pruned: inputs of the targets' graphs, in the smaller vocabulary if ``small`` is given.
        full: the same in the student's full vocabulary, as the reference of the accuracy check.
        long: how inputs over ``max_source_tokens`` are read; None: they are not.
    """

    opened: StudentDir
    model: Any
    pruned: GraphInputs
    full: GraphInputs
    small: SmallVocabulary | None
    rows: list[Example]
    limits: Limits
    long: LongSettings | None
    say: Callable[[str], None]

    @property
    def texts(self) -> list[str]:
        """Return the inputs whose rationales are compared; empty if the student learnt no rationales."""
        compared = self.pruned.explains and _learnt_rationales(self.opened)
        return [row.input for row in self.rows[:RATIONALE_ROWS]] if compared else []

    @property
    def plan(self) -> LabelPlan:
        """Return the plan of label scoring in the student's full vocabulary."""
        return self.full.plan

    @property
    def pruning_options(self) -> list[str]:
        """Return the options that made the vocabulary smaller."""
        given = {
            "prune_vocabulary": self.pruned.output_tokens is not None,
            "prune_input_vocabulary": self.small is not None,
        }
        return [name for name, on in given.items() if on]


def build_job(
    opened: StudentDir,
    wanted: Sequence[Target],
    options: GraphOptions,
    limits: Limits,
    guard_data: Sequence[Example] | None,
    calibration_rows: int,
    say: Callable[[str], None],
) -> ExportJob:
    """Read the student, check its rows, calibrate, and collect the inputs of its graphs."""
    model = opened.load_model()
    weights = weights_of(model)
    check_layers(weights, options.keep_float)
    tokenizer = opened.tokenizer()
    check_covered(tokenizer, len(weights.embedding), opened.path)
    plan = plan_labels(opened.task, tokenizer, weights.eos_id)
    rows = _checked_rows(opened, plan, guard_data)
    if options.label_only and plan.method == "decode":
        raise UsageError("Open labels need the graph that generates text; leave out label_only.")
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
                f"{target.name} is calibrated on rows, but this student has none stored; pass labelled rows as guard_data, "
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
    return ExportJob(opened, model, pruned, full, small, rows, limits, options.long, say)


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
