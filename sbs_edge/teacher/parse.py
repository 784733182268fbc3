"""Read label and rationale from a teacher's text, or give the reason why they cannot be read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from sbs_edge.chat.labels import fold, match_label, plain_label, read_choice
from sbs_edge.chat.marks import unmark
from sbs_edge.data.answers import same_answer
from sbs_edge.data.arithmetic import evaluate_expression
from sbs_edge.teacher.structured import ObjectAnswer, read_object
from sbs_edge.teacher.task import TaskFile

__all__ = ["Parsed", "check_quality", "parse_answer"]

_REFUSAL = re.compile(
    r"^\W*(i['’]?m sorry|i am sorry|sorry,|i can(?:no|['’])t (?:help|assist|answer|do|provide)|"
    r"i(?: am|['’]m) (?:unable|not able) to|as an ai\b)",
    re.IGNORECASE,
)
_OPERATORS = str.maketrans(
    {"\u2212": "-", "\u2013": "-", "\u2011": "-", "\u00d7": "*", "\u00f7": "/", "\u00a0": " ", "\u202f": " "}
)
_RESULT = re.compile(r"=\s*\$?(-?\d[\d,]*(?:\.\d+)?)")
# An expression, then nothing, words without figures, or its value: (48 / 12) + 1 bottles = 5.
_ARITHMETIC = re.compile(r"(-?[\d(.](?:[-\d\s.+*/()]*[\d)])?)[^\d+*/=()]*(?:=.*)?\Z", re.DOTALL)
_LONGEST_EXPRESSION = 500  # characters; a model in a loop writes far more
# A bracket that is not a part of a longer expression.
_BRACKETED = re.compile(r"(?<![-+*/])(?<![-+*/]\s)\(.*\)(?!\s*[-+*/]\s*[\d(])")
_ORNAMENT = " \t\"'`*_“”‘’"
_GAP = r"[ \t]*"
_VARIANT = re.compile(
    r"(?:^|(?<=[\s.!?*]))[*_]{0,3}(?:(?:so|thus|hence|therefore)\b[,\s]*)?(?:(?:the|my)\s+)?(?:final\s+|correct\s+|best\s+)?"
    r"(?:answer|label)(?:[*_]{0,3}\s*:|\s+is\b(?:\s*:)?)[*_]{0,3}[ \t]*",
    re.IGNORECASE,
)


class Parsed(NamedTuple):
    """Label and rationale, or the reason why the answer cannot be used.

    ``reasoning`` is the thought that stood between marks in the answer's text.

    Reasons: ``empty``, ``refused``, ``cut-off``, ``thought-only``, ``unknown-mark``, ``marker-missing``,
    ``marker-repeated``, ``label-unreadable``, ``json-unreadable``, and those of :func:`check_quality`.
    """

    label: str | None = None
    rationale: str | None = None
    reason: str | None = None
    reasoning: str = ""


def parse_answer(
    task: TaskFile, text: str, choices: Sequence[str] | None = None, finish_reason: str | None = None
) -> Parsed:
    """Read one answer.

    Thought and the marks of a chat template are taken out (:mod:`sbs_edge.chat.marks`), and the text is cut
    where the model went on to invent the next question. An answer that is a JSON object gives label and rationale
    by its fields. Else, what stands before the answer marker is the rationale, what stands after it the label. A
    marker that occurs more than once is accepted only if every occurrence gives the same label.

    Args:
        task: the task file.
        text: what the teacher wrote.
        choices: the row's choices, for ``choices`` tasks.
        finish_reason: the protocol's word for why the teacher stopped (``length``: cut off).
    """
    if finish_reason == "content_filter":
        return Parsed(reason="refused")
    cut_off = finish_reason == "length"
    own = (task.answer_marker, task.output_marker, *task.labels, *(choices or ()))
    body, reason, ended, thought = unmark(text, own, task.thinking_marks)
    if reason is not None:
        name = "cut-off" if reason == "thought-unfinished" or (cut_off and not body) else reason
        return Parsed(reason=name.split(":", 1)[0], reasoning=thought)
    found = read_object(body, cut_off=cut_off and not ended)
    if found is not None:
        return _of_object(task, found, choices)._replace(reasoning=thought)
    return _of_text(task, body, choices, cut_off=cut_off, ended=ended)._replace(reasoning=thought)


def _of_object(task: TaskFile, found: ObjectAnswer, choices: Sequence[str] | None) -> Parsed:
    """Read the label out of the object; the rationale ends where it repeats the answer marker."""
    marker = re.compile(re.escape(task.answer_marker) + r"\s*:?\s*", re.IGNORECASE)
    rationale = (marker.split(found.rationale)[0] or found.rationale).strip(_ORNAMENT) or None
    if found.reason is not None or found.label is None:
        return Parsed(rationale=rationale, reason=found.reason or "label-unreadable")
    text = marker.split(found.label)[-1]
    label = read_choice(text, choices) if choices else None
    label = label or _read_label(task, text, choices)
    return Parsed(label, rationale, None if label else "label-unreadable")


def _of_text(
    task: TaskFile, body: str, choices: Sequence[str] | None, *, cut_off: bool, ended: bool
) -> Parsed:
    """Read an answer in the agreed form: rationale, answer marker, label."""
    body, was_cut = _own_turn(task, body)
    complete = not cut_off or was_cut or ended
    if not body:
        return Parsed(reason="cut-off" if cut_off else "empty")

    pieces = _split(task, body)
    if len(pieces) == 1:
        if not complete:
            return Parsed(reason="cut-off")
        return Parsed(reason="refused" if _REFUSAL.search(body) else "marker-missing")
    rationale = re.sub(r"\s+", " ", pieces[0]).strip(_ORNAMENT + "#>")
    labels = [_read_label(task, piece, choices) for piece in pieces[1:]]
    label = labels[0]
    if len(labels) > 1 and not all(
        other and label and same_answer(label, other, task.compare) for other in labels[1:]
    ):
        return Parsed(rationale=rationale, reason="marker-repeated")
    if not complete and not _is_whole(task, pieces[-1]):
        return Parsed(rationale=rationale, reason="cut-off")
    if label is None:
        return Parsed(rationale=rationale, reason="label-unreadable")
    return Parsed(label, rationale)


def _own_turn(task: TaskFile, body: str) -> tuple[str, bool]:
    """Drop a repeated question before the answer, and cut where the next question begins."""
    following = re.compile(r"(?:^|\n)[ \t]*" + re.escape(task.input_marker), re.IGNORECASE)
    output = re.compile(r"(?:^|\n)[ \t]*" + re.escape(task.output_marker))
    first = following.match(body)
    if first is not None and (answer := output.search(body, first.end())) is not None:
        body = body[answer.end() :]
    found = following.search(body)
    if found is not None:
        body = body[: found.start()]
    return body.strip().removeprefix(task.output_marker).strip(), found is not None


def _split(task: TaskFile, body: str) -> list[str]:
    """Split at the answer marker, in any typography, or at a common variant if it is missing."""
    words = r"[\s*_]+".join(re.escape(word) for word in task.answer_marker.rstrip(" :").split())
    own = re.compile(r"[*_]{0,3}" + words + r"(?:[*_]{0,3}\s*:)?[*_]{0,3}(?!\w)" + _GAP, re.IGNORECASE)
    if not task.answer_marker[-1].isalnum():
        own = re.compile(words + r"\s*:?" + _GAP, re.IGNORECASE)
    pieces = own.split(body)
    if len(pieces) > 1 or task.parser == "expression":
        return pieces
    variants = list(_VARIANT.finditer(body))
    if not variants:
        return pieces
    last = variants[-1]
    label = body[last.end() :].strip()
    # "The answer is not obvious, because ..." is reasoning, so nothing may follow the label.
    if task.label_kind == "open" and re.search(r"[.!?,;:]\s|\n", label):
        return pieces
    return [body[: last.start()], label]


def _is_whole(task: TaskFile, piece: str) -> bool:
    """Return whether the label of an answer that reached its limit was written completely."""
    if task.parser == "expression":
        return re.search(r"\)\s*\.|\)\s*$|\n", piece.strip(" ")) is not None
    if task.label_kind == "open":
        return "\n" in piece.strip(" ")
    return re.search(r"[.!](?:\s|$)|\n|\)\s*$", piece) is not None


def _read_label(task: TaskFile, piece: str, choices: Sequence[str] | None) -> str | None:
    lines = [line.strip() for line in piece.strip().splitlines() if line.strip(_ORNAMENT)]
    if not lines:
        return None
    line = lines[0]
    if task.parser == "expression":
        return _read_expression(plain_label(line) if "(" not in line[:1] else line)
    if task.parser == "choice":
        return read_choice(line, choices or ()) or plain_label(line) or None
    known = task.labels if task.label_kind == "closed" else tuple(choices or ())
    if (found := match_label(line, known)) is not None:
        return found
    label = plain_label(line)
    # With a bracket that does not close, or without any letter, the line is not the label.
    if not any(c.isalnum() for c in label) or label[-1] in "{[(":
        return None
    return label


def _read_expression(line: str) -> str | None:
    """Return the arithmetic expression that a line gives as its answer, whole, or None."""
    if len(line) > _LONGEST_EXPRESSION:
        return None
    line = re.sub(r"[.!]+$", "", line.strip(_ORNAMENT).translate(_OPERATORS)).strip(_ORNAMENT)
    plain = re.sub(r"[$€£]|(?<=\d),(?=\d{3})", "", line)
    whole = _ARITHMETIC.match(plain)
    bracketed = _BRACKETED.search(plain)
    candidates = [line, *([whole[1]] if whole else []), *([bracketed[0]] if bracketed else [])]
    for candidate in (*candidates, line.split("=")[0], plain):
        if candidate.strip() and evaluate_expression(candidate) is not None:
            return candidate.strip()
    return None


def _mentions(rationale: str, label: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(fold(label))}(?!\w)", fold(rationale)) is not None


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
