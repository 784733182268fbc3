"""Say what to change in a task or a request, from the answers to a few rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sbs_edge.teacher.annotate import Annotation
from sbs_edge.teacher.calls import CallFailed
from sbs_edge.teacher.report import repeated_rationales
from sbs_edge.teacher.stop import advice, advice_on_answer
from sbs_edge.teacher.task import TaskFile

__all__ = ["changes", "notes"]

Row = Mapping[str, Any]
"""One row of :func:`sbs_edge.teacher.trial.trial_report`."""


def changes(rows: Sequence[Row], task: TaskFile, annotation: Annotation) -> list[str]:
    """Return sentences on what to change, the ones on rows without annotation first.

    Args:
        rows: the shown rows.
        task: the task file.
        annotation: their answers.

    """
    return [
        *_on_reasons(rows, task, annotation),
        *_on_labels(rows, task),
        *_on_rationales(rows, task),
    ]


def _on_reasons(rows: Sequence[Row], task: TaskFile, annotation: Annotation) -> Iterator[str]:
    failed = annotation.stats.last_failure or next((item["detail"] for item in rows if item["detail"]), "")
    reason, _, detail = failed.partition(": ")
    for name, n in Counter(item["reason"] for item in rows if item["reason"]).items():
        where = f"{name} ({n} of {len(rows)})"
        if name in ("rejected", "unanswered") and failed:
            remedy = advice(CallFailed(reason, detail), fields=annotation.sampling.field_names())
            yield f"{where}: {failed.rstrip('. ')}. {remedy}"
            continue
        found = [item for item in rows if item["reason"] == name]
        yield f"{where}: {_details(name, found, task, annotation)}{advice_on_answer(name)}"


def _details(name: str, found: Sequence[Row], task: TaskFile, annotation: Annotation) -> str:
    """Return the figures or words behind a reason, as the beginning of a sentence."""
    if name == "cut-off":
        limit = annotation.sampling.max_tokens
        thinking = sum(bool(item["reasoning"]) for item in found)
        thought = f", and {thinking} of these answers had not ended their reasoning" if thinking else ""
        return f"the limit is {limit} tokens{thought}; "
    if name == "label-not-in-set":
        written = ", ".join(map(repr, list(dict.fromkeys(item["label"] for item in found))[:3]))
        known = f", and labels are {', '.join(task.labels)}" if task.labels else ""
        return f"the model wrote {written}{known}; "
    if name == "marker-missing":
        return f"the marker is {task.answer_marker!r}; "
    return ""


def notes(rows: Sequence[Row], task: TaskFile, annotation: Annotation) -> list[str]:
    """Return sentences on what is good to know and needs no change; arguments as for :func:`changes`."""
    found: list[str] = []
    if annotation.refusal is not None:
        words = annotation.refusal.removeprefix("rejected: ").rstrip(". ")
        found.append(
            f"structured outputs are not used ({words}). --structured off saves the requests that found out; "
            "--structured tool asks for a function call."
        )
    if task.rationale_from == "answer" and any(item["reasoning"] for item in rows):
        found.append(
            "the model's reasoning comes beside its answer; --rationale-from reasoning or summary makes it the rationale."
        )
    return found


def _on_labels(rows: Sequence[Row], task: TaskFile) -> Iterator[str]:
    usable = [item for item in rows if item["reason"] is None]
    labels = {item["label"] for item in usable}
    gold = {item["gold"] for item in usable if item["gold"] is not None}
    if task.label_kind == "closed" and len(usable) > 3 and len(labels) == 1 and len(gold) != 1:
        yield (
            f"every row got the label {next(iter(labels))!r}; add a worked example for each label, or try a larger "
            "model."
        )


def _on_rationales(rows: Sequence[Row], task: TaskFile) -> Iterator[str]:
    copied, same = repeated_rationales(
        task, (item["rationale"] or "" for item in rows if item["reason"] is None)
    )
    if copied:
        yield (
            f"{copied} of {len(rows)} rationales repeat a worked example word for word; use worked examples that "
            "differ more, or a larger model."
        )
    if same > 2:
        yield f"{same} of {len(rows)} rows have the same rationale word for word; ask for the words that decide."
