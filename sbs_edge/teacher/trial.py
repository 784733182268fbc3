"""Show a few rows from prompt to label, and what to change if an answer cannot be used."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from sbs_edge.data.answers import same_answer
from sbs_edge.data.example import Example
from sbs_edge.teacher.annotate import Annotation
from sbs_edge.teacher.changes import changes, notes
from sbs_edge.teacher.collect import read_record, row_keys
from sbs_edge.teacher.cost import Prices
from sbs_edge.teacher.prompt import input_text, render, show
from sbs_edge.teacher.task import TaskFile

__all__ = ["trial_report", "trial_text"]

_MOST_LINES = 12
"""Longer texts are cut on the screen; ``--json`` holds them whole."""

_FORMS = {
    "off": "plain text that ends in the answer marker",
    "json_schema": "a JSON object (response_format json_schema)",
    "json_object": "a JSON object (response_format json_object with a schema)",
    "tool": "a JSON object (the arguments of a function call)",
}


def trial_report(
    rows: Sequence[Example], task: TaskFile, annotation: Annotation, model: str, prices: Prices
) -> dict[str, Any]:
    """Return each row's prompt, answer, reasoning, label, rationale, tokens and cost, and what to change.

    Args:
        rows: the rows that were asked.
        task: the task file.
        annotation: their answers.
        model: the teacher's model.
        prices: money per million tokens; without them ``cost`` is None.

    """
    by_key = {record.key: record for record in annotation.records}
    sampling = annotation.sampling
    shown: list[dict[str, Any]] = []
    for row, result in zip(rows, annotation.results, strict=True):
        record = by_key.get(row_keys(row, task, model, sampling)[0])
        parsed = read_record(task, record, row.choices) if record is not None else None
        usable = result.reason is None
        shown.append(
            {
                "id": row.id,
                "input": input_text(row.input, row.choices),
                "prompt": show(render(task, row, sampling.structured)),
                "answer": record.text if record is not None else None,
                "reasoning": parsed.reasoning if parsed is not None else "",
                "label": result.example.teacher_label if usable else parsed.label if parsed else None,
                "rationale": result.example.rationale if usable else parsed.rationale if parsed else None,
                "gold": row.label,
                "reason": result.reason,
                "detail": result.detail,
                "finish_reason": record.finish_reason if record is not None else None,
                "prompt_tokens": record.prompt_tokens if record is not None else 0,
                "answer_tokens": record.completion_tokens if record is not None else 0,
                "cost": record.cost if record is not None and prices.known else None,
                "seconds": record.seconds if record is not None else None,
            }
        )
    known = [item for item in shown if item["reason"] is None and item["gold"] is not None]
    agree = sum(same_answer(item["gold"], item["label"] or "", task.compare) for item in known)
    return {
        "structured": sampling.structured,
        "rows": shown,
        "usable": sum(item["reason"] is None for item in shown),
        "agreement": {"equal": agree, "total": len(known)},
        "requests": annotation.stats.attempts,
        "prompt_tokens": sum(record.prompt_tokens for record in annotation.records),
        "answer_tokens": sum(record.completion_tokens for record in annotation.records),
        "cost": sum(record.cost for record in annotation.records) if prices.known else None,
        "change": changes(shown, task, annotation),
        "notes": notes(shown, task, annotation),
    }


def trial_text(report: dict[str, Any], width: int | None = None) -> str:
    """Return the report as a person reads it: the first prompt whole, row by row, then one line per row.

    Args:
        report: of :func:`trial_report`.
        width: columns; None: the terminal's, at most 100, and 80 where there is none.

    """
    columns = width or min(100, shutil.get_terminal_size((80, 24)).columns)
    lines = [f"The answer is asked for as {_FORMS[report['structured']]}.", "", "PROMPT OF THE FIRST ROW"]
    for line in report["rows"][0]["prompt"].splitlines():
        lines += _wrapped(line, columns, "  ", "  ")
    for number, item in enumerate(report["rows"], 1):
        lines += ["", *_row(number, item, columns)]
    lines += ["", *_table(report["rows"], columns), ""]
    agreement, cost = report["agreement"], report["cost"]
    said = f"{report['usable']} of {len(report['rows'])} rows are usable"
    if agreement["total"]:
        said += f"; {agreement['equal']} of {agreement['total']} agree with the gold label"
    said += f"; {report['requests']} requests, {report['prompt_tokens']} prompt tokens, "
    said += f"{report['answer_tokens']} answer tokens" + ("" if cost is None else f", cost {cost:.6f}")
    lines += _wrapped(f"{said}.", columns, "", "")
    for kind, sentences in (("To change", report["change"]), ("Note", report["notes"])):
        for sentence in sentences:
            lines += _wrapped(f"{kind}: {sentence}", columns, "", "  ")
    return "\n".join(lines)


def _row(number: int, item: dict[str, Any], columns: int) -> Iterator[str]:
    yield from _wrapped(f"ROW {number} ({item['id']}): {item['reason'] or 'usable'}", columns, "", "  ")
    gold = "" if item["gold"] is None else f" (gold: {item['gold']})"
    cost = "" if item["cost"] is None else f", cost {item['cost']:.6f}"
    seconds = "" if not item["seconds"] else f", {item['seconds']:.1f} s"
    fields = {
        "input": item["input"] if number > 1 else None,  # the first prompt ends in it
        "answer": (item["answer"] or "").strip() or "(nothing)",
        "reasoning": item["reasoning"],
        "rationale": item["rationale"],
        "label": f"{item['label']}{gold}" if item["label"] else f"(none){gold}",
        "server": item["detail"],
        "tokens": f"{item['prompt_tokens']} prompt, {item['answer_tokens']} answer{seconds}{cost}, ended by "
        f"{item['finish_reason'] or 'nothing said'}",
    }
    for name, text in fields.items():
        if text:
            yield from _field(name, text, columns)


def _field(name: str, text: str, columns: int) -> list[str]:
    """Return a field under a hanging indent, cut after :data:`_MOST_LINES` lines."""
    lines: list[str] = []
    for line in text.splitlines() or [""]:
        lines += _wrapped(line, columns - 13, "", "")
    if len(lines) > _MOST_LINES:
        rest = len(" ".join(lines[_MOST_LINES - 1 :]))
        lines = [*lines[: _MOST_LINES - 1], f"... ({rest} more characters; --json shows them)"]
    return [f"  {name if index == 0 else '':<10} {line}".rstrip() for index, line in enumerate(lines)]


def _wrapped(line: str, columns: int, first: str, following: str) -> list[str]:
    return textwrap.wrap(
        line, max(20, columns), initial_indent=first, subsequent_indent=following,
        replace_whitespace=False, break_on_hyphens=False,
    ) or [""]  # fmt: skip


def _table(rows: Sequence[dict[str, Any]], columns: int) -> list[str]:
    """Return one line per row: verdict, label, gold label, tokens."""
    cells = [("row", "verdict", "label", "gold", "tokens in + out")]
    for number, item in enumerate(rows, 1):
        tokens = f"{item['prompt_tokens']} + {item['answer_tokens']}"
        cells.append(
            (str(number), item["reason"] or "usable", item["label"] or "-", item["gold"] or "-", tokens)
        )
    widths = [max(len(row[index]) for row in cells) for index in range(5)]
    spare = columns - widths[0] - widths[1] - widths[4] - 8
    half = max(8, spare // 2)
    widths[2], widths[3] = min(widths[2], half), min(widths[3], half)
    return [
        "  ".join(_fit(text, width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in cells
    ]


def _fit(text: str, width: int) -> str:
    plain = " ".join(text.split())
    return (plain if len(plain) <= width else plain[: width - 3] + "...").ljust(width)
