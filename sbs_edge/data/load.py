"""Load examples from any source: the built-in task, files, data sets, the paper's layout."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from rich.console import Console

from sbs_edge import files
from sbs_edge.data import hub, shift_log
from sbs_edge.data.builtin import builtin_splits
from sbs_edge.data.example import LabelKind, Splits, TaskSpec
from sbs_edge.data.labels import Respelling, fit_labels, infer_task
from sbs_edge.data.paper import PAPER_DATASETS, read_paper_files
from sbs_edge.data.readers import ColumnMap, ReadResult, RejectedRow, collect, examples_of, refuse
from sbs_edge.data.rows import FORMATS, iterate_rows
from sbs_edge.data.splits import VALIDATION_SHARE, check_disjoint, drop_overlaps, hold_out
from sbs_edge.errors import DataError

__all__ = [
    "Source",
    "SourceOptions",
    "hold_out_missing",
    "infer_task",
    "load_splits",
    "open_source",
    "open_splits",
]

# Names of the three splits in files and in Hugging Face data sets.
_ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "eval"),
}


@dataclass(slots=True)
class Source:
    """A source as it is: the rows of its own splits, before any are held out or dropped.

    Attributes:
        task: given or inferred.
        found: split name to usable and rejected rows.
        unparsed: split name to the number of raw teacher outputs without a readable label.
        respelled: split name to the labels that were spelled differently from the task's set.
        is_builtin: it is a built-in task, whose splits are whole and disjoint.
    """

    task: TaskSpec
    found: dict[str, ReadResult] = field(default_factory=dict)
    unparsed: dict[str, int] = field(default_factory=dict)
    respelled: dict[str, list[Respelling]] = field(default_factory=dict)
    is_builtin: bool = False


def _read_file(path: Path, columns: ColumnMap) -> ReadResult:
    return collect(examples_of(iterate_rows(path), str(path), columns, path.stem))


def _from_hub(source: str | Path, columns: ColumnMap) -> dict[str, ReadResult]:
    there = hub.split_names(source)
    found = {}
    for ours, names in _ALIASES.items():
        for name in names:
            if name in there:
                rows = hub.iterate_dataset(source, name)
                found[ours] = collect(examples_of(rows, f"{source}[{name}]", columns, name))
                break
    if "train" not in found:
        raise DataError(f"The data set {source} has no split 'train'; it has {', '.join(there)}.")
    return found


def _from_folder(folder: Path, columns: ColumnMap) -> dict[str, ReadResult]:
    found: dict[str, ReadResult] = {}
    for ours, names in _ALIASES.items():
        here = [
            folder / f"{name}{suffix}"
            for name in names
            for suffix in FORMATS
            if (folder / f"{name}{suffix}").is_file()
        ]
        if len(here) > 1:
            raise DataError(
                f"{folder} has {here[0].name} and {here[1].name}, both for {ours} rows. Keep one."
            )
        if here:
            found[ours] = _read_file(here[0], columns)
    if "train" in found:
        return found
    for name in PAPER_DATASETS:
        if (folder / name).is_dir() or (folder / f"{name}_train.json").is_file():
            raise DataError(f"{folder} has {name} in the paper's layout: pass dataset={name!r}.")
    raise DataError(
        f"{folder} has no training rows. Name their file train, with one of the endings {', '.join(FORMATS)} "
        "(and validation and test likewise), or give the file itself."
    )


class SourceOptions(TypedDict, total=False):
    """Keyword arguments that say how a source is read; :func:`load_splits` explains them."""

    dataset: str | None
    validation: str | Path | None
    test: str | Path | None
    label_kind: LabelKind | None
    compare: Literal["text", "value"]
    columns: ColumnMap


def _drawn_splits(source: str | Path | None, seed: int) -> Splits | None:
    """Return the splits of a built-in task, or None if ``source`` does not name one."""
    if source is None or str(source) == "builtin":
        return builtin_splits(seed=seed)
    if str(source) in (shift_log.NAME, shift_log.LATEST_NAME):
        return shift_log.shift_log_splits(seed, latest=str(source) == shift_log.LATEST_NAME)
    return None


def open_splits(
    source: str | Path | None, seed: int = 0, **options: Unpack[SourceOptions]
) -> tuple[Source, Splits]:
    """Open a source, or a built-in task as ``seed`` draws it; nothing is held out, dropped or refused."""
    drawn = _drawn_splits(source, seed) if options.get("dataset") is None else None
    if drawn is not None:
        rows = {name: ReadResult(getattr(drawn, name)) for name in ("train", "validation", "test")}
        return Source(drawn.task, rows, is_builtin=True), drawn
    opened = open_source(source or ".", **options)
    parts: dict[str, Any] = {name: part.examples for name, part in opened.found.items()}
    return opened, Splits(opened.task, **parts, unparsed=opened.unparsed)


def open_source(source: str | Path, **options: Unpack[SourceOptions]) -> Source:
    """Read a source as it is; arguments as for :func:`load_splits`. Bad rows are returned, not raised."""
    dataset, columns = options.get("dataset"), options.get("columns", ColumnMap())
    if dataset is not None:
        paper = read_paper_files(source, dataset)
        found = {name: ReadResult(rows, paper.rejected[name]) for name, rows in paper.splits.items()}
        return Source(paper.task, found, paper.unparsed)
    path = Path(source)
    if hub.is_dataset(source):
        found = _from_hub(source, columns)
    elif path.is_dir():
        found = _from_folder(path, columns)
    elif path.is_file():
        found = {"train": _read_file(path, columns)}
    else:
        raise DataError(f"There is no file or directory {source}. Check the path.")
    for name, extra in (("validation", options.get("validation")), ("test", options.get("test"))):
        if extra is not None:
            found[name] = _read_file(Path(extra), columns)
    rows = [example for part in found.values() for example in part.examples]
    for part in found.values():
        _reject_unlabelled(part)
    kind, compare = options.get("label_kind"), options.get("compare", "text")
    opened = Source(infer_task(path.stem or str(source), rows, kind, compare), found)
    for name, part in found.items():
        part.examples[:], opened.respelled[name] = fit_labels(part.examples, opened.task)
    return opened


def _reject_unlabelled(part: ReadResult) -> None:
    """Move rows without any label to the rejected ones, because nothing can be learnt from them."""
    kept = []
    for example in part.examples:
        if example.label is not None or example.teacher_label is not None:
            kept.append(example)
            continue
        file, _, line = example.source.rpartition(":")
        raw = json.dumps({"id": example.id, "input": example.input}, ensure_ascii=False)
        part.rejected.append(RejectedRow(file, int(line), "neither 'label' nor 'teacher_label'", raw))
    part.examples[:] = kept
    part.rejected.sort(key=lambda row: row.line)


def write_skipped(path: str | Path, rejected: Sequence[RejectedRow]) -> None:
    """Write a JSON object for each skipped row: file, line, reason, detail and the original row."""
    lines = (
        json.dumps(
            {"file": r.file, "line": r.line, "reason": r.reason, "detail": r.detail, "raw": r.raw},
            ensure_ascii=False,
        )
        for r in rejected
    )
    files.write_text(path, "".join(line + "\n" for line in lines))


def load_splits(
    source: str | Path | None = None,
    *,
    dataset: str | None = None,
    validation: str | Path | None = None,
    test: str | Path | None = None,
    label_kind: LabelKind | None = None,
    compare: Literal["text", "value"] = "text",
    columns: ColumnMap = ColumnMap(),  # noqa: B008 (frozen)
    skip_bad_rows: bool = False,
    seed: int = 0,
    skipped_file: str | Path | None = None,
) -> Splits:
    """Load disjoint splits from any source.

    Without a test split, a tenth of the inputs is held out as one; without a validation split, a tenth of the rest.
    Rows are chosen by ``seed``, stratified by label in closed tasks, and equal inputs stay together.

    Args:
        source: None or ``"builtin"``; ``"shift-log"`` or ``"shift-log-latest"``; a file; a folder with ``train``,
            ``validation`` and ``test`` files; a saved Hugging Face data set or the name of one; with ``dataset``, a
            folder in the paper's layout.
        dataset: ``cqa``, ``svamp``, ``anli1`` or ``esnli``.
        validation: file of validation rows.
        test: file of test rows.
        label_kind: instead of the inferred one (:func:`infer_task`).
        compare: how labels are compared: as text, or by arithmetic value.
        columns: which column is which field.
        skip_bad_rows: leave out unusable rows, and training and validation rows whose
            input a later split has too; stderr gives their number.
        seed: decides which rows are held out, and draws a built-in task.
        skipped_file: JSON Lines file of the skipped rows, written only if there are any.

    Raises:
        DataError: an unusable row or an input in two splits (unless ``skip_bad_rows``), or no rows.

    """
    opened, splits = open_splits(
        source, seed, dataset=dataset, validation=validation, test=test, label_kind=label_kind, compare=compare,
        columns=columns,
    )  # fmt: skip
    if opened.is_builtin:
        return splits
    rejected = [row for part in opened.found.values() for row in part.rejected]
    if not skip_bad_rows:
        refuse(rejected)
    if not splits.train:
        why = f"all {len(rejected)} rows were rejected" if rejected else "it is empty"
        raise DataError(f"{source} has no usable training row: {why}.")
    if skip_bad_rows:
        rejected += drop_overlaps(splits)
    check_disjoint(splits)
    hold_out_missing(splits, opened, str(source), seed)
    _tell_respelled([item for items in opened.respelled.values() for item in items])
    if rejected:
        _tell(rejected, skipped_file)
    return splits


def hold_out_missing(splits: Splits, opened: Source, source: str, seed: int) -> None:
    """Hold out the missing splits from the training rows by ``seed``, in place."""
    for name in ("test", "validation"):
        if name not in opened.found:
            splits.train, held = hold_out(
                splits.train, VALIDATION_SHARE, seed, stratify=splits.task.label_kind == "closed"
            )
            setattr(splits, name, held)
    for name in ("train", "validation", "test"):
        if not getattr(splits, name):
            raise DataError(
                f"{source} has too few rows for the split {name!r}. Give at least three different inputs, and more "
                "than one for some label of a closed set; or give the split's own file."
            )


def _tell_respelled(respelled: Sequence[Respelling]) -> None:
    if respelled:
        shown = "; ".join(map(str, respelled[:5])) + (
            f"; and {len(respelled) - 5} more" if len(respelled) > 5 else ""
        )
        Console(stderr=True).print(
            f"Labels of one spelling: {shown}.", markup=False, highlight=False, soft_wrap=True
        )


def _tell(rejected: Sequence[RejectedRow], skipped_file: str | Path | None) -> None:
    where = ""
    if skipped_file is not None:
        write_skipped(skipped_file, rejected)
        where = f"; they are listed in {skipped_file}"
    reasons = sorted({row.reason for row in rejected})
    Console(stderr=True).print(
        f"Skipped {len(rejected)} row(s): {'; '.join(reasons)}{where}.", markup=False, soft_wrap=True
    )
