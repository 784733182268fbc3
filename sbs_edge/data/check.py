"""Describe a source before training on it: the report behind ``sbs-edge data check``."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Unpack

from sbs_edge.data.answers import normalise
from sbs_edge.data.example import Example, Splits
from sbs_edge.data.findings import Finding, examine, verdict
from sbs_edge.data.load import Source, SourceOptions, hold_out_missing, open_splits
from sbs_edge.data.near_duplicates import near_duplicates
from sbs_edge.data.noise import balance_of, teacher_errors
from sbs_edge.data.rationale_checks import rationale_figures
from sbs_edge.data.readers import ReadResult
from sbs_edge.data.samples import samples_to_read
from sbs_edge.data.splits import find_overlaps
from sbs_edge.data.targets import Mode, teacher_agreement
from sbs_edge.data.tokenizer import EOS_ID, load_tokenizer
from sbs_edge.errors import DataError, UsageError
from sbs_edge.label_tokens import check_choices, label_ids, spelling_of_rows, spelling_sentences
from sbs_edge.tokens import TextTokenizer

__all__ = ["check_dataset"]

SHOWN_ROWS = 20
SHOWN_LABELS = 10
_WORD = re.compile(r"\d+|[^\W\d_]+|[^\w\s]|_")


def _counter(folder: str | Path | None) -> tuple[str, Callable[[Sequence[str]], list[int]]]:
    """Return the name of the tokenizer and a function that counts tokens, end-of-sequence included."""
    if folder is None:
        return "words, numbers and signs (tokenizer=DIR counts with a checkpoint's)", lambda texts: [
            len(_WORD.findall(text)) + 1 for text in texts
        ]
    tokenizer = TextTokenizer(load_tokenizer(folder))
    return str(Path(folder) / "tokenizer.json"), lambda texts: list(map(len, tokenizer.encode_batch(texts)))


def _lengths(texts: Sequence[str], count: Callable[[Sequence[str]], list[int]]) -> dict[str, float] | None:
    """Return mean, median, 90th and 99th percentile and maximum, in tokens (nearest rank)."""
    if not texts:
        return None
    lengths = sorted(count(texts))

    def rank(share: float) -> int:
        return lengths[min(len(lengths) - 1, int(share * len(lengths)))]

    return {
        "mean": round(sum(lengths) / len(lengths), 1),
        "p50": rank(0.5),
        "p90": rank(0.9),
        "p99": rank(0.99),
        "max": lengths[-1],
    }


def _split_report(
    name: str,
    part: ReadResult,
    source: Source,
    count: Callable[[Sequence[str]], list[int]],
    mode: Mode | None,
) -> dict[str, Any]:
    rows, task = part.examples, source.task
    known = [row.label if row.label is not None else row.teacher_label for row in rows]
    labels = Counter(label.strip() for label in known if label is not None)
    inputs = Counter(normalise(row.input) for row in rows)
    allowed = set(task.labels)

    def outside(row: Example) -> bool:
        if row.teacher_label is None:
            return False
        return bool(row.choices or allowed) and row.teacher_label.strip() not in (row.choices or allowed)

    return {
        "name": name,
        "rows": len(rows),
        "rejected": dict(Counter(row.reason for row in part.rejected).most_common()),
        "rejected_rows": [str(row) for row in part.rejected[:SHOWN_ROWS]],
        "gold_labels": sum(row.label is not None for row in rows),
        "teacher_labels": sum(row.teacher_label is not None for row in rows),
        "rationales": sum(row.rationale is not None for row in rows),
        "teacher_unparsed": source.unparsed.get(name, 0),
        "teacher_outside_labels": sum(map(outside, rows)),
        "agreement": {**teacher_agreement(rows, task.compare), "rows": len(rows)},
        "labels": {"distinct": len(labels), "most_common": dict(labels.most_common(SHOWN_LABELS))},
        "balance": balance_of([label for label in known if label is not None]),
        "teacher_errors": teacher_errors(rows, task),
        "rationale_quality": rationale_figures(rows, mode),
        "repeated_inputs": len(rows) - len(inputs),
        "tokens": {
            "input": _lengths([row.input for row in rows], count),
            "label": _lengths([label for label in known if label is not None], count),
            "rationale": _lengths([row.rationale for row in rows if row.rationale is not None], count),
        },
    }


def _drawn(
    splits: Splits, source: Source, where: str, seed: int, mode: Mode | None
) -> tuple[dict[str, Any], list[Finding]]:
    """Return the rows per split and label that training would draw, and their near-duplicates."""
    drawn = dataclasses.replace(splits)
    try:
        hold_out_missing(drawn, source, where, seed)
    except DataError as error:
        return {"seed": seed, "problem": str(error)}, []
    for name in source.found:
        if name != "train":
            setattr(drawn, name, [])  # their findings were told already
    near = list(near_duplicates(drawn, mode))
    for name in source.found:
        if name != "train":
            setattr(drawn, name, getattr(splits, name))
    parts = {}
    for name in ("train", "validation", "test"):
        rows = getattr(drawn, name)
        known = (row.label if row.label is not None else row.teacher_label for row in rows)
        counts = Counter(label.strip() for label in known if label is not None)
        parts[name] = {"rows": len(rows), "labels": dict(counts.most_common(SHOWN_LABELS))}
    return {"seed": seed, "splits": parts}, near


def check_dataset(
    source: str | Path | None = None,
    *,
    tokenizer: str | Path | None = None,
    mode: Mode | None = None,
    seed: int = 0,
    **options: Unpack[SourceOptions],
) -> dict[str, Any]:
    """Describe a source split by split, as it is in its files; nothing is held out, dropped or written.

    Args:
        source: as for :func:`sbs_edge.data.load.load_splits`.
        tokenizer: directory with a ``tokenizer.json`` that counts the tokens; by default words,
            numbers and signs are counted, as the tokenizer of the built-in task sees them.
        mode: the training mode to check for; None: any.
        seed: decides which rows training would hold out.
        options: how the source is read, as for ``load_splits``.

    Returns:
        ``source``, ``task``, ``tokenizer``, an entry for each split in ``splits``, ``samples`` (rows to read, the worst
        first), ``spelling`` (see :func:`sbs_edge.label_tokens.spelling_of_rows`; None without ``tokenizer``), ``drawn``
        (the splits that training would draw), ``overlaps`` between splits (at most 20 named), ``problems`` with the
        rows in words, ``findings`` (:class:`~sbs_edge.data.findings.Finding`), ``verdict`` (``ok``, ``warn`` or
        ``stop``), and ``ok``: False when the verdict is ``stop``.

    Raises:
        DataError: the source as a whole cannot be read.

    """
    opened, splits = open_splits(source, **options)
    counted_in, count = _counter(tokenizer)
    reports = [_split_report(name, part, opened, count, mode) for name, part in opened.found.items()]
    overlaps = find_overlaps(splits)
    problems = _problems(reports, len(overlaps))
    spelling, of_tokens = _token_findings(opened, tokenizer)
    findings = [Finding("stop", "unusable", f"{problem}.") for problem in problems] + examine(splits, mode)
    for name, respelled in opened.respelled.items():
        findings += [
            Finding("warn", "label-spelling", f"{name}: {item}.", (item.first,)) for item in respelled
        ]
    findings += of_tokens
    task = opened.task
    drawn = None
    if not problems and not {"train", "validation", "test"} <= set(opened.found):
        drawn, near = _drawn(splits, opened, str(source), seed, mode)
        findings += near
    return {
        "source": str(source or "builtin"),
        "task": {
            "name": task.name,
            "label_kind": task.label_kind,
            "labels": list(task.labels),
            "compare": task.compare,
        },
        "tokenizer": counted_in,
        "spelling": spelling,
        "splits": reports,
        "drawn": drawn,
        "overlaps": {
            "count": len(overlaps),
            "rows": [
                f"{first} row {a.source or a.id} and {second} row {b.source or b.id}"
                for first, a, second, b in overlaps[:SHOWN_ROWS]
            ],
        },
        "problems": problems,
        "samples": samples_to_read(splits, findings, mode, seed),
        "findings": [asdict(finding) for finding in findings],
        "verdict": verdict(findings),
        "ok": verdict(findings) != "stop",
    }


def _problems(reports: Sequence[dict[str, Any]], n_overlaps: int) -> list[str]:
    """Return why training could not use the source, in words."""
    found = []
    for report in reports:
        rejected = sum(report["rejected"].values())
        if rejected:
            found.append(f"{report['name']}: {rejected} row(s) cannot be used")
        if not report["rows"]:
            found.append(f"{report['name']}: no usable row")
    if n_overlaps:
        found.append(f"{n_overlaps} input(s) occur in two splits")
    return found


def _token_findings(
    opened: Source, tokenizer: str | Path | None
) -> tuple[dict[str, Any] | None, list[Finding]]:
    """Return how the tokenizer spells the rows, and what is wrong with that; nothing without a tokenizer."""
    if tokenizer is None:
        return None, []
    texts = TextTokenizer(load_tokenizer(tokenizer))
    rows = [row for part in opened.found.values() for row in part.examples]
    spelling = spelling_of_rows(rows, texts)
    found = [Finding("warn", "spelling", sentence) for sentence in spelling_sentences(spelling)]
    try:
        label_ids(opened.task.labels, texts, EOS_ID)
        check_choices(rows, texts, EOS_ID)
    except UsageError as error:
        found.append(Finding("stop", "label-tokens", str(error)))
    return spelling, found
