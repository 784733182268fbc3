"""The report of an annotation: counts, agreement, lengths, cost, and samples to read."""

from __future__ import annotations

import random
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from sbs_edge.data.answers import normalise, same_answer
from sbs_edge.report.page import Page
from sbs_edge.teacher.collect import RowResult
from sbs_edge.teacher.journal import Record
from sbs_edge.teacher.task import TaskFile

__all__ = ["annotation_page", "annotation_report", "repeated_rationales"]

N_SAMPLES = 20


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    ordered = sorted(values)
    return {
        "mean": round(statistics.fmean(ordered), 3),
        "p50": ordered[len(ordered) // 2],
        "p90": ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))],
        "max": ordered[-1],
    }


def repeated_rationales(task: TaskFile, rationales: Iterable[str]) -> tuple[int, int]:
    """Return how many rationales are a worked example's, and how often the most frequent other one occurs.

    Weak models copy: such rationales say nothing about their rows.
    """
    own = {normalise(shot.rationale) for shot in task.shots}
    counts = Counter(normalise(text) for text in rationales if text.strip())
    others = (number for text, number in counts.items() if text not in own)
    return sum(number for text, number in counts.items() if text in own), max(others, default=0)


def annotation_report(
    task: TaskFile, results: Sequence[RowResult], records: Iterable[Record], *, model: str, seed: int = 0
) -> dict[str, Any]:
    """Return the figures of an annotation as plain values.

    ``agreement`` compares annotated rows with their gold labels, which are read only here in annotation.

    Args:
        task: the task file.
        results: one per row.
        records: their finished calls.
        model: the teacher.
        seed: draws the sample page.
    """
    used = list(records)
    annotated = [item for item in results if item.reason is None]
    known = [item for item in annotated if item.example.label is not None]
    agree = sum(
        same_answer(item.example.label or "", item.example.teacher_label or "", task.compare)
        for item in known
    )
    cost = sum(record.cost for record in used)
    copied, repeated = repeated_rationales(task, (item.example.rationale or "" for item in annotated))
    chosen = random.Random(seed).sample(range(len(results)), min(N_SAMPLES, len(results)))
    return {
        "task": task.name,
        "teacher": model,
        "rows": len(results),
        "annotated": len(annotated),
        "parse_rate": len(annotated) / len(results) if results else None,
        "reasons": dict(Counter(item.reason for item in results if item.reason).most_common()),
        "agreement": {"equal": agree, "total": len(known), "rate": agree / len(known) if known else None},
        "labels": dict(Counter(str(item.example.teacher_label) for item in annotated).most_common(30)),
        "confidence": _spread([item.example.confidence for item in annotated]),
        "copied_rationales": copied,
        "most_repeated_rationale": repeated,
        "rationale_words": _spread([float(len((i.example.rationale or "").split())) for i in annotated]),
        "calls": {
            "finished": len(used),
            "prompt_tokens": sum(record.prompt_tokens for record in used),
            "completion_tokens": sum(record.completion_tokens for record in used),
            "cost": round(cost, 6),
            "cost_per_1000_rows": round(1000 * cost / len(results), 6) if results else None,
            "seconds": _spread([record.seconds for record in used if record.seconds > 0]),
        },
        "samples": [_sample(results[index]) for index in sorted(chosen)],
    }


def _sample(result: RowResult) -> dict[str, Any]:
    return {
        "id": result.example.id,
        "input": result.example.input,
        "gold": result.example.label,
        "label": result.example.teacher_label,
        "rationale": result.example.rationale,
        "confidence": result.example.confidence,
        "reason": result.reason,
        "text": result.texts[0] if result.texts and result.reason else None,
    }


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def annotation_page(report: dict[str, Any]) -> str:
    """Return the report as one HTML page that needs no network."""
    page = Page(f"Annotation of {report['task']} by {report['teacher']}")
    agreement = report["agreement"]
    page.text(
        f"{report['annotated']:,} of {report['rows']:,} rows annotated ({_percent(report['parse_rate'])}). "
        f"Agreement with gold labels: {_percent(agreement['rate'])} of the {agreement['total']:,} annotated "
        "rows that have one."
    )
    calls = report["calls"]
    page.section("Calls")
    seconds = calls["seconds"] or {}
    page.table(
        ["calls", "prompt tokens", "answer tokens", "cost", "cost per 1000 rows", "p50 s", "p90 s"],
        [
            [
                calls["finished"],
                calls["prompt_tokens"],
                calls["completion_tokens"],
                calls["cost"],
                calls["cost_per_1000_rows"],
                seconds.get("p50"),
                seconds.get("p90"),
            ]
        ],
    )
    page.text("Cost is in the unit of the prices that were given; 0 without prices.", note=True)
    if report["reasons"]:
        page.section("Rows without annotation")
        page.table(["reason", "rows"], [list(item) for item in report["reasons"].items()])
    page.section("Labels, lengths, confidence")
    page.table(["label", "rows"], [list(item) for item in report["labels"].items()])
    spreads = [
        (name, report[key]) for name, key in (("words", "rationale_words"), ("confidence", "confidence"))
    ]
    page.table(
        ["", "mean", "p50", "p90", "max"],
        [[name, s["mean"], s["p50"], s["p90"], s["max"]] for name, s in spreads if s],
    )
    if report["copied_rationales"] or report["most_repeated_rationale"] > 1:
        page.text(
            f"{report['copied_rationales']:,} rationales are a worked example's, word for word; the most frequent other "
            f"one occurs {report['most_repeated_rationale']:,} times."
        )
    page.section("Samples to read")
    for sample in report["samples"]:
        verdict = sample["reason"] or f"{sample['label']} (confidence {sample['confidence']:.2f})"
        gold = f"\ngold: {sample['gold']}" if sample["gold"] is not None else ""
        body = sample["rationale"] or sample["text"] or ""
        page.preformatted(f"{sample['id']}\n{sample['input']}\n\n{body}\n=> {verdict}{gold}")
    return page.html()
