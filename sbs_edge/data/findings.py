"""Checks on splits before training: each is a function in :data:`CHECKS` that yields findings.

A finding of level ``stop`` means that training would fail, or that the student would be meaningless.
``warn`` means that training works, but somebody should look. ``data check`` lists all findings; ``train`` and
``run`` print the warnings and refuse to train if there is a stop.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Literal

from sbs_edge.data.alignment import agreement, classes_beside_inputs, texts_beside_inputs
from sbs_edge.data.answers import label_key, normalise
from sbs_edge.data.example import Splits
from sbs_edge.data.finding import SHOWN, Check, Finding, learnt_label, parts, places
from sbs_edge.data.near_duplicates import near_duplicates
from sbs_edge.data.noise import label_distributions, teacher_noise
from sbs_edge.data.rationale_checks import rationale_findings
from sbs_edge.data.targets import Mode
from sbs_edge.errors import DataError

__all__ = ["CHECKS", "STOPPING_CHECKS", "Finding", "examine", "refuse_stops", "seen_by", "verdict"]

RARE_ROWS = 5
DOMINANT_SHARE = 0.95
UNPARSED_WARN, UNPARSED_STOP = 0.2, 1.0


def examine(splits: Splits, mode: Mode | None = None, checks: Iterable[Check] | None = None) -> list[Finding]:
    """Run the checks.

    Args:
        splits: the rows; an empty validation or test split is skipped.
        mode: the training mode, or None if it is not known. ``finetune`` skips the checks of the teacher.
        checks: those to run; None: all.

    """
    return [finding for check in (CHECKS if checks is None else checks) for finding in check(splits, mode)]


def seen_by(splits: Splits, mode: Mode) -> Splits:
    """Return the rows as ``mode`` sees them: no test rows, and no gold labels if it learns the teacher's."""
    if mode in ("finetune", "stepwise"):
        return dataclasses.replace(splits, test=[])
    train, validation = (
        [dataclasses.replace(row, label=None) for row in rows] for rows in (splits.train, splits.validation)
    )
    return dataclasses.replace(splits, train=train, validation=validation, test=[])


def verdict(findings: Iterable[Finding]) -> Literal["ok", "warn", "stop"]:
    """Return the worst level among ``findings``."""
    levels = {finding.level for finding in findings}
    return "stop" if "stop" in levels else "warn" if "warn" in levels else "ok"


def refuse_stops(findings: Iterable[Finding]) -> None:
    """Raise :class:`DataError` with all findings of level ``stop``, if there are any."""
    stops = [finding for finding in findings if finding.level == "stop"]
    if stops:
        raise DataError(" ".join(finding.message for finding in stops) + " Nothing was trained.")


def one_label(splits: Splits, mode: Mode | None) -> Iterator[Finding]:
    """Stop if all training rows have the same label."""
    labels = Counter(
        label_key(label) for row in splits.train if (label := learnt_label(row, mode)) is not None
    )
    if splits.task.label_kind != "choices" and len(labels) == 1:
        (label, count), *_ = labels.items()
        yield Finding(
            "stop",
            "one-label",
            f"All {count} training rows have the label {label!r}, so there is nothing to learn. "
            "Add rows with another label.",
            places(splits.train),
        )


def rare_labels(splits: Splits, mode: Mode | None) -> Iterator[Finding]:
    """Warn of labels of a closed set with few training rows, and of a label that nearly all rows have."""
    if splits.task.label_kind != "closed" or not splits.train:
        return
    labels = Counter(label.strip() for row in splits.train if (label := learnt_label(row, mode)) is not None)
    rare = {label: labels[label] for label in splits.task.labels if 0 < labels[label] < RARE_ROWS}
    total = sum(labels.values())
    if rare:
        counts = ", ".join(f"{label!r} {count}" for label, count in rare.items())
        yield Finding(
            "warn",
            "rare-labels",
            f"Some labels have fewer than {RARE_ROWS} of the {total} training rows: {counts}. "
            "Add rows, or expect them to be answered wrongly.",
        )
    if len(labels) > 1 and max(labels.values()) >= DOMINANT_SHARE * total:
        label, count = labels.most_common(1)[0]
        yield Finding(
            "warn",
            "dominant-label",
            f"{count} of {total} training rows have the label {label!r}; a student that always says so is right that often.",
        )


