"""Turn rows and finished calls into annotated examples: parse, vote, filter, count.

These are pure functions, so parsing can be repeated without asking again.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sbs_edge.chat.logprobs import label_distribution
from sbs_edge.data.answers import normalise, same_answer
from sbs_edge.data.example import Example
from sbs_edge.data.jsonl import example_to_json
from sbs_edge.teacher.calls import Sampling, request_fields
from sbs_edge.teacher.journal import Record
from sbs_edge.teacher.parse import Parsed, check_quality, parse_answer
from sbs_edge.teacher.prompt import Call, call_key, render
from sbs_edge.teacher.task import TaskFile

__all__ = [
    "RowResult",
    "calls_for",
    "collect",
    "output_row",
    "plain_row",
    "read_record",
    "row_keys",
    "unfinished",
    "void_refusals",
]


@dataclass(frozen=True, slots=True)
class RowResult:
    """A row after annotation.

    Attributes:
        example: the row, with teacher's label, rationale and confidence where ``reason`` is None.
        reason: why the row has no annotation, or None.
        votes: parsed answers by label, most votes first.
        texts: the teacher's texts, one per answered sample.
        detail: the server's words if it refused, or None.
        reasoning: the model's reasoning behind the annotation, empty where none came.

    """

    example: Example
    reason: str | None
    votes: tuple[tuple[str, int], ...] = ()
    texts: tuple[str, ...] = ()
    detail: str | None = None
    reasoning: str = ""


def calls_for(
    rows: Iterable[Example], task: TaskFile, model: str, sampling: Sampling, samples: int = 1
) -> Iterator[Call]:
    """Yield the calls for ``rows``, ``samples`` per row; equal prompts have equal keys."""
    for row in rows:
        prompt = render(task, row, sampling.structured)
        if "stop" in sampling.omit:
            prompt = dataclasses.replace(prompt, stop=())
        for sample in range(samples):
            yield Call(
                call_key(prompt, model, request_fields(prompt, sampling, sample), sample), prompt, sample
            )


def row_keys(row: Example, task: TaskFile, model: str, sampling: Sampling, samples: int = 1) -> list[str]:
    """Return the journal keys of a row, one per sample."""
    return [call.key for call in calls_for([row], task, model, sampling, samples)]


def read_record(task: TaskFile, record: Record, choices: Sequence[str] | None) -> Parsed:
    """Parse a finished call and apply the filters; ``reason`` says why it cannot be used."""
    if record.error:
        return Parsed(reason=record.error.split(":", 1)[0], reasoning=record.reasoning)
    parsed = parse_answer(task, record.text, choices, record.finish_reason)
    parsed = parsed._replace(reasoning=record.reasoning or parsed.reasoning)
    if parsed.reason is None and task.rationale_from != "answer":
        parsed = parsed._replace(rationale=" ".join(parsed.reasoning.split()))
        if not parsed.rationale:
            return parsed._replace(reason="reasoning-missing")
    if parsed.reason is None:
        return parsed._replace(reason=check_quality(task, parsed, choices))
    return parsed


def void_refusals(records: Mapping[str, Record], server: str) -> Callable[[Record], bool]:
    """Return a function that says whether a record is a refusal without meaning for its row.

    A refusal counts only if ``server`` itself refused and has answered other calls. A refusal from another address, or
    from a server that answered nothing, says nothing about the row.
    """
    answers = any(record.server == server and not record.is_refusal for record in records.values())
    return lambda record: record.is_refusal and not (answers and record.server == server)


def unfinished(
    rows: Iterable[Example],
    task: TaskFile,
    model: str,
    sampling: Sampling,
    samples: int,
    records: Mapping[str, Record],
    *,
    retry_failed: bool = False,
    server: str = "",
) -> Iterator[Call]:
    """Yield each call that has no record; with ``retry_failed`` also those whose answer cannot be used.

    A refusal that :func:`void_refusals` finds does not count as a record.
    """
    is_void = void_refusals(records, server)
    seen: set[str] = set()
    for row in rows:
        for call in calls_for([row], task, model, sampling, samples):
            if call.key in seen:
                continue
            seen.add(call.key)
            record = records.get(call.key)
            if (
                record is None
                or is_void(record)
                or (retry_failed and read_record(task, record, row.choices).reason)
            ):
                yield call


def collect(
    rows: Sequence[Example],
    task: TaskFile,
    lookup: Callable[[int, Example], Sequence[Record | None]],
) -> list[RowResult]:
    """Return a result for each row, in order.

    With several samples the label with most votes wins (ties: the one sampled first), the rationale
    is that of the first sample that agrees with it, ``rationales`` are those of all that agree, and the
    confidence is the share of all samples asked that agree: a sample that could not be read counts against.
    ``teacher_probs`` are the mean over the samples that could be read: of the log-probabilities at the label
    where the server gave them, else of the votes.

    Args:
        rows: the rows, in input order.
        task: the task file.
        lookup: returns the records of a row (index, row), one per sample; None if unanswered.
    """
    results: list[RowResult] = []
    inputs: set[tuple[str, tuple[str, ...] | None]] = set()
    for index, row in enumerate(rows):
        result = _row(row, task, lookup(index, row))
        if task.filters.duplicates and result.reason is None:
            identity = (normalise(row.input), row.choices)
            if identity in inputs:
                result = dataclasses.replace(result, example=plain_row(row), reason="duplicate-input")
            inputs.add(identity)
        results.append(result)
    return results


def output_row(result: RowResult) -> dict[str, Any]:
    """Return a row's fields as they are written, with the model's reasoning if it gave any."""
    return {
        **example_to_json(result.example),
        **({"reasoning": result.reasoning} if result.reasoning else {}),
    }


def plain_row(row: Example) -> Example:
    """Return the row without any annotation."""
    return dataclasses.replace(
        row, teacher_label=None, rationale=None, rationales=(), teacher_probs=(), confidence=1.0
    )


def _probs(
    task: TaskFile, row: Example, answers: Sequence[tuple[Record, str]]
) -> tuple[tuple[str, float], ...]:
    """Return the mean distribution over labels; empty for one answer without log-probabilities."""
    known = task.labels if task.label_kind == "closed" else row.distinct_choices
    sums: dict[str, float] = {}
    soft = False
    for record, label in answers:
        found = label_distribution(record.top_logprobs, label, known, lettered=task.parser == "choice")
        total = sum(found.values())
        soft = soft or total > 0.0
        for name, p in found.items() if total > 0.0 else [(label, 1.0)]:
            sums[name] = sums.get(name, 0.0) + p / (total or 1.0)
    if not soft and len(answers) < 2:
        return ()
    ordered = sorted(sums.items(), key=lambda item: -item[1])
    return tuple((name, round(p / len(answers), 6)) for name, p in ordered if p > 0.0)


def _row(row: Example, task: TaskFile, records: Sequence[Record | None]) -> RowResult:
    answered = [record for record in records if record is not None]
    texts = tuple(record.text for record in answered)
    if not answered:
        return RowResult(plain_row(row), "unanswered")
    read = [(record, read_record(task, record, row.choices)) for record in answered]
    good = [(record, item) for record, item in read if item.reason is None and item.label]
    if not good:
        reasons = Counter(item.reason or "label-unreadable" for _, item in read)
        detail = next((record.error for record in answered if record.error), None)
        reasoning = next((item.reasoning for _, item in read if item.reasoning), "")
        return RowResult(plain_row(row), reasons.most_common(1)[0][0], (), texts, detail, reasoning)
    groups: list[list[tuple[Record, Parsed]]] = []
    for record, item in good:
        for group in groups:
            if same_answer(group[0][1].label or "", item.label or "", task.compare):
                group.append((record, item))
                break
        else:
            groups.append([(record, item)])
    groups.sort(key=len, reverse=True)  # stable: among equals, the first sample comes first
    best = groups[0][0][1]
    rationales = tuple(dict.fromkeys(item.rationale for _, item in groups[0] if item.rationale))
    answers = [(record, group[0][1].label or "") for group in groups for record, _ in group]
    example = dataclasses.replace(
        row,
        teacher_label=best.label,
        rationale=best.rationale,
        rationales=rationales if len(rationales) > 1 else (),
        teacher_probs=_probs(task, row, answers),
        confidence=len(groups[0]) / len(records),
    )
    votes = tuple((group[0][1].label or "", len(group)) for group in groups)
    return RowResult(example, None, votes, texts, reasoning=best.reasoning)
