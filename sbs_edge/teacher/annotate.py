"""Annotation from end to end: rows in, annotated examples, failures, report and journal out."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from sbs_edge import files
from sbs_edge.data.answers import same_answer
from sbs_edge.data.example import Example
from sbs_edge.errors import DataError
from sbs_edge.teacher.ask import AskStats, ask
from sbs_edge.teacher.calls import Sampling, Teacher
from sbs_edge.teacher.collect import (
    RowResult,
    calls_for,
    collect,
    output_row,
    plain_row,
    read_record,
    row_keys,
    unfinished,
    void_refusals,
)
from sbs_edge.teacher.cost import Budget, Estimate, Prices, TokenEstimator
from sbs_edge.teacher.journal import Journal, Record
from sbs_edge.teacher.probe import CANDIDATES, PROBED_ROWS, Settled, settle_form
from sbs_edge.teacher.prompt import Call
from sbs_edge.teacher.report import annotation_page, annotation_report
from sbs_edge.teacher.structured import Form
from sbs_edge.teacher.summary import before_summary, summary_call, with_summary
from sbs_edge.teacher.task import Structured, TaskFile

__all__ = ["Annotation", "Settings", "annotate", "annotate_outputs", "estimate", "write_annotation"]


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of an annotation.

    Attributes:
        model: the teacher's model, part of every journal key.
        sampling: request parameters, part of every journal key.
        samples: answers per row; above 1 the label is a majority vote.
        concurrency: requests in flight at once.
        prices: money per million tokens.
        max_cost, max_total_tokens: limits for all calls in the journal, or None.
        retry_failed: ask again if the journal's answer cannot be used.
        max_attempts: attempts per call before it is left to the next run.
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
    """The result of an annotation.

    Attributes:
        results: one per row, in row order.
        records: the finished calls behind them, and those that settled the form.
        stats: what this run did.
        skipped_lines: journal lines that could not be used.
        sampling: the request parameters as they were sent.
        refusal: the server's words about a form of structured outputs that it does not take, or None.

    """

    results: list[RowResult]
    records: list[Record]
    stats: AskStats = field(default_factory=AskStats)
    skipped_lines: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    refusal: str | None = None


@dataclass(slots=True)
class Progress:
    """Running figures for a progress bar; ``agree`` over ``known`` rows with a gold label."""

    total: int
    done: int = 0
    usable: int = 0
    known: int = 0
    agree: int = 0
    cost: float = 0.0


def _keys(row: Example, task: TaskFile, settings: Settings) -> list[str]:
    return row_keys(row, task, settings.model, settings.sampling, settings.samples)


def _by_key(rows: Sequence[Example], task: TaskFile, settings: Settings) -> dict[str, Example]:
    owners: dict[str, Example] = {}
    for row in rows:
        for key in _keys(row, task, settings):
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
    """Ask for every row that has no answer in the journal, then parse all answers.

    Gold labels are used only for the progress figures; neither prompts nor results contain them. ``budget_of`` returns
    the budget, instead of one from the settings' limits and the journal's cost. ``on_wait`` is called with the
    seconds and the reason of every wait that a person would notice.
    """
    with Journal(journal_path) as journal:
        budget = (budget_of or partial(_own_budget, settings))(journal)
        run = _Run(rows, before_summary(task), teacher, journal, settings, budget, on_progress, on_wait)
        return asyncio.run(run.annotate(task))


def _own_budget(settings: Settings, journal: Journal) -> Budget:
    return Budget(
        settings.prices,
        settings.max_cost,
        settings.max_total_tokens,
        spent_cost=journal.total_cost,
        spent_tokens=journal.total_tokens,
    )


@dataclass(slots=True)
class _Run:
    """One annotation on its way; ``stats`` counts its requests."""

    rows: Sequence[Example]
    task: TaskFile
    teacher: Teacher
    journal: Journal
    settings: Settings
    budget: Budget
    on_progress: Callable[[Progress], None] | None
    on_wait: Callable[[float, str], None] | None
    stats: AskStats = field(default_factory=AskStats)
    progress: Progress = field(default_factory=lambda: Progress(0))

    async def annotate(self, task: TaskFile) -> Annotation:
        records = self.journal.records
        try:
            settled = await self._settle()
            sampling = dataclasses.replace(self.settings.sampling, structured=settled.form)
            self.settings = settings = dataclasses.replace(self.settings, sampling=sampling)
            owners = _by_key(self.rows, self.task, settings)
            await self._ask_rows(owners)

            def lookup(_: int, row: Example) -> list[Record | None]:
                return [records.get(key) for key in _keys(row, self.task, settings)]

            results = collect(self.rows, self.task, lookup)
            keys = [*owners, *settled.probes]
            if task.rationale_from == "summary":
                results, summaries = await self._summarise(task, results)
                keys += summaries
        finally:
            await self.teacher.close()
        used = [records[key] for key in dict.fromkeys(keys) if key in records]
        return Annotation(results, used, self.stats, self.journal.skipped, sampling, settled.refusal)

    async def _settle(self) -> Settled:
        settings = self.settings

        def calls_of(form: Form) -> list[Call]:
            sampling = dataclasses.replace(settings.sampling, structured=form)
            return list(calls_for(self.rows[:PROBED_ROWS], self.task, settings.model, sampling))

        async def ask_one(call: Call, form: Form) -> None:
            asked = AskStats()
            try:
                await self._ask([call], form, None, asked)
            finally:
                self.stats.add_requests(asked)  # the request of a form that the server refuses counts too

        settled = await settle_form(
            settings.sampling.structured, settings.model, self.journal, calls_of, ask_one,
            has_plain=self._has_plain, marks=self.task.thinking_marks,
        )  # fmt: skip
        if settled.form == "off":
            for form in CANDIDATES:
                self._keep_probes(calls_of(form), calls_of("off"), settled.probes)
        return settled

    def _has_plain(self) -> bool:
        calls = calls_for(
            self.rows, self.task, self.settings.model, _plain(self.settings), self.settings.samples
        )
        found = (self.journal.records.get(call.key) for call in calls)
        return any(record is not None and not record.is_refusal for record in found)

    def _keep_probes(self, probed: Sequence[Call], plain: Sequence[Call], probes: Sequence[str]) -> None:
        """Keep what a server that ignores the form answered to its probe, where the row can be read from it."""
        for row, asked, call in zip(self.rows, probed, plain, strict=False):
            found = self.journal.records.get(asked.key) if asked.key in probes else None
            if found is None or call.key in self.journal or read_record(self.task, found, row.choices).reason:
                continue
            # The probe's own line holds what it took.
            unpaid = dataclasses.replace(found, key=call.key, prompt_tokens=0, completion_tokens=0, cost=0.0)
            self.journal.append(unpaid)

    async def _ask_rows(self, owners: dict[str, Example]) -> None:
        settings, journal = self.settings, self.journal
        self.progress = progress = Progress(total=len(owners), cost=journal.total_cost)

        def note(record: Record) -> None:
            row = owners[record.key]
            parsed = read_record(self.task, record, row.choices)
            progress.done += 1
            progress.cost += record.cost
            progress.usable += parsed.reason is None
            if parsed.reason is None and row.label is not None:
                progress.known += 1
                progress.agree += same_answer(row.label, parsed.label or "", self.task.compare)
            if self.on_progress is not None:
                self.on_progress(progress)

        wanted = list(
            unfinished(
                self.rows,
                self.task,
                settings.model,
                settings.sampling,
                settings.samples,
                journal.records,
                retry_failed=settings.retry_failed,
                server=settings.server,
            )
        )
        asked_again = {call.key for call in wanted}
        for key in owners:
            if key in journal and key not in asked_again:
                note(dataclasses.replace(journal.records[key], cost=0.0))
        if wanted:
            probed = self.stats
            self.stats = await self._ask(wanted, settings.sampling.structured, note)
            self.stats.add_requests(probed)

    async def _summarise(
        self, task: TaskFile, results: Sequence[RowResult]
    ) -> tuple[list[RowResult], list[str]]:
        """Ask for a summary of each annotated row's reasoning; return the results with them, and their keys."""
        calls = _summary_calls(results, self.settings)
        wanted = _missing_summaries(task, self.rows, results, self.settings, self.journal.records)
        self.progress.total += len(wanted)

        def note(record: Record) -> None:
            self.progress.done += 1
            self.progress.cost += record.cost
            if self.on_progress is not None:
                self.on_progress(self.progress)

        if wanted:
            self.stats.add(await self._ask(list(wanted.values()), "off", note))
        made = [
            result
            if call is None
            else with_summary(task, plain_row(row), result, self.journal.records.get(call.key))
            for row, result, call in zip(self.rows, results, calls, strict=True)
        ]
        return made, [call.key for call in calls if call is not None]

    async def _ask(
        self,
        calls: Sequence[Call],
        form: Structured,
        on_record: Callable[[Record], None] | None,
        stats: AskStats | None = None,
    ) -> AskStats:
        settings = self.settings
        return await ask(
            calls,
            self.teacher,
            self.journal,
            dataclasses.replace(settings.sampling, structured=form),
            self.budget,
            concurrency=settings.concurrency,
            max_attempts=settings.max_attempts,
            server=settings.server,
            stats=stats,
            on_record=on_record,
            on_wait=self.on_wait,
        )


