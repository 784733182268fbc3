"""Checks that labels, rationales and teacher's outputs belong to the inputs beside them."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from sbs_edge.data.answers import label_key
from sbs_edge.data.arithmetic import evaluate_expression
from sbs_edge.data.example import Example, Splits
from sbs_edge.data.finding import Finding, learnt_label, parts
from sbs_edge.data.labels import MAX_CLOSED_LABELS
from sbs_edge.data.targets import Mode
from sbs_edge.data.words import COMPARED_CHARACTERS, words

__all__ = ["agreement", "classes_beside_inputs", "texts_beside_inputs"]

MAX_SHIFT = 8
SHIFTS = [s for s in range(-MAX_SHIFT, MAX_SHIFT + 1) if s]
LEAST_FOR_AGREEMENT = 20
LEAST_FOR_OVERLAP = 30
LEAST_FOR_CLASSES = 100
COMPARED_ROWS = 2000
"""Rows compared with their neighbours, from the start of a split: a shift shows in few rows."""
SURE = 6.0
"""Standard errors by which a shift must fit better: 16 shifts of several splits are tried."""
_FEATURES = 1 << 14


def agreement(splits: Splits, mode: Mode | None) -> Iterator[Finding]:
    """Stop where teacher and gold agree no better than shuffled rows, and say which shift of rows fits."""
    if mode == "finetune":
        return
    for name, rows in parts(splits):
        gold = [_answer_key(row.label, splits) for row in rows]
        teacher = [_answer_key(row.teacher_label, splits) for row in rows]
        equal, total, chance = _agreeing(gold, teacher, 0)
        if total < LEAST_FOR_AGREEMENT:
            continue
        rate, spread = equal / total, math.sqrt(max(chance * (1 - chance), 1 / total) / total)
        shifts = {s: _agreeing(gold, teacher, s) for s in SHIFTS}
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
        figures = {"split": name, "equal": equal, "rows": total, "by_chance": round(chance, 4)}
        yield Finding("stop" if stop else "warn", "agreement", message, figures=figures)


def _answer_key(label: str | None, splits: Splits) -> Any:
    if label is None:
        return None
    if splits.task.compare == "value":
        value = evaluate_expression(label)
        return label.strip() if value is None else value
    return label_key(label)


def _agreeing(gold: Sequence[Any], teacher: Sequence[Any], shift: int) -> tuple[int, int, float]:
    """Return equal rows, rows that have both, and the share expected of shuffled rows; row i meets output i + shift."""
    pairs = [
        (own, teacher[i + shift])
        for i, own in enumerate(gold)
        if 0 <= i + shift < len(teacher) and own is not None and teacher[i + shift] is not None
    ]
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    chance = sum(count * second[key] for key, count in first.items()) / max(len(pairs), 1) ** 2
    return sum(a == b for a, b in pairs), len(pairs), chance


def texts_beside_inputs(splits: Splits, mode: Mode | None) -> Iterator[Finding]:
    """Stop where rationales, or labels of an open task, share clearly more words with the inputs some rows away."""
    for name, rows in parts(splits):
        some = rows[:COMPARED_ROWS]
        inputs = [words(row.input[:COMPARED_CHARACTERS]) for row in some]
        fields: list[tuple[str, list[str | None]]] = [("rationale", [row.rationale for row in some])]
        if splits.task.label_kind == "open":
            fields.append(("label", [learnt_label(row, mode) for row in some]))
        for field, texts in fields:
            if field == "rationale" and mode in ("finetune", "distill"):
                continue
            found = _overlaps(inputs, [None if text is None else words(text) for text in texts])
            if found is None:
                continue
            shift, own, best, errors = found
            if errors >= SURE and best > 1.5 * own:
                yield Finding(
                    "stop",
                    "shifted-rows",
                    f"{name}: the values of {field!r} share {best:.0%} of their telling words with the input "
                    f"{_places_away(shift)}, and {own:.0%} with their own. They belong to other rows: match them by "
                    "position again.",
                    figures={
                        "split": name,
                        "field": field,
                        "shift": shift,
                        "own": round(own, 4),
                        "shifted": round(best, 4),
                    },
                )


def _places_away(shift: int) -> str:
    return f"{abs(shift)} row(s) {'further down' if shift > 0 else 'further up'}"


def _overlaps(
    inputs: Sequence[list[str]], texts: Sequence[list[str] | None]
) -> tuple[int, float, float, float] | None:
    """Compare each text with its own input and with those up to eight rows away.

    Overlap is the share of a text's words that the input has, weighted by inverse document frequency.

    Returns:
        the best shift, the mean overlap without and with it, and by how many standard errors the shift is better;
        None for too few texts.

    """
    holders = [set(found) for found in inputs]
    counts = Counter(word for found in holders for word in found)
    weight = {word: math.log(len(inputs) / count) for word, count in counts.items()}
    own_words = [
        (i, [word for word in set(text) if weight.get(word)])
        for i, text in enumerate(texts)
        if text is not None
    ]
    own_words = [(i, found) for i, found in own_words if found]
    if len(own_words) < LEAST_FOR_OVERLAP:
        return None
    table = np.full((len(own_words), 2 * MAX_SHIFT + 1), np.nan)
    for place, (i, found) in enumerate(own_words):
        total = sum(weight[word] for word in found)
        for shift in range(-MAX_SHIFT, MAX_SHIFT + 1):
            if 0 <= i + shift < len(holders):
                there = holders[i + shift]
                table[place, shift + MAX_SHIFT] = sum(weight[word] for word in found if word in there) / total
    means = np.nanmean(table, axis=0)
    shift = max(SHIFTS, key=lambda s: (means[s + MAX_SHIFT], -abs(s)))
    gain = table[:, shift + MAX_SHIFT] - table[:, MAX_SHIFT]
    gain = gain[np.isfinite(gain)]
    error = gain.std() / math.sqrt(len(gain)) if len(gain) else 0.0
    return (
        shift,
        float(means[MAX_SHIFT]),
        float(means[shift + MAX_SHIFT]),
        float(gain.mean() / max(error, 1e-9)),
    )


def classes_beside_inputs(splits: Splits, mode: Mode | None) -> Iterator[Finding]:
    """Stop where a classifier predicts the labels some rows away clearly better than the labels of its own rows.

    Rationales count as classes where few different ones are written.
    """
    for name, rows in parts(splits):
        some = rows[:COMPARED_ROWS]
        fields: list[tuple[str, list[str | None]]] = []
        if splits.task.label_kind == "closed":
            fields.append(("label", [learnt_label(row, mode) for row in some]))
        if mode not in ("finetune", "distill"):
            fields.append(("rationale", [row.rationale for row in some]))
        found: _Words | None = None
        for field, values in fields:
            names = {value: k for k, value in enumerate(sorted({v for v in values if v is not None}))}
            n_known = sum(value is not None for value in values)
            if not 2 <= len(names) <= min(MAX_CLOSED_LABELS, n_known // 10) or n_known < LEAST_FOR_CLASSES:
                continue
            found = found or _Words(some)
            known = np.array([-1 if value is None else names[value] for value in values])
            before, n = found.accuracy(known, len(names))
            shifted = {s: found.accuracy(_moved(known, s), len(names))[0] for s in SHIFTS}
            shift = max(SHIFTS, key=lambda s: (shifted[s], -abs(s)))
            after = shifted[shift]
            error = math.sqrt(max(before * (1 - before) + after * (1 - after), 1 / n) / n)
            if after - before > max(0.1, SURE * error):
                yield Finding(
                    "stop",
                    "shifted-rows",
                    f"{name}: the words of an input predict the {field} {_places_away(shift)} in {after:.0%} of {n} "
                    f"rows, and its own in {before:.0%}. The values of {field!r} belong to other rows: match them by "
                    "position again.",
                    figures={
                        "split": name,
                        "field": field,
                        "shift": shift,
                        "own": round(before, 4),
                        "shifted": round(after, 4),
                    },
                )


def _moved(labels: np.ndarray, shift: int) -> np.ndarray:
    """Return for row i the label of row i + shift; -1 beyond the ends."""
    moved = np.full_like(labels, -1)
    if shift > 0:
        moved[:-shift] = labels[shift:]
    else:
        moved[-shift:] = labels[:shift]
    return moved


class _Words:
    """Hashed words of rows, and how well naive Bayes predicts labels from them."""

    def __init__(self, rows: Sequence[Example]) -> None:
        found = [
            sorted({zlib.crc32(w.encode()) % _FEATURES for w in words(row.input[:COMPARED_CHARACTERS])})
            for row in rows
        ]
        self._owner = np.repeat(np.arange(len(rows)), [len(own) for own in found])
        self._word = np.array([word for own in found for word in own], np.int64)
        self._n = len(rows)

    def accuracy(self, labels: np.ndarray, n_labels: int) -> tuple[float, int]:
        """Return the share of rows predicted rightly by the other half of the rows, and the number of rows.

        Args:
            labels: (n,) places of the labels; -1 for none.
            n_labels: how many there are.

        """
        # Halves in blocks, so that equal neighbours do not answer for each other.
        half = (np.arange(self._n) // 50) % 2
        right = total = 0
        for fold in (0, 1):
            fit = (half != fold) & (labels >= 0)
            rows = fit[self._owner]
            place = labels[self._owner[rows]] * _FEATURES + self._word[rows]
            counts = np.bincount(place, minlength=n_labels * _FEATURES).reshape(n_labels, _FEATURES) + 0.5
            prior = np.bincount(labels[fit], minlength=n_labels) + 0.5
            log_p = np.log(counts / counts.sum(axis=1, keepdims=True))
            judged = (half == fold) & (labels >= 0)
            rows = judged[self._owner]
            scores = np.zeros((self._n, n_labels))
            np.add.at(scores, self._owner[rows], log_p.T[self._word[rows]])
            best = (scores + np.log(prior)).argmax(axis=1)
            right += int((best[judged] == labels[judged]).sum())
            total += int(judged.sum())
        return right / max(total, 1), total
