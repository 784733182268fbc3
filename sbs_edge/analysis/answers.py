"""Accuracy of a student by label, confidence, length and column, and its most confident errors."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sbs_edge.analysis.intervals import accuracy_of, gain_of
from sbs_edge.analysis.reliability import expected_calibration_error, reliability
from sbs_edge.data.example import Example, TaskSpec
from sbs_edge.data.labels import MAX_CLOSED_LABELS, ROWS_PER_LABEL

__all__ = ["JudgedAnswer", "analyse", "analyse_answers"]

SHOWN_ERRORS = 20
SHOWN_VALUES = 20
SHOWN_CONFUSIONS = 10
N_GROUPS = 5
LEAST_IN_GROUP = 10
OTHER = "(other)"


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """A student's answer to a row whose right label is known.

    Attributes:
        row: the input with what is known about it.
        wanted: the label that counts as right, the gold one or the teacher's.
        label: the student's.
        right: whether they are the same answer.
        probability: of ``label``, or None where the student gives none.
        n_tokens: tokens the student read.

    """

    row: Example
    wanted: str
    label: str
    right: bool
    probability: float | None
    n_tokens: int


def analyse(
    answers: Sequence[JudgedAnswer],
    task: TaskSpec,
    slices: Mapping[str, Sequence[str]] | None = None,
    explain: Callable[[Sequence[Example]], Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Return the error analysis of some answers as plain values.

    Args:
        answers: at least one.
        task: what kind of label they have.
        slices: column name to the value of each answer's row.
        explain: writes the student's rationales for the rows of the errors shown; None: it writes none.

    Returns:
        ``n``, ``accuracy``, ``low`` and ``high`` (its 95 % interval); ``labels``: for each label its ``rows``,
        how often it was ``answered``, ``precision``, ``recall`` and ``f1``; ``macro_f1``; ``majority``: the most
        frequent label with its share, and the ``gain`` over always answering it; ``confusion``: ``labels`` and
        ``counts`` (K, K), a row for each right label; ``confusions``: the most frequent ones. All of these are empty
        or None where labels differ from row to row. ``reliability`` with ``ece`` (None without probabilities),
        ``lengths`` (accuracy by tokens read), ``slices`` (accuracy by value of each column), and ``errors``, the
        most confident first.

    """
    right = [answer.right for answer in answers]
    found: dict[str, Any] = {**accuracy_of(right), **_by_label(answers, task)}
    known = [(a.probability, a.right) for a in answers if a.probability is not None]
    found["reliability"] = None
    if known:
        confidence, hits = np.array([p for p, _ in known]), np.array([r for _, r in known])
        ece = expected_calibration_error(confidence, hits)
        found["reliability"] = {"ece": ece, **reliability(confidence, hits)}
    found["lengths"] = _groups([float(answer.n_tokens) for answer in answers], right)
    found["slices"] = {name: _slice(values, right) for name, values in (slices or {}).items()}
    wrong = sorted(
        (answer for answer in answers if not answer.right),
        key=lambda answer: -1.0 if answer.probability is None else answer.probability,
        reverse=True,
    )[:SHOWN_ERRORS]
    rationales = explain([answer.row for answer in wrong]) if explain and wrong else itertools.repeat(None)
    found["errors"] = [_error(answer, text) for answer, text in zip(wrong, rationales, strict=False)]
    return found


def analyse_answers(
    rows: Sequence[Example],
    labels: Sequence[str],
    probabilities: Sequence[float | None],
    n_tokens: Sequence[int],
    task: TaskSpec,
    same: Callable[[str, str], bool],
    slices: Mapping[str, Sequence[str]] | None = None,
    explain: Callable[[Sequence[Example]], Sequence[str]] | None = None,
) -> dict[str, Any] | None:
    """Judge a student's labels and analyse them (:func:`analyse`); None where no row has a label to judge by.

    Args:
        rows: (n,) rows answered.
        labels: (n,) the student's labels.
        probabilities: (n,) of these labels.
        n_tokens: (n,) tokens read.
        task: what kind of label they have.
        same: tells whether an answer is the wanted label.
        slices: column name to (n,) values.
        explain: as for :func:`analyse`.

    Returns:
        the analysis, and as ``reference`` ``gold``, or ``teacher`` where no row has a gold label.

    """
    reference = "gold" if any(row.label is not None for row in rows) else "teacher"
    wanted = [row.label if reference == "gold" else row.teacher_label for row in rows]
    kept = [index for index, label in enumerate(wanted) if label is not None]
    answers = [
        JudgedAnswer(
            rows[i],
            wanted[i] or "",
            labels[i],
            same(labels[i], wanted[i] or ""),
            probabilities[i],
            n_tokens[i],
        )
        for i in kept
    ]
    if not answers:
        return None
    own = {name: [values[i] for i in kept] for name, values in (slices or {}).items()}
    return {"reference": reference, **analyse(answers, task, own, explain)}


