"""Annotation from end to end: rows in, annotated examples, failures, report and journal out."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sbs_edge import files
from sbs_edge.data.answers import same_answer
from sbs_edge.data.example import Example
from sbs_edge.data.jsonl import write_examples
from sbs_edge.errors import DataError
from sbs_edge.teacher.ask import AskStats, ask
from sbs_edge.teacher.calls import Sampling, Teacher
from sbs_edge.teacher.collect import RowResult, collect, read_record, row_keys, unfinished
from sbs_edge.teacher.cost import Budget, Estimate, Prices, TokenEstimator
from sbs_edge.teacher.journal import Journal, Record
from sbs_edge.teacher.prompt import Call
from sbs_edge.teacher.report import annotation_page, annotation_report
from sbs_edge.teacher.task import TaskFile

__all__ = ["Annotation", "Settings", "annotate", "annotate_outputs", "estimate", "write_annotation"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How to ask.

    Attributes:
        model: the teacher's model, part of every journal key.
        sampling: request parameters, part of every journal key.
        samples: answers a row; above 1 the label is voted on.
        concurrency: requests on their way at once.
        prices: money per million tokens.
        max_cost, max_total_tokens: limits over the journal's whole life, or None.
        retry_failed: ask again where the journal's answer is of no use.
        max_attempts: how often one call is sent before it is left to the next run.
        server: the server's address without secrets; a refusal in the journal holds for that server only.

    """

    model: str
    sampling: Sampling = field(default_factory=Sampling)
    samples: int = 1
    concurrency: int = 8
    prices: Prices = field(default_factory=Prices)
    max_cost: float | None = None
    max_total_tokens: int | None = None
    retry_failed: bool = False
    max_attempts: int = 6
    server: str = ""


@dataclass(slots=True)
class Annotation:
    """Results in row order, the calls behind them, what this run did, and journal lines it could not use."""

    results: list[RowResult]
    records: list[Record]
    stats: AskStats = field(default_factory=AskStats)
    skipped_lines: int = 0


@dataclass(slots=True)
class Progress:
    """Running figures for a progress bar; ``agree`` over ``known`` rows with a gold label."""

    total: int
    done: int = 0
    usable: int = 0
    known: int = 0
    agree: int = 0
    cost: float = 0.0


def _by_key(rows: Sequence[Example], task: TaskFile, settings: Settings) -> dict[str, Example]:
    owners: dict[str, Example] = {}
    for row in rows:
        for key in row_keys(row, task, settings.model, settings.sampling, settings.samples):
            owners.setdefault(key, row)
    return owners


def annotate(
    rows: Sequence[Example],
    task: TaskFile,
    teacher: Teacher,
    journal_path: Path,
    settings: Settings,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    on_wait: Callable[[float, str], None] | None = None,
    budget_of: Callable[[Journal], Budget] | None = None,
) -> Annotation:
    """Ask for every row that the journal does not answer yet, then parse all of it.

    Gold labels are used for the progress figures only; they reach neither prompt nor result. ``budget_of`` gives
    the budget in place of one from the settings' limits and what the journal has spent. ``on_wait`` is told the
    seconds and the reason of every wait that a person would notice.
    """
    owners = _by_key(rows, task, settings)
    with Journal(journal_path) as journal:
        progress = Progress(total=len(owners), cost=journal.total_cost)

        def note(record: Record) -> None:
            row = owners[record.key]
            parsed = read_record(task, record, row.choices)
            progress.done += 1
            progress.cost += record.cost
            progress.usable += parsed.reason is None
            if parsed.reason is None and row.label is not None:
                progress.known += 1
                progress.agree += same_answer(row.label, parsed.label or "", task.compare)
            if on_progress is not None:
                on_progress(progress)

        wanted = _left(rows, task, settings, journal.records)
        asked_again = {call.key for call in wanted}
        for key in owners:
            if key in journal and key not in asked_again:
                note(dataclasses.replace(journal.records[key], cost=0.0))
        budget = (budget_of or partial(_own_budget, settings))(journal)
        stats = AskStats()
        if wanted:
            stats = asyncio.run(_ask(wanted, teacher, journal, settings, budget, note, on_wait))
        records = journal.records

        def lookup(_: int, row: Example) -> list[Record | None]:
            return [
                records.get(key)
                for key in row_keys(row, task, settings.model, settings.sampling, settings.samples)
            ]

        used = [records[key] for key in owners if key in records]
        return Annotation(collect(rows, task, lookup), used, stats, journal.skipped)


def _own_budget(settings: Settings, journal: Journal) -> Budget:
    return Budget(
        settings.prices,
        settings.max_cost,
        settings.max_total_tokens,
        spent_cost=journal.total_cost,
        spent_tokens=journal.total_tokens,
    )