def labels_of_one_split(splits: Splits, mode: Mode | None) -> Iterator[Finding]:
    """Find labels that validation or test have and training lacks, and the other way round."""
    if splits.task.label_kind != "closed" or not splits.train:
        return
    trained = {label.strip() for row in splits.train if (label := learnt_label(row, mode)) is not None}
    for name, rows in parts(splits)[1:]:
        own = [(row, label.strip()) for row in rows if (label := learnt_label(row, mode)) is not None]
        strangers = [(row, label) for row, label in own if label not in trained]
        if strangers:
            names = ", ".join(map(repr, sorted({label for _, label in strangers})[:SHOWN]))
            yield Finding(
                "stop" if 2 * len(strangers) >= len(own) else "warn",
                "labels-not-in-train",
                f"{len(strangers)} of {len(own)} rows of {name} have labels that no training row has: {names}. "
                "Check that both files spell labels alike, or add training rows.",
                places(row for row, _ in strangers),
            )
        if lacking := sorted(trained - {label for _, label in own}):
            yield Finding(
                "warn",
                "labels-not-measured",
                f"No row of {name} has the label {', '.join(map(repr, lacking[:SHOWN]))}"
                f"{f' (and {len(lacking) - SHOWN} more)' if len(lacking) > SHOWN else ''}, so its accuracy is not "
                "measured there.",
            )


def foreign_labels(splits: Splits, mode: Mode | None) -> Iterator[Finding]:
    """Find labels that are not in the closed set or in the row's choices."""
    allowed = set(splits.task.labels)
    fields = ("label",) if mode == "finetune" else ("label", "teacher_label")
    for name, rows in parts(splits):
        for field in fields:
            known = [
                (row, str(getattr(row, field)).strip()) for row in rows if getattr(row, field) is not None
            ]
            foreign = [
                (row, label)
                for row, label in known
                if (own := set(row.choices or ()) or allowed) and label not in own
            ]
            if foreign:
                names = Counter(label for _, label in foreign).most_common(SHOWN)
                yield Finding(
                    "stop" if 2 * len(foreign) > len(known) else "warn",
                    "foreign-labels",
                    f"{name}: {len(foreign)} of {len(known)} values of {field!r} are not among the row's possible "
                    f"labels: {', '.join(f'{label!r} {count}' for label, count in names)}. Correct them, or map them "
                    "to the task's labels.",
                    places(row for row, _ in foreign),
                )


def unparsed_outputs(splits: Splits, mode: Mode | None) -> Iterator[Finding]:
    """Find splits in which many rows lack a teacher label, although other rows or outputs have one."""
    if mode == "finetune":
        return
    for name, rows in parts(splits):
        without = [row for row in rows if row.teacher_label is None]
        missing = splits.unparsed.get(name, 0)
        if not missing and any(row.teacher_label is not None for row in rows):
            missing = len(without)
        share = missing / len(rows)
        if share >= UNPARSED_WARN:
            yield Finding(
                "stop" if share >= UNPARSED_STOP and name == "train" else "warn",
                "unparsed",
                f"{name}: {missing} of {len(rows)} rows have no readable label of the teacher's. Check the outputs' "
                "format and answer marker, or ask for them again.",
                places(without),
            )


def conflicting_labels(splits: Splits, mode: Mode | None) -> Iterator[Finding]:
    """Warn of equal training inputs with different labels."""
    seen: dict[tuple[str, tuple[str, ...] | None], str] = {}
    conflicts = []
    for row in splits.train:
        label = learnt_label(row, mode)
        if (
            label is not None
            and seen.setdefault((normalise(row.input), row.choices), label.strip()) != label.strip()
        ):
            conflicts.append(row)
    if conflicts:
        yield Finding(
            "warn",
            "conflicting-labels",
            f"{len(conflicts)} training row(s) repeat an input with another label. Decide which label is right.",
            places(conflicts),
        )


def quoted_cells(splits: Splits, mode: Mode | None) -> Iterator[Finding]:
    """Warn of columns of a ``.tsv`` file whose cells all stand in quotation marks, as CSV writes them."""
    for name, rows in parts(splits):
        plain = [row for row in rows if row.source.rpartition(":")[0].lower().endswith(".tsv")]
        for field in ("input", "label", "teacher_label", "rationale"):
            cells = [value.strip() for row in plain if (value := getattr(row, field)) is not None]
            if len(cells) > 1 and all(len(c) > 1 and c[0] == c[-1] == '"' for c in cells):
                yield Finding(
                    "warn",
                    "quoted-cells",
                    f"{name}: all {len(cells)} values of {field!r} stand in quotation marks. A .tsv has no quoting, so "
                    "the marks are part of the text: write the file without them, or as .csv with commas.",
                    places(plain),
                )


STOPPING_CHECKS: tuple[Check, ...] = (
    one_label,
    labels_of_one_split,
    foreign_labels,
    unparsed_outputs,
    agreement,
    texts_beside_inputs,
    classes_beside_inputs,
)
"""Checks that may stop a training."""

CHECKS: tuple[Check, ...] = (
    *STOPPING_CHECKS,
    rare_labels,
    label_distributions,
    teacher_noise,
    rationale_findings,
    near_duplicates,
    conflicting_labels,
    quoted_cells,
)
"""All checks; to add one, add its function here."""