def _error(answer: JudgedAnswer, rationale: str | None) -> dict[str, Any]:
    row = answer.row
    return {
        "id": row.id,
        "source": row.source,
        "input": row.input,
        "wanted": answer.wanted,
        "label": answer.label,
        "probability": answer.probability,
        "rationale": rationale,
        "teacher_label": row.teacher_label,
        "teacher_rationale": row.rationale,
    }


def _by_label(answers: Sequence[JudgedAnswer], task: TaskSpec) -> dict[str, Any]:
    rows = Counter(answer.wanted.strip() for answer in answers)
    classes = task.label_kind == "closed" or (
        task.compare == "text" and len(rows) <= min(MAX_CLOSED_LABELS, len(answers) // ROWS_PER_LABEL)
    )
    if not classes:
        return {
            "labels": [], "macro_f1": None, "majority": None, "gain": None, "confusion": None, "confusions": [],
        }  # fmt: skip
    # An answer may be right in another spelling; it stands under the label it was right about.
    pairs = Counter(
        (a.wanted.strip(), a.wanted.strip() if a.right else a.label.strip() or OTHER) for a in answers
    )
    names = list(dict.fromkeys([*task.labels, *sorted(rows)]))
    if any(given not in set(names) for _, given in pairs):
        pairs = _with_others(pairs, set(names))
        names.append(OTHER)
    answered: Counter[str] = Counter()
    for (_, given), count in pairs.items():
        answered[given] += count
    labels = [_scores(name, pairs[name, name], rows[name], answered[name]) for name in names if name != OTHER]
    scored = [item["f1"] for item in labels if item["rows"]]
    most, count = max(rows.items(), key=lambda item: item[1])
    wrong = Counter({pair: count for pair, count in pairs.items() if pair[0] != pair[1]})
    return {
        "labels": labels,
        "macro_f1": sum(scored) / len(scored),
        "majority": {"label": most, "share": count / len(answers)},
        "gain": gain_of([a.right for a in answers], [a.wanted.strip() == most for a in answers]),
        "confusion": {
            "labels": names,
            "counts": [[pairs[wanted, given] for given in names] for wanted in names],
        },
        "confusions": [
            {"wanted": wanted, "label": given, "rows": count}
            for (wanted, given), count in wrong.most_common(SHOWN_CONFUSIONS)
        ],
    }


def _with_others(pairs: Counter[tuple[str, str]], names: set[str]) -> Counter[tuple[str, str]]:
    """Count the answers outside ``names`` under :data:`OTHER`."""
    found: Counter[tuple[str, str]] = Counter()
    for (wanted, given), count in pairs.items():
        found[wanted, given if given in names else OTHER] += count
    return found


def _scores(name: str, hits: int, rows: int, answered: int) -> dict[str, Any]:
    return {
        "label": name,
        "rows": rows,
        "answered": answered,
        "precision": hits / answered if answered else None,
        "recall": hits / rows if rows else None,
        "f1": 2 * hits / (rows + answered) if rows + answered else None,
    }


def _groups(values: Sequence[float], right: Sequence[bool]) -> list[dict[str, Any]]:
    """Return accuracy in at most five groups of about equal size, by value; equal values stay together."""
    order = np.argsort(np.array(values), kind="stable")
    numbers, hits = np.array(values)[order], np.array(right)[order]
    count = max(1, min(N_GROUPS, len(values) // LEAST_IN_GROUP))
    changes = np.flatnonzero(np.diff(numbers)) + 1
    wanted = [k * len(values) / count for k in range(1, count)] if len(changes) else []
    cuts = sorted({int(changes[np.abs(changes - place).argmin()]) for place in wanted})
    return [
        {
            "from": float(numbers[start]),
            "to": float(numbers[end - 1]),
            **accuracy_of(hits[start:end].tolist()),
        }
        for start, end in itertools.pairwise([0, *cuts, len(values)])
    ]


def _slice(values: Sequence[str], right: Sequence[bool]) -> list[dict[str, Any]]:
    """Return accuracy by value, the most frequent first; many different numbers are grouped by size."""
    counts = Counter(values)
    if len(counts) > SHOWN_VALUES and (numbers := _numbers(values)) is not None:
        return [
            {"value": f"{group.pop('from'):g} to {group.pop('to'):g}", **group}
            for group in _groups(numbers, right)
        ]
    shown = [value for value, _ in counts.most_common(SHOWN_VALUES)]
    of_value: dict[str, list[bool]] = {value: [] for value in shown}
    for value, hit in zip(values, right, strict=True):
        of_value.setdefault(value if value in of_value else OTHER, []).append(hit)
    return [{"value": value, **accuracy_of(hits)} for value, hits in of_value.items()]


def _numbers(values: Sequence[str]) -> list[float] | None:
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).all() else None