async def _ask(
    wanted: Iterable[Any],
    teacher: Teacher,
    journal: Journal,
    settings: Settings,
    budget: Budget,
    note: Callable[[Record], None],
    on_wait: Callable[[float, str], None] | None,
) -> AskStats:
    try:
        return await ask(
            wanted,
            teacher,
            journal,
            settings.sampling,
            budget,
            concurrency=settings.concurrency,
            max_attempts=settings.max_attempts,
            server=settings.server,
            on_record=note,
            on_wait=on_wait,
        )
    finally:
        await teacher.close()


def annotate_outputs(
    rows: Sequence[Example], task: TaskFile, outputs: Sequence[Record] | dict[str, Record], settings: Settings
) -> Annotation:
    """Parse finished outputs: one a row in row order, or by journal key.

    Raises:
        DataError: the number of positional outputs is not the number of rows, or no key fits.

    """
    if isinstance(outputs, dict):
        by_key = outputs

        def lookup(_: int, row: Example) -> list[Record | None]:
            return [
                by_key.get(key)
                for key in row_keys(row, task, settings.model, settings.sampling, settings.samples)
            ]

        owners = _by_key(rows, task, settings)
        used = [by_key[key] for key in owners if key in by_key]
        if by_key and not used:
            raise DataError(
                "No output belongs to any of the rows. Use the task file, model, samples and sampling options "
                "with which --emit-batch was called: they are part of each request's custom_id."
            )
        return Annotation(collect(rows, task, lookup), used)
    listed = list(outputs)
    if len(listed) != len(rows):
        raise DataError(
            f"There are {len(listed)} outputs for {len(rows)} rows; outputs without keys are matched by "
            "position, so the numbers must be equal."
        )
    return Annotation(collect(rows, task, lambda index, _: [listed[index]]), listed)


def _left(
    rows: Sequence[Example], task: TaskFile, settings: Settings, records: Mapping[str, Record]
) -> list[Call]:
    """Return the calls that ``records`` do not answer yet."""
    return list(
        unfinished(
            rows, task, settings.model, settings.sampling, settings.samples, records,
            retry_failed=settings.retry_failed, server=settings.server,
        )
    )  # fmt: skip


def estimate(
    rows: Sequence[Example], task: TaskFile, settings: Settings, records: dict[str, Record]
) -> Estimate:
    """Return what asking the rest will take, likely and at most.

    Tokens are estimated from characters, at the ratio that the journal's counted calls show, else
    3.5 a token; a likely answer is as long as those in the journal, else as the worked examples'.
    """
    estimator = TokenEstimator()
    calls = _left(rows, task, settings, records)
    written = [record.completion_tokens for record in records.values() if record.completion_tokens]
    counted = [record for record in records.values() if record.text and record.completion_tokens]
    for record in counted:
        estimator.learn(len(record.text), record.completion_tokens)
    shots = [len(f"{shot.rationale} {task.answer_marker} {shot.label}.") for shot in task.shots]
    each = (
        sum(written) / len(written)
        if written
        else estimator.tokens(int(sum(shots) / max(len(shots), 1)) or 200)
    )
    each = min(each, settings.sampling.max_tokens)
    asked = sum(estimator.tokens(call.prompt.n_chars) for call in calls)
    likely, most = int(each * len(calls)), settings.sampling.max_tokens * len(calls)
    return Estimate(
        len(calls),
        asked,
        likely,
        most,
        settings.prices.cost(asked, likely),
        settings.prices.cost(asked, most),
    )


def write_annotation(
    annotation: Annotation, task: TaskFile, out: Path, *, model: str, keep_failed: bool = False
) -> dict[str, Any]:
    """Write ``out`` and, beside it, ``.failed.jsonl``, ``.report.json`` and ``.report.html``.

    Returns:
        The report.

    """
    good = [item.example for item in annotation.results if item.reason is None or keep_failed]
    write_examples(out, good)
    failed = [
        {
            "id": item.example.id,
            "input": item.example.input,
            "reason": item.reason,
            "texts": list(item.texts),
            **({"detail": item.detail} if item.detail else {}),
        }
        for item in annotation.results
        if item.reason is not None
    ]
    files.write_text(
        out.with_suffix(".failed.jsonl"),
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in failed),
    )
    report = annotation_report(task, annotation.results, annotation.records, model=model)
    report["run"] = dataclasses.asdict(annotation.stats)
    report["refusal"] = next((item.detail for item in annotation.results if item.reason == "rejected"), None)
    files.write_json(out.with_suffix(".report.json"), report)
    files.write_text(out.with_suffix(".report.html"), annotation_page(report))
    return report
