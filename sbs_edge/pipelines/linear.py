"""A baseline: a linear model on hashed words and word pairs, trained on the same rows as the students.

It answers in microseconds. A task that it solves as well as a student does not need a student for its labels.
"""

from __future__ import annotations

import itertools
import random
import re
import statistics
import time
from collections.abc import Sequence
from typing import Any
from zlib import crc32

from sbs_edge.data.answers import same_answer
from sbs_edge.data.example import Example, Splits

__all__ = ["BUCKETS", "features", "linear_baseline", "linear_sentence"]

BUCKETS = 1 << 16
"""Columns that words and word pairs are hashed to."""

_MOST_LABELS = 200
_MOST_ROWS = 50_000
_PENALTIES = (1e-5, 1e-4, 1e-3)
_STEPS = 150


def features(text: str) -> list[int]:
    """Return the columns, in [0, BUCKETS), of the words and the pairs of neighbouring words of ``text``, each once."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    pairs = [f"{first} {second}" for first, second in itertools.pairwise(words)]
    return sorted({crc32(part.encode("utf-8", "surrogatepass")) % BUCKETS for part in (*words, *pairs)})


def linear_baseline(splits: Splits, gold: bool) -> dict[str, Any]:
    """Train the linear model and judge it on validation and test rows.

    The strength of the penalty is chosen on validation rows.

    Args:
        splits: with a closed label set.
        gold: learn and judge by gold labels, or by the teacher's.

    Returns:
        ``accuracy`` (split -> ``share`` and ``n``, or None), ``ms`` (median of one label) and ``penalty``; or ``why``
        where the task has no label set to choose from.

    """
    if splits.task.label_kind != "closed":
        return {
            "why": f"a linear model chooses among fixed labels, and this task's are {splits.task.label_kind}"
        }
    labels = list(splits.task.labels)

    def place(row: Example) -> int | None:
        label = row.label if gold else row.teacher_label
        if label is None:
            return None
        return next((n for n, own in enumerate(labels) if same_answer(own, label, splits.task.compare)), None)

    def judged(rows: Sequence[Example]) -> tuple[list[list[int]], list[int]]:
        known = [(features(row.input), found) for row in rows if (found := place(row)) is not None]
        return [each for each, _ in known], [found for _, found in known]

    few = len(splits.train) <= _MOST_ROWS
    inputs, wanted = judged(splits.train if few else random.Random(0).sample(splits.train, _MOST_ROWS))
    if not inputs or not 2 <= len(labels) <= _MOST_LABELS:
        return {
            "why": f"a linear model is trained on 2 to {_MOST_LABELS} labels, and there are {len(labels)}"
        }
    held = {name: judged(getattr(splits, name)) for name in ("validation", "test")}
    best: tuple[float, float, Any, Any] | None = None
    for penalty in _PENALTIES:
        weight, bias = _fit(inputs, wanted, len(labels), penalty)
        rows, answers = held["validation"] if held["validation"][0] else (inputs, wanted)
        found = _share(weight, bias, rows, answers)
        if best is None or found > best[0]:
            best = (found, penalty, weight, bias)
    assert best is not None
    _, penalty, weight, bias = best
    return {
        "accuracy": {
            name: {"share": _share(weight, bias, rows, answers), "n": len(rows)} if rows else None
            for name, (rows, answers) in held.items()
        },
        "ms": _milliseconds(weight, bias, [row.input for row in splits.test or splits.train]),
        "penalty": penalty,
    }


def linear_sentence(
    linear: dict[str, Any], split: str, reached: float | None, within: float = 1.0
) -> str | None:
    """Return what the linear model says about the task, in a sentence or two; None where that is unknown.

    Args:
        linear: of :func:`linear_baseline`.
        split: the rows that are compared on, ``validation`` or ``test``.
        reached: the best student's accuracy on them as a share.
        within: points that the linear model may be worse and still solves the task as well.

    """
    own = (linear.get("accuracy") or {}).get(split)
    if own is None or reached is None:
        return None
    figures = f"{100 * own['share']:.1f} % on {split} rows, {linear['ms']:.3f} ms a label"
    if own["share"] >= reached - within / 100 - 1e-9:
        return (
            f"A linear model on word n-grams solves this task as well: {figures}, against {100 * reached:.1f} % of the best "
            "student. Unless you need rationales, use that."
        )
    behind = f"{100 * (reached - own['share']):.1f} points less than the best student"
    return f"A linear model on word n-grams reaches {figures}: {behind}."


def _fit(inputs: list[list[int]], wanted: list[int], n_labels: int, penalty: float) -> tuple[Any, Any]:
    """Return weight (BUCKETS, K) and bias (K,) of the logistic regression with a squared penalty, as numpy arrays."""
    import torch

    flat = torch.tensor([column for row in inputs for column in row])
    ends = torch.tensor([0, *(len(row) for row in inputs[:-1])]).cumsum(0)
    scales = torch.tensor([len(row) ** -0.5 for row in inputs for _ in row])  # rows of equal norm
    target = torch.tensor(wanted)
    weight = torch.zeros(BUCKETS, n_labels, requires_grad=True)
    bias = torch.zeros(n_labels, requires_grad=True)
    optimiser = torch.optim.Adam([weight, bias], lr=0.1)
    for _ in range(_STEPS):
        optimiser.zero_grad()
        logits = (
            torch.nn.functional.embedding_bag(flat, weight, ends, mode="sum", per_sample_weights=scales)
            + bias
        )
        loss = torch.nn.functional.cross_entropy(logits, target) + penalty * weight.square().sum()
        loss.backward()
        optimiser.step()
    return weight.detach().numpy(), bias.detach().numpy()


def _answer(weight: Any, bias: Any, columns: list[int]) -> int:
    scores = weight[columns].sum(0) * (len(columns) or 1) ** -0.5 + bias
    return int(scores.argmax())


def _share(weight: Any, bias: Any, rows: list[list[int]], answers: list[int]) -> float:
    right = sum(_answer(weight, bias, row) == answer for row, answer in zip(rows, answers, strict=True))
    return right / len(rows)


def _milliseconds(weight: Any, bias: Any, texts: Sequence[str]) -> float:
    taken = []
    for text in texts[:200]:
        start = time.perf_counter()
        _answer(weight, bias, features(text))
        taken.append((time.perf_counter() - start) * 1e3)
    return round(statistics.median(taken), 4)
