"""Rationales from long reasoning: a second call per row shortens what the model thought.

The call is journalled and paid for like any other, keyed by its own prompt.
"""

from __future__ import annotations

import dataclasses

from sbs_edge.chat.marks import unmark
from sbs_edge.data.example import Example
from sbs_edge.teacher.calls import Sampling, request_fields
from sbs_edge.teacher.collect import RowResult
from sbs_edge.teacher.journal import Record
from sbs_edge.teacher.parse import Parsed, check_quality
from sbs_edge.teacher.prompt import Call, Prompt, call_key, input_text
from sbs_edge.teacher.task import TaskFile

__all__ = ["before_summary", "summary_call", "with_summary"]

_INSTRUCTION = (
    "Below are a question, somebody's reasoning about it and the answer. Rewrite the reasoning as one to three plain "
    "sentences with the facts and steps that lead to the answer. Leave out doubts, detours and repetitions, and add "
    "nothing. Write only these sentences."
)
_ANY_LENGTH = 10**9


def before_summary(task: TaskFile) -> TaskFile:
    """Return the task for reading first answers: rationales are filtered once they are summaries."""
    if task.rationale_from != "summary":
        return task
    changes = {
        "leak": False,
        "contradiction": False,
        "min_rationale_words": 0,
        "max_rationale_words": _ANY_LENGTH,
    }
    return task.model_copy(update={"filters": task.filters.model_copy(update=changes)})


def summary_call(result: RowResult, model: str, sampling: Sampling) -> Call:
    """Return the call that shortens the reasoning behind an annotated row."""
    row = result.example
    question = (
        f"Question:\n{input_text(row.input, row.choices)}\n\nReasoning:\n{result.reasoning}\n\n"
        f"Answer: {row.teacher_label}"
    )
    prompt = Prompt(messages=(("system", _INSTRUCTION), ("user", question)))
    return Call(call_key(prompt, model, request_fields(prompt, sampling)), prompt)


def with_summary(task: TaskFile, row: Example, result: RowResult, record: Record | None) -> RowResult:
    """Return the result with the summary as its rationale, or with the reason why there is none.

    Args:
        task: the task file, with the filters that the summary must pass.
        row: the row without annotation.
        result: its annotation.
        record: the finished second call, or None.

    """
    if record is None:
        return dataclasses.replace(result, example=row, reason="unanswered")
    body = unmark(record.text, names=task.thinking_marks)
    text = " ".join(body.text.split())
    useless = record.error or body.reason or record.finish_reason in ("length", "content_filter") or not text
    if useless:
        reason = "rejected" if record.is_refusal else "summary-missing"
        return dataclasses.replace(result, example=row, reason=reason, detail=record.error)
    parsed = Parsed(result.example.teacher_label, text)
    filtered = check_quality(task, parsed, row.choices)
    example = row if filtered else dataclasses.replace(result.example, rationale=text, rationales=())
    return dataclasses.replace(result, example=example, reason=filtered)