def _plain(settings: Settings) -> Sampling:
    return dataclasses.replace(settings.sampling, structured="off")


def _summary_calls(results: Sequence[RowResult], settings: Settings) -> list[Call | None]:
    """Return the second call of each annotated row, None for the others."""
    return [
        summary_call(result, settings.model, _plain(settings)) if result.reason is None else None
        for result in results
    ]


def _missing_summaries(
    task: TaskFile,
    rows: Sequence[Example],
    results: Sequence[RowResult],
    settings: Settings,
    records: Mapping[str, Record],
) -> dict[str, Call]:
    """Return the second calls that are to be sent, by key; see :func:`~sbs_edge.teacher.collect.unfinished`."""
    is_void = void_refusals(records, settings.server)
    wanted: dict[str, Call] = {}
    for row, result, call in zip(rows, results, _summary_calls(results, settings), strict=True):
        if call is None:
            continue
        record = records.get(call.key)
        again = settings.retry_failed and with_summary(task, row, result, record).reason is not None
        if record is None or is_void(record) or again:
            wanted[call.key] = call
    return wanted


def annotate_outputs(
    rows: Sequence[Example], task: TaskFile, outputs: Sequence[Record] | dict[str, Record], settings: Settings
) -> Annotation:
    """Parse finished outputs: one per row in row order, or by journal key.

    Raises:
        DataError: the numbers of positional outputs and rows differ, or no key matches.

    """
    if isinstance(outputs, dict):
        by_key = outputs

        def lookup(_: int, row: Example) -> list[Record | None]:
            return [by_key.get(key) for key in _keys(row, task, settings)]

        owners = _by_key(rows, task, settings)
        used = [by_key[key] for key in owners if key in by_key]
        if by_key and not used:
            raise DataError(
                "No output belongs to any of the rows. Use the task file, model, samples and sampling options "
                "with which emit_batch was called: they are part of each request's custom_id."
            )
        return Annotation(collect(rows, task, lookup), used, sampling=settings.sampling)
    listed = list(outputs)
    if len(listed) != len(rows):
        raise DataError(
            f"There are {len(listed)} outputs for {len(rows)} rows; outputs without keys are matched by "
            "position, so the numbers must be equal."
        )
    results = collect(rows, task, lambda index, _: [listed[index]])
    return Annotation(results, listed, sampling=settings.sampling)


