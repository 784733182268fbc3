"""Annotate with Ray: each actor has a teacher client, each unit a journal.

A unit's journal is beside its shard, so that the unit of a dead actor asks only for what is missing.
Limits on cost and tokens apply to all units together: see :mod:`sbs_edge.scale.ledger`.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbs_edge.data.example import Example
from sbs_edge.data.questions import Unanswerable, id_of
from sbs_edge.data.readers import ColumnMap, examples_of
from sbs_edge.data.rows import RawRow, printable
from sbs_edge.errors import UsageError
from sbs_edge.scale.run import run_units
from sbs_edge.scale.units import Unit, read_unit, shard_name, unit_of, write_shard

if TYPE_CHECKING:
    from sbs_edge.teacher.annotate import Settings
    from sbs_edge.teacher.cost import Budget
    from sbs_edge.teacher.journal import Journal
    from sbs_edge.teacher.task import TaskFile

__all__ = ["AnnotateWorker", "annotate_with_ray"]


def _example(place: str, row: Any, columns: ColumnMap) -> Example | dict[str, Any]:
    """Return a row as an example, or the output row that says why it cannot be used."""
    if isinstance(row, str):
        return {"id": printable(place), "input": None, "error": row}
    item = next(iter(examples_of([RawRow(0, row, "")], place, columns, place)))
    known = row.get(columns.id or "id") is not None
    if isinstance(item, Example):
        return item if known else dataclasses.replace(item, id=place)
    problem = item.reason + (f" ({item.detail})" if item.detail else "")
    try:
        identity = id_of(row[columns.id or "id"]) if known else None
    except Unanswerable:
        identity = None
    return {"id": printable(place) if identity is None else identity, "input": None, "error": problem}


def _wait_until_free(journal: Path, seconds: float = 60.0) -> None:
    """Wait for the lock of an actor that is ending: after its driver was killed, an actor lives on for a while."""
    if not journal.exists():
        return
    deadline = time.monotonic() + seconds
    with journal.open("rb") as handle:
        while time.monotonic() < deadline:  # after that, the journal itself reports that it is in use
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                time.sleep(0.1)
            else:
                return


def _say_wait(unit: int, seconds: float, reason: str) -> None:
    sys.stderr.write(f"unit {unit}: waiting {seconds:,.0f} s: {reason}\n")


def _has_failures(shard: bytes) -> bool:
    """Return whether the answer to a row could not be used; a row that could not be read has no input."""
    rows = (json.loads(line) for line in shard.splitlines())
    return any("error" in row and row["input"] is not None for row in rows)


class AnnotateWorker:
    """An actor that asks for the rows of a unit, then writes its shard."""

    def __init__(
        self,
        out: str,
        form: str,
        task: dict[str, Any],
        settings: Settings,
        connection: dict[str, Any],
        columns: list[str],
        journals: str,
        ledger: Any = None,
    ) -> None:
        from sbs_edge.teacher.task import parse_task

        self._task = parse_task(task, "the task")
        self._settings, self._connection, self._columns = settings, connection, columns
        self._out, self._form, self._journals = out, form, Path(journals)
        self._ledger = ledger

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Work on one unit (a batch of one row) and return its figures as JSON."""
        from sbs_edge.teacher.annotate import annotate
        from sbs_edge.teacher.collect import output_row
        from sbs_edge.teacher.connect import connect

        unit = unit_of(batch)
        started = time.perf_counter()
        columns = ColumnMap.parse(self._columns)
        read = [_example(place, row, columns) for place, row in read_unit(unit)]
        rows = [item for item in read if isinstance(item, Example)]
        name = shard_name(unit, self._form)
        journal = self._journals / f"{Path(name).stem}.jsonl"
        _wait_until_free(journal)
        teacher = connect(self._settings, **self._connection)
        annotation = annotate(
            rows,
            self._task,
            teacher,
            journal,
            self._settings,
            on_wait=lambda seconds, reason: _say_wait(unit.index, seconds, reason),
            budget_of=self._budget_of(unit.index),
        )
        results = iter(annotation.results)
        lines: list[dict[str, Any]] = []
        for item in read:
            if not isinstance(item, Example):
                lines.append(item)
                continue
            result = next(results)
            lines.append({**output_row(result), **({"error": result.reason} if result.reason else {})})
        unanswered = sum(annotation.stats.unanswered.values())
        all_refused = bool(annotation.records) and all(record.is_refusal for record in annotation.records)
        if unanswered == 0 and annotation.stats.stopped is None and not all_refused:
            write_shard(self._out, name, lines)  # otherwise the next run continues with this unit
        figures = {
            "unit": unit.index,
            "rows": len(lines),
            "errors": sum("error" in line for line in lines),
            "annotated": sum("error" not in line for line in lines),
            "cost": sum(record.cost for record in annotation.records),
            "seconds": time.perf_counter() - started,
            "ended": time.time(),
        }
        return {"figures": [json.dumps(figures)]}

    def _budget_of(self, unit: int) -> Callable[[Journal], Budget] | None:
        """Return a function that opens the unit's account with the ledger, or None if nothing is limited."""
        if self._ledger is None:
            return None

        def opened(journal: Journal) -> Budget:
            import ray

            from sbs_edge.scale.ledger import SharedBudget

            ray.get(self._ledger.begin.remote(unit, journal.total_cost, journal.total_tokens))
            return SharedBudget(self._settings.prices, self._ledger, unit)

        return opened


