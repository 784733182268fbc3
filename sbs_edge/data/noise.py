"""Checks on label noise and balance: how often the teacher is wrong, and whether splits have the same labels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from sbs_edge.data.answers import label_key, same_answer
from sbs_edge.data.example import Example, Splits, TaskSpec
from sbs_edge.data.finding import Finding, learnt_label, parts, places
from sbs_edge.data.targets import Mode

__all__ = ["balance_of", "label_distributions", "teacher_errors", "teacher_noise"]

WARN_WRONG = 0.3
LEAST_OF_LABEL = 20
WARN_OF_LABEL = 0.5
LEAST_FOR_DISTRIBUTION = 50
WARN_DISTANCE = 0.15


def _wrong(rows: Sequence[Example], task: TaskSpec) -> tuple[list[Example], list[Example]]:
    """Return the rows that have gold and teacher's label, and those of them where the two differ."""
    known = [row for row in rows if row.label is not None and row.teacher_label is not None]
    return known, [
        row for row in known if not same_answer(row.label or "", row.teacher_label or "", task.compare)
    ]


def teacher_errors(rows: Sequence[Example], task: TaskSpec) -> dict[str, Any] | None:
    """Return how often the teacher's label is not the gold one; None where no row has both.

    ``rows``, ``wrong``, ``share``, and for a closed set ``labels``: rows and wrong ones of each gold label, the most
    often wrong first.
    """
    known, wrong = _wrong(rows, task)
    if not known:
        return None
    totals = Counter((row.label or "").strip() for row in known)
    errors = Counter((row.label or "").strip() for row in wrong)
    labels = (
        sorted(totals, key=lambda label: -errors[label] / totals[label])
        if task.label_kind == "closed"
        else []
    )
    return {
        "rows": len(known),
        "wrong": len(wrong),
        "share": len(wrong) / len(known),
        "labels": [{"label": label, "rows": totals[label], "wrong": errors[label]} for label in labels],
    }


def teacher_noise(splits: Splits, mode: Mode | None) -> Iterator[Finding]:
    """Warn where the teacher is wrong in many training rows, or in most rows of some label."""
    if mode == "finetune":
        return
    errors = teacher_errors(splits.train, splits.task)
    if errors is None or errors["rows"] < LEAST_OF_LABEL:
        return
    wrong = _wrong(splits.train, splits.task)[1]
    if errors["share"] >= WARN_WRONG:
        yield Finding(
            "warn",
            "teacher-noise",
            f"The teacher's label is not the gold one in {errors['wrong']} of {errors['rows']} training rows "
            f"({errors['share']:.0%}). A student of the teacher's labels learns these errors, and their rationales argue "
            "for them: improve the prompt, ask for several samples, or train on the gold labels.",
            places(wrong),
            figures=errors,
        )
    missed = [
        item
        for item in errors["labels"]
        if item["rows"] >= LEAST_OF_LABEL and item["wrong"] >= WARN_OF_LABEL * item["rows"]
    ]
    if missed:
        shown = ", ".join(f"{item['label']!r} {item['wrong']} of {item['rows']}" for item in missed[:5])
        names = {item["label"] for item in missed}
        yield Finding(
            "warn",
            "teacher-misses-label",
            f"The teacher is wrong in at least half of the training rows of some labels: {shown}. Describe these labels in "
            "the task, with an example of each.",
            places(row for row in wrong if (row.label or "").strip() in names),
            figures={"labels": missed},
        )


def balance_of(labels: Sequence[str]) -> dict[str, Any] | None:
    """Return how evenly labels are spread: most and least frequent one, and entropy as a share of the most possible."""
    counts = Counter(label.strip() for label in labels)
    if not counts:
        return None
    total = sum(counts.values())
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    (most, n_most), *_, (least, n_least) = [counts.most_common(1)[0], counts.most_common()[-1]]
    return {
        "most": {"label": most, "rows": n_most},
        "least": {"label": least, "rows": n_least},
        "evenness": entropy / math.log(len(counts)) if len(counts) > 1 else 0.0,
    }


def label_distributions(splits: Splits, mode: Mode | None) -> Iterator[Finding]:
    """Warn where a held-out split has its labels in clearly other shares than training."""
    if splits.task.label_kind != "closed":
        return
    counts = {
        name: Counter(label_key(label) for row in rows if (label := learnt_label(row, mode)) is not None)
        for name, rows in parts(splits)
    }
    train = counts.pop("train", Counter())
    for name, own in counts.items():
        n, m = sum(train.values()), sum(own.values())
        if min(n, m) < LEAST_FOR_DISTRIBUTION:
            continue
        labels = sorted(train | own, key=lambda label: -abs(train[label] / n - own[label] / m))
        distance = sum(abs(train[label] / n - own[label] / m) for label in labels) / 2
        # Of two samples of one distribution, the distance is about sqrt(K / (2 pi) * (1/n + 1/m)).
        by_chance = math.sqrt(len(labels) / (2 * math.pi) * (1 / n + 1 / m))
        if distance < max(WARN_DISTANCE, 3 * by_chance):
            continue
        first = labels[0]
        yield Finding(
            "warn",
            "labels-differ",
            f"The labels of {name} are spread differently from those of training: {distance:.0%} of the rows would need "
            f"another label. {first!r} has {train[first] / n:.0%} of the training rows and {own[first] / m:.0%} of {name}. "
            "Accuracy there is not what training aims at: draw the splits from the same rows.",
            figures={"split": name, "distance": round(distance, 4)},
        )
