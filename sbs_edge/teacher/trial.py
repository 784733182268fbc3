"""Shows a few rows from prompt to label, and says what to change where an answer could not be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from sbs_edge.data.example import Example
from sbs_edge.teacher.annotate import Annotation
from sbs_edge.teacher.calls import CallFailed, Sampling
from sbs_edge.teacher.collect import read_record, row_keys
from sbs_edge.teacher.cost import Prices
from sbs_edge.teacher.prompt import render, show
from sbs_edge.teacher.stop import advice, advice_on_answer
from sbs_edge.teacher.task import TaskFile

__all__ = ["trial_report", "trial_text"]


def trial_report(
    rows: Sequence[Example],
    task: TaskFile,
    annotation: Annotation,
    model: str,
    sampling: Sampling,
    prices: Prices,
) -> dict[str, Any]:
    """Return each row's prompt, answer, label, rationale, tokens and cost, and what to change.

    Args:
        rows: the rows that were asked.
        task: the task file.
        annotation: their answers.
        model: the teacher's model.
        sampling: the parameters they were asked with.
        prices: money per million tokens; without them ``cost`` is None.

    """
    by_key = {record.key: record for record in annotation.records}
    shown: list[dict[str, Any]] = []
    for row in rows:
        record = by_key.get(row_keys(row, task, model, sampling)[0])
        parsed = read_record(task, record, row.choices) if record is not None else None
        shown.append(
            {
                "id": row.id,
                "prompt": show(render(task, row)),
                "answer": record.text if record is not None else None,
                "label": parsed.label if parsed is not None else None,
                "rationale": parsed.rationale if parsed is not None else None,
                "gold": row.label,
                "reason": parsed.reason if parsed is not None else "unanswered",
                "detail": record.error if record is not None else None,
                "finish_reason": record.finish_reason if record is not None else None,
                "prompt_tokens": record.prompt_tokens if record is not None else 0,
                "answer_tokens": record.completion_tokens if record is not None else 0,
                "cost": record.cost if record is not None and prices.known else None,
            }
        )
    reasons = Counter(item["reason"] for item in shown if item["reason"])
    failed = annotation.stats.last_failure or next((item["detail"] for item in shown if item["detail"]), "")
    reason, _, detail = failed.partition(": ")
    fields = [*sampling.parameters(), "stop"]
    remedy = advice(CallFailed(reason, detail), fields=fields) if failed else ""
    return {
        "rows": shown,
        "usable": sum(item["reason"] is None for item in shown),
        "change": [
            f"{name} ({n} of {len(shown)}): "
            + (
                f"{failed}. {remedy}"
                if name in ("rejected", "unanswered") and failed
                else advice_on_answer(name)
            )
            for name, n in reasons.items()
        ],
    }


def trial_text(report: dict[str, Any]) -> str:
    """Return the report as a person reads it: the first prompt whole, then row by row."""
    lines = ["PROMPT OF THE FIRST ROW", report["rows"][0]["prompt"]]
    for number, item in enumerate(report["rows"], 1):
        cost = "" if item["cost"] is None else f", cost {item['cost']:.6f}"
        gold = "" if item["gold"] is None else f" (gold: {item['gold']})"
        lines += [
            "",
            f"ROW {number} ({item['id']}): {item['prompt_tokens']} prompt tokens, {item['answer_tokens']} answer "
            f"tokens{cost}, ended by {item['finish_reason'] or 'nothing said'}",
            f"  answer     {(item['answer'] or '').strip()!r}",
            f"  rationale  {item['rationale']}",
            f"  label      {item['label']}{gold}",
            f"  verdict    {item['reason'] or 'usable'}" + (f" ({item['detail']})" if item["detail"] else ""),
        ]
    lines += ["", f"{report['usable']} of {len(report['rows'])} rows are usable."]
    lines += [f"To change: {sentence}" for sentence in report["change"]]
    return "\n".join(lines)
