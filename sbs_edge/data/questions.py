"""Read a row to answer (id, text, choices) and ask the student, in the same way in every engine of ``predict``.

This module knows nothing of files or workers. A student is any object with the methods of
:class:`sbs_edge.runtime.student.Student`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sbs_edge.data.readers import choices_cell
from sbs_edge.data.rows import printable
from sbs_edge.errors import DataError, UsageError
from sbs_edge.tokens import text_fault, unicode_fault

__all__ = ["Unanswerable", "answers_of", "choices_of", "id_of", "text_of"]

_REMEDY = "predict needs a valid input in every row: correct it or remove it."


class Unanswerable(DataError):
    """A row that cannot be answered; the caller adds the file and the line.

    Attributes:
        remedy: what to do about it, for a command that stops here.

    """

    def __init__(self, reason: str, remedy: str = _REMEDY) -> None:
        super().__init__(reason)
        self.remedy = remedy


def id_of(value: Any) -> str | int | float | None:
    """Return a row's id in a form that JSON and UTF-8 can represent.

    Raises:
        Unanswerable: it is nested too deeply to be written.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, int | float):
        return value
    try:
        return printable(str(value))  # Parquet knows dates and decimals, JSON does not
    except RecursionError:
        raise Unanswerable("the id is nested too deeply") from None


def text_of(values: dict[str, Any], column: str) -> str:
    """Return a row's text.

    Raises:
        Unanswerable: there is no text, or it has half a surrogate pair, which no tokenizer accepts.
    """
    value = values.get(column)
    if not isinstance(value, str):
        found = "not text" if column in values else f"it has {', '.join(map(str, values)) or 'none'}"
        raise Unanswerable(
            printable(f"no text in the column {column!r} ({found})"),
            "Map its column with column=['input=NAME'], or correct the row.",
        )
    if fault := text_fault(value):
        raise Unanswerable(f"the text in the column {column!r} {fault}")
    return value


def choices_of(value: Any) -> list[str] | None:
    """Return a row's own choices, each once, from a list or a CSV cell; None if it has none.

    Raises:
        Unanswerable: they are not a list of strings.
    """
    choices = choices_cell(value)
    if choices is None:
        return None
    if not (isinstance(choices, list | tuple) and choices and all(isinstance(c, str) for c in choices)):
        raise Unanswerable("'choices' must be a list of strings, or 'a|b|c'")
    for choice in choices:
        if fault := unicode_fault(choice):
            raise Unanswerable(f"one of 'choices' {fault}")
    return list(dict.fromkeys(choices))  # real rows name a choice twice


def answers_of(
    student: Any,
    texts: Sequence[str],
    choices: Sequence[Sequence[str] | None],
    labels: Sequence[str] | None = None,
    *,
    tokens: Sequence[Sequence[int]] | None = None,
    **options: Any,
) -> list[Any]:
    """Return a prediction for each text, or the :class:`UsageError` of choices that cannot be used.

    Rows with their own choices are predicted separately, so that no answer depends on the other rows.

    Args:
        student: the student.
        texts: inputs, none over the limit.
        choices: each row's own labels, or None; ignored if ``labels`` is given.
        labels: the labels that all rows choose among, or None.
        tokens: the result of the student's ``tokenize`` for these texts.
        options: further keyword arguments of the student's ``predict``.

    Raises:
        UsageError: the request itself is wrong, whatever the rows contain.
    """
    answers: list[Any] = [None] * len(texts)

    def ask(part: list[int], given: Any) -> None:
        known = {} if tokens is None else {"tokens": [tokens[i] for i in part]}
        found = student.predict([texts[i] for i in part], labels=given, **known, **options)
        for i, answer in zip(part, found, strict=True):
            answers[i] = answer

    def ask_own(part: list[int]) -> None:
        try:
            ask(part, [choices[i] for i in part])
        except UsageError as error:
            if len(part) == 1:
                answers[part[0]] = error
                return
            ask_own(part[: len(part) // 2])  # the choices of some row: find out which
            ask_own(part[len(part) // 2 :])

    own = [i for i, names in enumerate(choices) if names is not None and labels is None]
    others = sorted({*range(len(texts))} - {*own})
    if own:
        ask_own(own)
    if others and labels is None and student.manifest["labels"]["method"] == "choices":
        lacking = Unanswerable(
            "no 'choices', which the rows of this bundle need (or give labels for all rows)"
        )
        answers = [lacking if answer is None else answer for answer in answers]
    elif others:
        ask(others, labels)
    return answers