def _spent(journals: Path, units: list[Unit], form: str) -> dict[int, tuple[float, int]]:
    """Return unit -> (cost, tokens) of the journals of earlier runs."""
    from sbs_edge.teacher.journal import Journal

    found: dict[int, tuple[float, int]] = {}
    for unit in units:
        path = journals / f"{Path(shard_name(unit, form)).stem}.jsonl"
        if path.exists():
            _wait_until_free(path)
            with Journal(path) as journal:
                found[unit.index] = journal.total_cost, journal.total_tokens
    return found


# Settings that may change between a run and its continuation.
_MAY_CHANGE = {
    "concurrency", "max_attempts", "retry_failed", "max_cost", "max_total_tokens", "prices", "server",
}  # fmt: skip
# The request's fields are compared as they are sent; headers may contain a secret.
_OF_REQUEST = {"headers", "request", "omit", "extra_body", "max_tokens", "structured"}


def _output_settings(task: TaskFile, settings: Settings) -> dict[str, Any]:
    """Return what must be the same for a folder to be continued."""
    plain = task.model_dump(mode="json", exclude_none=True)
    asked = {name: value for name, value in plain.items() if name not in _OF_REQUEST}
    for name in ("rationale_from", "thinking_marks"):  # at their defaults, folders of older versions go on
        if getattr(task, name) == type(task).model_fields[name].default:
            del asked[name]
    shown = {name: value for name, value in dataclasses.asdict(settings).items() if name not in _MAY_CHANGE}
    return {"task": asked, **shown, "sampling": settings.sampling.answer_parameters()}


def annotate_with_ray(
    pattern: str,
    out: str | Path,
    task: TaskFile,
    settings: Settings,
    connection: dict[str, Any],
    *,
    columns: list[str] | None = None,
    workers: int = 2,
    shard_bytes: int = 1_000_000,
    ray_address: str | None = None,
    journal: str | Path | None = None,
) -> dict[str, Any]:
    """Annotate the files that match ``pattern`` into shards under ``out``, with one output row per input row.

    Rows without annotation have an ``error``; :func:`sbs_edge.data.readers.read_examples` reads the
    shards back. ``journal`` is the folder of the journals, a path that all nodes share: object stores
    cannot append (None: ``journal`` in ``out``). Arguments as for :func:`sbs_edge.scale.run.run_units` and
    :func:`sbs_edge.teacher.connect.connect`.
    """
    if journal is None and "://" in str(out):
        raise UsageError(
            f"The journals cannot be in {out}, because an object store cannot append a line. Pass a folder that all "
            "nodes share (journal=FOLDER)."
        )
    ColumnMap.parse(columns or ())  # refused here, not by every worker
    journals = str(Path(journal or Path(str(out)) / "journal").absolute())

    def ledger(ray: Any, units: list[Unit]) -> dict[str, Any]:
        if settings.max_cost is None and settings.max_total_tokens is None:
            return {}
        from sbs_edge.scale.ledger import Ledger

        spent = _spent(Path(journals), units, "jsonl")
        account = settings.prices, settings.max_cost, settings.max_total_tokens, spent
        return {"ledger": ray.remote(Ledger).options(num_cpus=0, max_concurrency=1000).remote(*account)}

    return run_units(
        AnnotateWorker,
        {
            "task": task.model_dump(mode="json", exclude_none=True),
            "settings": settings,
            "connection": connection,
            "columns": columns or [],
            "journals": journals,
        },
        pattern if "://" in pattern else str(Path(pattern).absolute()),
        str(out),
        settings={**_output_settings(task, settings), "columns": columns or []},
        workers=workers,
        cpus_each=0.25,  # a client waits for the network
        shard_bytes=shard_bytes,
        ray_address=ray_address,
        again=_has_failures if settings.retry_failed else None,
        with_ray=ledger,
    )
