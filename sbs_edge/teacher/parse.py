"""From a teacher's text to label and rationale, or to the reason why there is none."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from sbs_edge.data.answers import normalise, same_answer
from sbs_edge.data.arithmetic import evaluate_expression
from sbs_edge.teacher.task import TaskFile

__all__ = ["Parsed", "check_quality", "parse_answer"]

_THINKING = re.compile(r"^.*?</think>", re.DOTALL)
_REFUSAL = re.compile(
    r"^\W*(i['’]?m sorry|i am sorry|sorry,|i can(?:no|['’])t (?:help|assist|answer|do|provide)|"
    r"i(?: am|['’]m) (?:unable|not able) to|as an ai\b)",
    re.IGNORECASE,
)
_CHOICE = re.compile(r"\(\s*([A-Za-z])\s*\)\s*(.*)|^([A-Za-z])(?:[).:]\s*(.*))?$")
_RESULT = re.compile(r"=\s*\$?(-?\d[\d,]*(?:\.\d+)?)")
_ORNAMENT = " \t\"'`*_“”‘’"


class Parsed(NamedTuple):
    """Label and rationale, or the reason why the answer is of no use.

    Reasons: ``empty``, ``refused``, ``cut-off``, ``marker-missing``, ``marker-repeated``,
    ``label-unreadable``, and those of :func:`check_quality`.
    """

    label: str | None = None
    rationale: str | None = None
    reason: str | None = None


def parse_answer(
    task: TaskFile, text: str, choices: Sequence[str] | None = None, finish_reason: str | None = None
) -> Parsed:
    """Read one answer.

    The text is cut where the model went on to invent the next question. What stands before the
    answer marker is the rationale, what stands after it the label. A marker that occurs more than
    once is accepted only if every occurrence gives the same label.

    Args:
        task: the task file.
        text: what the teacher wrote.
        choices: the row's choices, for ``choices`` tasks.
        finish_reason: the protocol's word for why the teacher stopped (``length``: cut off).
    """
    if finish_reason == "content_filter":
        return Parsed(reason="refused")
    body = _THINKING.sub("", text) if "</think>" in text else text
    following = re.search(r"(?:^|\n)[ \t]*" + re.escape(task.input_marker), body, re.IGNORECASE)
    was_cut = following is not None
    if following is not None:
        body = body[: following.start()]
    body = body.strip()
    if body.startswith(task.output_marker):
        body = body[len(task.output_marker) :].lstrip()
    if not body:
        return Parsed(reason="cut-off" if finish_reason == "length" else "empty")

    pieces = re.split(re.escape(task.answer_marker) + r"\s*:?", body, flags=re.IGNORECASE)
    if len(pieces) == 1:
        if finish_reason == "length" and not was_cut:
            return Parsed(reason="cut-off")
        return Parsed(reason="refused" if _REFUSAL.search(body) else "marker-missing")
    rationale = re.sub(r"\s+", " ", pieces[0]).strip(_ORNAMENT)
    labels = [_read_label(task, piece, choices) for piece in pieces[1:]]
    label = labels[0]
    if len(labels) > 1 and not all(
        other and label and same_answer(label, other, task.compare) for other in labels[1:]
    ):
        return Parsed(rationale=rationale, reason="marker-repeated")
    if finish_reason == "length" and not was_cut and not re.search(r"[.!](?:\s|$)|\n|\)\s*$", pieces[-1]):
        return Parsed(rationale=rationale, reason="cut-off")
    if label is None:
        return Parsed(rationale=rationale, reason="label-unreadable")
    return Parsed(label, rationale)


def _read_label(task: TaskFile, piece: str, choices: Sequence[str] | None) -> str | None:
    lines = [line.strip() for line in piece.strip().splitlines() if line.strip()]
    if not lines:
        return None
    line = lines[0].strip(_ORNAMENT)
    line = re.sub(r"[.!]+$", "", line).strip(_ORNAMENT)
    if task.parser == "expression":
        return _read_expression(line)
    if task.parser == "choice":
        return _read_choice(line, choices or ())
    return _canonical(line, task.labels) if line else None


def _canonical(text: str, known: Sequence[str]) -> str:
    """Return the member of ``known`` that ``text``, or else its first sentence, spells; or ``text``."""
    for candidate in (text, re.split(r"[.!;,]\s", text)[0]):
        plain = normalise(candidate).rstrip(".! ")
        for item in known:
            if normalise(item).rstrip(".! ") == plain:
                return item
    return text


def _read_choice(line: str, choices: Sequence[str]) -> str | None:
    found = _CHOICE.search(line)
    if found is None:
        return _canonical(line, choices) or None
    letter = (found[1] or found[3]).lower()
    text = (found[2] or found[4] or "").strip(_ORNAMENT)
    if text:
        return _canonical(text, choices)
    position = ord(letter) - ord("a")
    return choices[position] if position < len(choices) else None


def _read_expression(line: str) -> str | None:
    bracketed = re.search(r"\(.*\)", line)
    candidates = [bracketed[0]] if bracketed else []
    candidates += [line, re.split(r"=", line)[0], re.sub(r"[$€£]|(?<=\d),(?=\d{3})", "", line)]
    for candidate in candidates:
        if candidate.strip() and evaluate_expression(candidate) is not None:
            return candidate.strip()
    return None


def _mentions(rationale: str, label: str) -> bool:
    return (
        re.search(rf"(?<!\w){re.escape(label.casefold())}(?!\w)", re.sub(r"\s+", " ", rationale.casefold()))
        is not None
    )


def check_quality(task: TaskFile, parsed: Parsed, choices: Sequence[str] | None = None) -> str | None:
    """Return the name of the first filter that refuses a parsed answer, or None.

    Names: ``label-not-in-set``, ``rationale-missing``, ``rationale-too-short``,
    ``rationale-too-long``, ``rationale-leaks-label``, ``rationale-contradicts-label``.
    """
    label, rationale, filters = parsed.label or "", parsed.rationale or "", task.filters
    known = task.labels if task.label_kind == "closed" else tuple(choices or ())
    if filters.label_in_set and known and label not in known:
        return "label-not-in-set"
    n_words = len(rationale.split())
    if n_words == 0 and filters.min_rationale_words > 0:
        return "rationale-missing"
    if n_words < filters.min_rationale_words:
        return "rationale-too-short"
    if n_words > filters.max_rationale_words:
        return "rationale-too-long"
    if filters.leak and known and _mentions(rationale, label):
        return "rationale-leaks-label"
    if filters.contradiction and _contradicts(task, label, rationale, known):
        return "rationale-contradicts-label"
    return None


def _contradicts(task: TaskFile, label: str, rationale: str, known: Sequence[str]) -> bool:
    if task.compare == "value":
        results = _RESULT.findall(rationale)
        return bool(results) and not same_answer(results[-1].replace(",", ""), label, "value")
    if not known or _mentions(rationale, label):
        return False
    return any(_mentions(rationale, other) for other in known if other != label)