def estimate(
    rows: Sequence[Example], task: TaskFile, settings: Settings, records: dict[str, Record]
) -> Estimate:
    """Return the likely and the largest cost of asking for the missing rows.

    Tokens are estimated from characters, at the ratio of the journal's counted calls, or else
    3.5 per token. A likely answer is as long as those in the journal, or else as the worked examples'. Rationales that
    are summaries add a second call per row, whose prompt holds the reasoning: likely an answer's length, at most its
    limit.
    """
    estimator = TokenEstimator()
    first = before_summary(task)
    calls = list(
        unfinished(
            rows,
            first,
            settings.model,
            settings.sampling,
            settings.samples,
            records,
            retry_failed=settings.retry_failed,
            server=settings.server,
        )
    )
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
    asked, reasonings = sum(estimator.tokens(call.prompt.n_chars) for call in calls), 0
    n_calls, longest = len(calls), settings.sampling.max_tokens
    if task.rationale_from == "summary":
        unasked = {call.key for call in calls}
        open_rows = [row for row in rows if not unasked.isdisjoint(_keys(row, first, settings))]
        answered = [row for row in rows if unasked.isdisjoint(_keys(row, first, settings))]
        results = collect(
            answered, first, lambda _, row: [records.get(k) for k in _keys(row, first, settings)]
        )
        second = list(_missing_summaries(task, answered, results, settings, records).values())
        second += [summary_call(RowResult(row, None), settings.model, _plain(settings)) for row in open_rows]
        asked += sum(estimator.tokens(call.prompt.n_chars) for call in second)
        reasonings, n_calls = len(open_rows), n_calls + len(second)
    likely, most = int(each * n_calls), longest * n_calls
    likely_asked = asked + int(each * reasonings)
    return Estimate(
        n_calls,
        likely_asked,
        likely,
        most,
        settings.prices.cost(likely_asked, likely),
        settings.prices.cost(asked + longest * reasonings, most),
    )


def _json_lines(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_annotation(
    annotation: Annotation, task: TaskFile, out: Path, *, model: str, keep_failed: bool = False
) -> dict[str, Any]:
    """Write ``out`` and, beside it, ``.failed.jsonl``, ``.report.json`` and ``.report.html``.

    Returns:
        The report.

    """
    good = [output_row(item) for item in annotation.results if item.reason is None or keep_failed]
    files.write_text(out, _json_lines(good))
    failed = [
        {
            "id": item.example.id,
            "input": item.example.input,
            "reason": item.reason,
            "texts": list(item.texts),
            **({"detail": item.detail} if item.detail else {}),
            **({"reasoning": item.reasoning} if item.reasoning else {}),
        }
        for item in annotation.results
        if item.reason is not None
    ]
    files.write_text(out.with_suffix(".failed.jsonl"), _json_lines(failed))
    report = annotation_report(task, annotation.results, annotation.records, model=model)
    report["structured"] = annotation.sampling.structured
    report["run"] = dataclasses.asdict(annotation.stats)
    report["refusal"] = next((item.detail for item in annotation.results if item.reason == "rejected"), None)
    files.write_json(out.with_suffix(".report.json"), report)
    files.write_text(out.with_suffix(".report.html"), annotation_page(report))
    return report
