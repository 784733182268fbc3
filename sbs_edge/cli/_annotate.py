"""The steps of ``sbs-edge annotate``."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from sbs_edge.cli._common import print_json
from sbs_edge.progress import ProgressLine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sbs_edge.data.example import Example
    from sbs_edge.teacher.annotate import Annotation, Settings
    from sbs_edge.teacher.calls import Sampling, Teacher
    from sbs_edge.teacher.task import TaskFile

__all__ = [
    "Connection",
    "ask_teacher",
    "emit",
    "outcome",
    "read_outputs",
    "read_rows",
    "say_estimate",
    "settle_from_journal",
    "summary",
]


@dataclasses.dataclass(frozen=True, slots=True, repr=False)
class Connection:
    """The address of the teacher: keyword arguments of :func:`sbs_edge.teacher.connect.connect`, with secrets."""

    backend: str = "openai"
    base_url: str | None = None
    api_key_env: str | None = None
    key_header: str = "Authorization"
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    timeout: float = 120.0
    device: str | None = None

    def identity(self) -> str:
        """Return the server's address without secrets.

        Raises:
            UsageError: the address, the key or a header cannot be used.

        """
        if self.backend != "openai":
            return self.backend
        from sbs_edge.teacher.openai_api import endpoint_of

        return endpoint_of(
            self.base_url,
            api_key_env=self.api_key_env or "OPENAI_API_KEY",
            key_header=self.key_header,
            headers=self.headers,
        ).identity


def connection_of(
    task: TaskFile,
    sampling: Sampling,
    connection: Connection,
    *,
    server: str | None = None,
    header: Sequence[str] = (),
    request: Sequence[str] = (),
    omit: Sequence[str] = (),
    extra_body: str | None = None,
    structured: str | None = None,
) -> tuple[Sampling, Connection]:
    """Return both with what flags, task file and server preset say; arguments as the flags of the same names."""
    from typing import get_args

    from sbs_edge.teacher.connect import headers_of, server_preset, with_request
    from sbs_edge.teacher.task import Structured

    preset = server_preset(server, connection.base_url)
    policy = next((item for item in get_args(Structured) if item == structured), None)
    return (
        with_request(
            sampling, task, preset, request=request, omit=omit, extra_body=extra_body, structured=policy
        ),
        dataclasses.replace(
            connection,
            base_url=connection.base_url or preset.base_url or None,
            api_key_env=connection.api_key_env or preset.api_key_env,
            key_header=preset.key_header,
            headers=headers_of(task, header),
        ),
    )


def read_rows(
    data: str,
    dataset: str | None,
    split: str,
    column: list[str],
    limit: int | None,
    skip_bad_rows: bool,
    console: Console,
) -> list[Example]:
    """Read the rows to annotate; malformed ones stop the command unless they may be left out."""
    from sbs_edge.data.readers import ColumnMap, read_examples, refuse

    if dataset is not None:
        from sbs_edge.data.paper import read_paper_files
        from sbs_edge.errors import UsageError

        found = read_paper_files(data, dataset)
        if split not in found.splits:
            raise UsageError(f"{dataset} has no split {split!r}; it has {', '.join(found.splits)}.")
        examples, rejected = found.splits[split], found.rejected[split]
        # The teacher whose outputs are beside the rows is not the teacher of this run.
        examples = [dataclasses.replace(e, teacher_label=None, rationale=None) for e in examples[:limit]]
    else:
        result = read_examples(data, columns=ColumnMap.parse(column), limit=limit, split=split)
        examples, rejected = result.examples, result.rejected
    if rejected and not skip_bad_rows:
        refuse(rejected)
    if rejected:
        console.print(f"{len(rejected)} malformed rows left out; the first: {rejected[0]}", highlight=False)
    return examples


def teacher_of(connection: Connection, settings: Settings) -> Teacher:
    """Return the teacher behind ``connection``."""
    from sbs_edge.teacher.connect import connect

    return connect(settings, **dataclasses.asdict(connection))


def read_outputs(paths: list[Path], settings: Settings) -> Any:
    """Read finished outputs of either layout."""
    from sbs_edge.errors import UsageError
    from sbs_edge.teacher.outputs import read_batch_outputs, read_paper_outputs

    found: list[Path] = []
    for path in paths:
        matches = sorted(path.parent.glob(path.name)) if any(c in path.name for c in "*?[") else [path]
        if not matches:
            raise UsageError(f"No file matches {path}.")
        found += matches
    kinds = {path.suffix for path in found}
    if kinds == {".json"}:
        return read_paper_outputs(found)
    if kinds == {".jsonl"}:
        return read_batch_outputs(found, settings.prices)
    raise UsageError(
        "--outputs takes .json files (arrays of strings) or .jsonl files (Batch output), not both."
    )


def settle_from_journal(settings: Settings, path: Path) -> tuple[Settings, dict[str, Any]]:
    """Return the settings with the form that the journal's runs settled, and its records; nobody is asked.

    Where no run has settled a form, ``auto`` stands for plain text and ``on`` for a JSON schema.
    """
    from sbs_edge.teacher.journal import Journal
    from sbs_edge.teacher.probe import form_from_notes

    notes: dict[str, str] = {}
    records: dict[str, Any] = {}
    if path.exists():
        with Journal(path) as journal:
            notes, records = journal.notes, journal.records
    policy = settings.sampling.structured
    settled = form_from_notes(policy, notes, settings.model)
    form = settled.form if settled is not None else "json_schema" if policy == "on" else "off"
    sampling = dataclasses.replace(settings.sampling, structured=form)
    return dataclasses.replace(settings, sampling=sampling), records


def emit(
    rows: list[Example],
    spec: TaskFile,
    settings: Settings,
    journal_path: Path,
    path: Path,
    console: Console,
    json_output: bool,
) -> None:
    """Write OpenAI Batch input for the calls that the journal lacks."""
    from sbs_edge.teacher.collect import unfinished
    from sbs_edge.teacher.outputs import emit_batch

    settings, records = settle_from_journal(settings, journal_path)
    calls = unfinished(
        rows, spec, settings.model, settings.sampling, settings.samples, records,
        retry_failed=settings.retry_failed,
    )  # fmt: skip
    paths = emit_batch(calls, settings.model, settings.sampling, path)
    if json_output:
        print_json({"files": [str(item) for item in paths]})
    console.print(
        f"Wrote {', '.join(map(str, paths))}. Read the results with the same options and --outputs FILE.",
        highlight=False,
    )


def say_estimate(
    rows: list[Example],
    spec: TaskFile,
    settings: Settings,
    journal_path: Path,
    console: Console,
    json_output: bool,
) -> None:
    """Print the estimated calls, tokens and cost."""
    from sbs_edge.teacher.annotate import estimate

    settings, records = settle_from_journal(settings, journal_path)
    found = estimate(rows, spec, settings, records)
    figures = dataclasses.asdict(found)
    cost = f"cost about {found.likely_cost:.4f}, at most {found.most_cost:.4f}"
    if not settings.prices.known:
        figures |= {"likely_cost": None, "most_cost": None}
        cost = "cost unknown without --price-in and --price-out"
    if json_output:
        print_json({"rows": len(rows), **figures})
    console.print(
        f"{found.calls:,} calls for {len(rows):,} rows: about {found.prompt_tokens:,} prompt tokens and "
        f"{found.likely_completion_tokens:,} answer tokens (at most {found.most_completion_tokens:,}); "
        f"{cost}. Tokens are estimated from characters.",
        highlight=False,
    )


def ask_teacher(
    rows: list[Example],
    spec: TaskFile,
    settings: Settings,
    connection: Connection,
    journal_path: Path,
    console: Console,
) -> Annotation:
    """Ask with a progress bar, or a line every few seconds without a terminal."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from sbs_edge.teacher.annotate import Progress as Figures
    from sbs_edge.teacher.annotate import annotate

    teacher = teacher_of(connection, settings)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        shown = bar.add_task("", total=None)
        line = ProgressLine("annotating", len(rows), stream=sys.stderr)

        def update(figures: Figures) -> None:
            speed = bar.tasks[0].speed
            text = f"{speed:.1f} rows/s  " if speed else ""
            text += f"cost {figures.cost:.4f}  " if settings.prices.known else ""
            text += f"usable {figures.usable / max(figures.done, 1):.1%}"
            if figures.known:
                text += f"  agrees with gold {figures.agree / figures.known:.1%}"
            bar.update(shown, completed=figures.done, total=figures.total, description=text)
            if not console.is_terminal:
                line.total = figures.total
                line.update(figures.done, text.replace("  ", ", "))

        def wait(seconds: float, reason: str) -> None:
            console.print(f"Waiting {seconds:,.0f} s: {reason}.", highlight=False, markup=False)

        return annotate(rows, spec, teacher, journal_path, settings, on_progress=update, on_wait=wait)


