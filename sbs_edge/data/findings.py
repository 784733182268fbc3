"""Checks on splits before training: each is a function in :data:`CHECKS` that yields findings.

A finding of level ``stop`` means that training would fail, or that the student would be meaningless.
``warn`` means that training works, but somebody should look. ``data check`` lists all findings; ``train`` and
``run`` print the warnings and refuse to train if there is a stop.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sbs_edge.data.answers import label_key, normalise
from sbs_edge.data.arithmetic import evaluate_expression
from sbs_edge.data.example import Example, Splits
from sbs_edge.data.targets import Mode, label_for
from sbs_edge.errors import DataError

__all__ = ["CHECKS", "Finding", "examine", "refuse_stops", "seen_by", "verdict"]

SHOWN = 5
MAX_SHIFT = 8
LEAST_FOR_AGREEMENT = 20
RARE_ROWS = 5
DOMINANT_SHARE = 0.95
UNPARSED_WARN, UNPARSED_STOP = 0.2, 1.0


@dataclass(frozen=True, slots=True)
class Finding:
    """A problem that a check found.

    Attributes:
        level: ``warn`` or ``stop``.
        code: stable name, for programs.
        message: the problem, with its numbers, and what to do.
        rows: the first affected rows, as ``file:line``.

    """

    level: Literal["warn", "stop"]
    code: str
    message: str
    rows: tuple[str, ...] = ()


Check = Callable[[Splits, Mode | None], Iterator[Finding]]


def examine(splits: Splits, mode: Mode | None = None) -> list[Finding]:
    """Run all checks.

    Args:
        splits: the rows; an empty validation or test split is skipped.
        mode: the training mode, or None if it is not known. ``finetune`` skips the checks of the teacher.

    """
    return [finding for check in CHECKS for finding in check(splits, mode)]


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


def _parts(splits: Splits) -> list[tuple[str, list[Example]]]:
    return [(name, rows) for name in ("train", "validation", "test") if (rows := getattr(splits, name))]


def _places(rows: Iterable[Example]) -> tuple[str, ...]:
    return tuple(row.source or row.id for row, _ in zip(rows, range(SHOWN), strict=False))


def _learnt(row: Example, mode: Mode | None) -> str | None:
    if mode is not None:
        return label_for(row, mode)
    return row.label if row.label is not None else row.teacher_label


def one_label(splits: Splits, mode: Mode | None) -> Iterator[Finding]:
    """Stop if all training rows have the same label."""
    labels = Counter(label_key(label) for row in splits.train if (label := _learnt(row, mode)) is not None)
    if splits.task.label_kind != "choices" and len(labels) == 1:
        (label, count), *_ = labels.items()
        yield Finding(
            "stop",
            "one-label",
            f"All {count} training rows have the label {label!r}, so there is nothing to learn. "
            "Add rows with another label.",
            _places(splits.train),
        )


def rare_labels(splits: Splits, mode: Mode | None) -> Iterator[Finding]:
    """Warn of labels of a closed set with few training rows, and of a label that nearly all rows have."""
    if splits.task.label_kind != "closed" or not splits.train:
        return
    labels = Counter(label.strip() for row in splits.train if (label := _learnt(row, mode)) is not None)
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
    trained = {label.strip() for row in splits.train if (label := _learnt(row, mode)) is not None}
    parts = _parts(splits)[1:]
    for name, rows in parts:
        own = [(row, label.strip()) for row in rows if (label := _learnt(row, mode)) is not None]
        strangers = [(row, label) for row, label in own if label not in trained]
        if strangers:
            names = ", ".join(map(repr, sorted({label for _, label in strangers})[:SHOWN]))
            yield Finding(
                "stop" if 2 * len(strangers) >= len(own) else "warn",
                "labels-not-in-train",
                f"{len(strangers)} of {len(own)} rows of {name} have labels that no training row has: {names}. "
                "Check that both files spell labels alike, or add training rows.",
                _places(row for row, _ in strangers),
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
    for name, rows in _parts(splits):
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
                    _places(row for row, _ in foreign),
                )


def unparsed_outputs(splits: Splits, mode: Mode | None) -> Iterator[Finding]:
    """Find splits in which many rows lack a teacher label, although other rows or outputs have one."""
    if mode == "finetune":
        return
    for name, rows in _parts(splits):
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
                _places(without),
            )


def agreement(splits: Splits, mode: Mode | None) -> Iterator[Finding]:
    """Stop if teacher and gold agree no better than shuffled rows, and name a shift of rows that fits."""
    if mode == "finetune":
        return
    for name, rows in _parts(splits):
        gold = [_answer_key(row.label, splits) for row in rows]
        teacher = [_answer_key(row.teacher_label, splits) for row in rows]
        equal, total, chance = _agreeing(gold, teacher, 0)
        if total < LEAST_FOR_AGREEMENT:
            continue
        rate, spread = equal / total, math.sqrt(max(chance * (1 - chance), 1 / total) / total)
        shifts = {s: _agreeing(gold, teacher, s) for s in range(-MAX_SHIFT, MAX_SHIFT + 1) if s}
        shift, best = max(shifts.items(), key=lambda item: (item[1][0] / max(item[1][1], 1), -abs(item[0])))
        fits = best[0] / max(best[1], 1) > max(rate + 0.2, chance + 6 * spread)
        if not fits and rate > chance + 3 * spread:
            continue
        message = (
            f"{name}: teacher and gold label agree in {equal} of {total} rows, where shuffled rows would agree in "
            f"about {round(chance * total)}"
        )
        if fits:
            message += f"; moved by {shift:+d} row(s) the teacher's labels agree in {best[0]} of {best[1]}"
            message += ". The outputs belong to other rows: match them by position again."
        else:
            message += ". Check that outputs and rows belong together, and which column is which."
        stop = fits or (name == "train" and chance <= 0.6)
        yield Finding("stop" if stop else "warn", "agreement", message)


def _answer_key(label: str | None, splits: Splits) -> Any:
    if label is None:
        return None
    if splits.task.compare == "value":
        value = evaluate_expression(label)
        return label.strip() if value is None else value
    return label_key(label)


def _agreeing(gold: Sequence[Any], teacher: Sequence[Any], shift: int) -> tuple[int, int, float]:
    """Return the equal rows, the rows with both labels, and the share expected by chance; row i gets output i + shift."""
    pairs = [
        (own, teacher[i + shift])
        for i, own in enumerate(gold)
        if 0 <= i + shift < len(teacher) and own is not None and teacher[i + shift] is not None
    ]
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    chance = sum(count * second[key] for key, count in first.items()) / max(len(pairs), 1) ** 2
    return sum(a == b for a, b in pairs), len(pairs), chance


def conflicting_labels(splits: Splits, mode: Mode | None) -> Iterator[Finding]:
    """Warn of equal training inputs with different labels."""
    seen: dict[tuple[str, tuple[str, ...] | None], str] = {}
    conflicts = []
    for row in splits.train:
        label = _learnt(row, mode)
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
            _places(conflicts),
        )


def quoted_cells(splits: Splits, mode: Mode | None) -> Iterator[Finding]:
    """Warn of columns of a ``.tsv`` file whose cells all stand in quotation marks, as CSV writes them."""
    for name, rows in _parts(splits):
        plain = [row for row in rows if row.source.rpartition(":")[0].lower().endswith(".tsv")]
        for field in ("input", "label", "teacher_label", "rationale"):
            cells = [value.strip() for row in plain if (value := getattr(row, field)) is not None]
            if len(cells) > 1 and all(len(c) > 1 and c[0] == c[-1] == '"' for c in cells):
                yield Finding(
                    "warn",
                    "quoted-cells",
                    f"{name}: all {len(cells)} values of {field!r} stand in quotation marks. A .tsv has no quoting, so "
                    "the marks are part of the text: write the file without them, or as .csv with commas.",
                    _places(plain),
                )


CHECKS: tuple[Check, ...] = (
    one_label,
    rare_labels,
    labels_of_one_split,
    foreign_labels,
    unparsed_outputs,
    agreement,
    conflicting_labels,
    quoted_cells,
)
"""All checks; to add one, add its function here."""