REFUSED_SHARE = 0.1
"""A run whose server refused more than this share of the rows has failed."""


def outcome(
    annotation: Annotation, report: dict[str, Any], out: Path, server: str, fields: list[str]
) -> None:
    """Raise an error if a run did not do what was asked; its results are written already.

    Raises:
        SbsEdgeError: the budget was used up, calls were left unanswered, no row is annotated, or the server refused
            more than :data:`REFUSED_SHARE` of the rows.

    """
    from sbs_edge.errors import SbsEdgeError
    from sbs_edge.teacher.calls import CallFailed
    from sbs_edge.teacher.stop import advice

    stats, rows, done = annotation.stats, report["rows"], report["annotated"]
    if stats.stopped == "budget":
        raise SbsEdgeError(
            f"The budget ended the run: {done} of {rows} rows are annotated and written to {out}. Raise --max-cost "
            "or --max-total-tokens and run the same command to continue."
        )
    words = stats.last_failure or next((item.detail for item in annotation.results if item.detail), None)
    refused = report["reasons"].get("rejected", 0)
    said = ""
    if words:
        reason, _, detail = words.partition(": ")
        said = f" The last failure: {words.rstrip('. ')}. {advice(CallFailed(reason, detail), server, fields)}".rstrip()
    if stats.unanswered:
        kinds = ", ".join(f"{number} {reason}" for reason, number in stats.unanswered.items())
        raise SbsEdgeError(
            f"{sum(stats.unanswered.values())} calls were left unanswered ({kinds}); the rest is written to {out}.{said} "
            "Run the same command again: it asks only what is missing."
        )
    if done == 0:
        raise SbsEdgeError(
            f"None of the {rows} rows is annotated: {report['reasons']}.{said} The teacher's own words are in "
            f"{out.with_suffix('.failed.jsonl')}."
        )
    if refused > REFUSED_SHARE * rows:
        raise SbsEdgeError(
            f"The server refused {refused} of {rows} rows; {done} are annotated and written to {out}.{said} "
            "--retry-failed asks for the refused rows again."
        )


COPIED_SHARE = 0.1
"""The summary names copies of worked examples if more than this share of the rationales are."""


def _copied(report: dict[str, Any]) -> str:
    copied = report["copied_rationales"]
    if copied <= COPIED_SHARE * report["annotated"]:
        return ""
    return f"; {copied:,} rationales repeat a worked example word for word"


def summary(report: dict[str, Any], out: Path, console: Console, priced: bool) -> None:
    """Print one line about the outcome."""
    agreement = report["agreement"]["rate"]
    console.print(
        f"{report['annotated']:,} of {report['rows']:,} rows annotated -> {out}"
        + (f"; agreement with gold {agreement:.1%}" if agreement is not None else "")
        + (f"; without: {report['reasons']}" if report["reasons"] else "")
        + (f"; the server's words: {report['refusal']}" if report.get("refusal") else "")
        + _copied(report)
        + (f"; cost {report['calls']['cost']:.4f}" if priced or report["calls"]["cost"] else "")
        + f". Read {out.with_suffix('.report.html')}.",
        highlight=False,
    )
