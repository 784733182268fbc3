"""``sbs-edge annotate``: rationales and labels from a teacher, each answer paid for once."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from sbs_edge.commands._common import ConfigOption, DryRunOption, JsonOption, print_json, save_resolved

if TYPE_CHECKING:
    from sbs_edge.data.example import Example
    from sbs_edge.teacher.annotate import Annotation, Settings
    from sbs_edge.teacher.calls import Teacher
    from sbs_edge.teacher.task import TaskFile

__all__ = ["register"]


class Backend(StrEnum):
    """Who answers."""

    openai = "openai"
    local = "local"


class Engine(StrEnum):
    """What runs the calls."""

    local = "local"
    ray = "ray"


@dataclasses.dataclass(frozen=True, slots=True)
class _Connection:
    backend: str
    base_url: str | None
    api_key_env: str
    timeout: float
    device: str | None


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""

    @app.command()
    def annotate(
        ctx: typer.Context,
        data: Annotated[
            str,
            typer.Argument(
                metavar="INPUT",
                help="Rows to annotate: a file, a directory, a pattern, or a data set's name.",
            ),
        ],
        task: Annotated[str, typer.Option(help="Task file, or a preset: cqa, svamp, anli1, esnli, hvac.")],
        out: Annotated[
            Path, typer.Option(help="Annotated rows (JSON Lines); failures, report and journal go beside it.")
        ] = Path("annotated.jsonl"),
        model: Annotated[
            str,
            typer.Option(
                help="The teacher's model, as the server knows it; a hub name or directory with --backend local."
            ),
        ] = "teacher",
        backend: Annotated[
            Backend,
            typer.Option(
                help="openai: any endpoint of the OpenAI protocol; local: a transformers model in this process."
            ),
        ] = Backend.openai,
        base_url: Annotated[
            str | None,
            typer.Option(
                help="The endpoint up to and including /v1. None: OPENAI_BASE_URL or the package's default."
            ),
        ] = None,
        api_key_env: Annotated[
            str,
            typer.Option(
                help="Environment variable that holds the key; the key itself is never a flag and never written."
            ),
        ] = "OPENAI_API_KEY",
        timeout: Annotated[float, typer.Option(help="Seconds to wait for one answer.")] = 120.0,
        device: Annotated[str | None, typer.Option(help="Device of a local model.")] = None,
        dataset: Annotated[
            str | None, typer.Option(help="Read INPUT in the paper's layout: cqa, svamp, anli1 or esnli.")
        ] = None,
        split: Annotated[
            str, typer.Option(help="Split to annotate, with --dataset or a data set's name.")
        ] = "train",
        column: Annotated[
            list[str] | None, typer.Option(help="FIELD=COLUMN where the data's columns have other names.")
        ] = None,
        limit: Annotated[int | None, typer.Option(min=1, help="Annotate only the first rows.")] = None,
        skip_bad_rows: Annotated[
            bool, typer.Option("--skip-bad-rows", help="Go on without malformed rows.")
        ] = False,
        samples: Annotated[
            int,
            typer.Option(
                min=1, help="Answers a row; above 1 the label is voted on and costs grow as many times."
            ),
        ] = 1,
        temperature: Annotated[
            float | None, typer.Option(min=0, help="0 is greedy. None: 0 for one sample, 0.7 for several.")
        ] = None,
        top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Nucleus sampling.")] = None,
        max_tokens: Annotated[
            int | None,
            typer.Option(min=1, help="Limit of one answer in tokens; answers cut off by it are of no use."),
        ] = None,
        sampling_seed: Annotated[
            int | None, typer.Option(help="Seed sent with each request, where the server knows one.")
        ] = None,
        concurrency: Annotated[
            int, typer.Option(min=1, help="Requests on their way at once; a kill repeats at most this many.")
        ] = 8,
        max_attempts: Annotated[
            int, typer.Option(min=1, help="How often one call is sent before it is left to the next run.")
        ] = 6,
        price_in: Annotated[float, typer.Option(min=0, help="Money per million prompt tokens.")] = 0.0,
        price_out: Annotated[float, typer.Option(min=0, help="Money per million answer tokens.")] = 0.0,
        max_cost: Annotated[
            float | None,
            typer.Option(min=0, help="Stop before the journal's calls cost more than this in all."),
        ] = None,
        max_total_tokens: Annotated[
            int | None,
            typer.Option(min=1, help="Stop before the journal's calls take more tokens than this in all."),
        ] = None,
        journal: Annotated[
            Path | None, typer.Option(help="Where finished calls are kept. None: OUT with .journal.jsonl.")
        ] = None,
        retry_failed: Annotated[
            bool,
            typer.Option(
                "--retry-failed", help="Ask again where an answer was refused, empty, cut off or unreadable."
            ),
        ] = False,
        keep_failed: Annotated[
            bool,
            typer.Option(
                "--keep-failed",
                help="Keep rows without annotation in OUT, without teacher's label and rationale.",
            ),
        ] = False,
        outputs: Annotated[
            list[Path] | None,
            typer.Option(
                help="Ask nobody: read finished outputs (paper's layout .json, or Batch output .jsonl)."
            ),
        ] = None,
        emit_batch: Annotated[
            Path | None,
            typer.Option(help="Ask nobody: write OpenAI Batch input for what is not in the journal."),
        ] = None,
        show_prompt: Annotated[
            bool, typer.Option("--show-prompt", help="Print the first row's prompt and stop.")
        ] = False,
        row: Annotated[int, typer.Option(min=0, help="Which row --show-prompt shows, from 0.")] = 0,
        engine: Annotated[
            Engine,
            typer.Option(
                help="local: this process; ray: Ray Data workers, resumable by shard (extra 'scale')."
            ),
        ] = Engine.local,
        workers: Annotated[
            int, typer.Option(min=1, help="Ray actors, each with --concurrency requests on their way.")
        ] = 2,
        ray_address: Annotated[
            str | None, typer.Option(help="Ray cluster; none starts one on this machine.")
        ] = None,
        config: ConfigOption = None,
        json_output: JsonOption = False,
        dry_run: DryRunOption = False,
    ) -> None:
        """Ask a teacher for labels and rationales. Killed and started again, it repeats no finished call.

        Examples: sbs-edge annotate rows.jsonl --task task.yaml --base-url http://localhost:8080/v1 --model any;
        sbs-edge annotate DIR --dataset svamp --task svamp --outputs 'DIR/svamp/llm/train_CoT_*.json'
        """
        from sbs_edge.errors import SbsEdgeError, UsageError
        from sbs_edge.teacher.annotate import Settings, annotate_outputs, write_annotation
        from sbs_edge.teacher.calls import Sampling
        from sbs_edge.teacher.cost import Prices
        from sbs_edge.teacher.prompt import render, show
        from sbs_edge.teacher.task import load_task

        console = Console(stderr=True)
        spec = load_task(task)
        heat = temperature if temperature is not None else (0.7 if samples > 1 else 0.0)
        if samples > 1 and heat == 0:
            raise UsageError(
                "--samples above 1 needs a --temperature above 0: greedy answers are all the same."
            )
        settings = Settings(
            model=model,
            sampling=Sampling(heat, max_tokens or spec.max_tokens, top_p, sampling_seed),
            samples=samples,
            concurrency=concurrency,
            prices=Prices(price_in, price_out),
            max_cost=max_cost,
            max_total_tokens=max_total_tokens,
            retry_failed=retry_failed,
            max_attempts=max_attempts,
        )
        connection = _Connection(backend.value, base_url, api_key_env, timeout, device)
        journal_path = journal or out.with_suffix(".journal.jsonl")
        if engine is Engine.ray:
            from sbs_edge.scale.annotate import annotate_with_ray

            report = annotate_with_ray(
                data, out, spec, settings, dataclasses.asdict(connection),
                columns=column or [], workers=workers, ray_address=ray_address,
            )  # fmt: skip
            print_json(report) if json_output else console.print(report)
            return
        rows = _rows(data, dataset, split, column or [], limit, skip_bad_rows, console)
        if not rows:
            raise UsageError(f"{data} holds no row to annotate.")
        if show_prompt:
            import sys

            if row >= len(rows):
                raise UsageError(f"--row {row} is beyond the last row, {len(rows) - 1}.")
            sys.stdout.write(show(render(spec, rows[row])) + "\n")
            return
        if emit_batch is not None:
            _emit(rows, spec, settings, journal_path, emit_batch, console, json_output)
            return
        if dry_run:
            _estimate(rows, spec, settings, journal_path, console, json_output)
            return
        out.parent.mkdir(parents=True, exist_ok=True)
        save_resolved(ctx, out.with_suffix(".config.yaml"))
        if outputs:
            annotation = annotate_outputs(rows, spec, _outputs(outputs, settings), settings)
        else:
            annotation = _ask(rows, spec, settings, connection, journal_path, console)
        report = write_annotation(annotation, spec, out, model=model, keep_failed=keep_failed)
        if json_output:
            print_json({name: value for name, value in report.items() if name != "samples"})
        _summary(report, out, console)
        stats = annotation.stats
        if stats.stopped == "budget":
            raise SbsEdgeError(
                f"The budget ended the run: {report['annotated']} of {report['rows']} rows are annotated and "
                f"written to {out}. Raise --max-cost or --max-total-tokens and run the same command to go on."
            )
        if stats.unanswered:
            raise SbsEdgeError(
                f"{sum(stats.unanswered.values())} calls stayed unanswered ({stats.unanswered}); the rest is "
                f"written to {out}. Run the same command again: it asks only what is missing."
            )


def _rows(
    data: str,
    dataset: str | None,
    split: str,
    column: list[str],
    limit: int | None,
    skip_bad_rows: bool,
    console: Console,
) -> list[Example]:
    from sbs_edge.data.readers import ColumnMap, read_examples, refuse

    if dataset is not None:
        from sbs_edge.data.paper import read_paper_files
        from sbs_edge.errors import UsageError

        found = read_paper_files(data, dataset)
        if split not in found.splits:
            raise UsageError(f"{dataset} has no split {split!r}; it has {', '.join(found.splits)}.")
        examples, rejected = found.splits[split], found.rejected[split]
        # The teacher whose outputs lie beside the rows is not the teacher asked here.
        examples = [dataclasses.replace(e, teacher_label=None, rationale=None) for e in examples[:limit]]
    else:
        result = read_examples(data, columns=ColumnMap.parse(column), limit=limit, split=split)
        examples, rejected = result.examples, result.rejected
    if rejected and not skip_bad_rows:
        refuse(rejected)
    if rejected:
        console.print(f"{len(rejected)} malformed rows left out; the first: {rejected[0]}", highlight=False)
    return examples


def _teacher(connection: _Connection, settings: Settings) -> Teacher:
    from sbs_edge.teacher.connect import connect

    return connect(settings, **dataclasses.asdict(connection))


def _outputs(paths: list[Path], settings: Settings) -> Any:
    from sbs_edge.errors import UsageError
    from sbs_edge.teacher.outputs import read_batch_outputs, read_paper_outputs

    found: list[Path] = []
    for path in paths:
        matches = sorted(path.parent.glob(path.name)) if any(c in path.name for c in "*?[") else [path]
        if not matches:
            raise UsageError(f"No file fits {path}.")
        found += matches
    kinds = {path.suffix for path in found}
    if kinds == {".json"}:
        return read_paper_outputs(found)
    if kinds == {".jsonl"}:
        return read_batch_outputs(found, settings.prices)
    raise UsageError(
        "--outputs takes .json files (arrays of strings) or .jsonl files (Batch output), not both."
    )


def _journal_records(path: Path) -> dict[str, Any]:
    from sbs_edge.teacher.journal import Journal

    if not path.exists():
        return {}
    with Journal(path) as journal:
        return journal.records


def _emit(
    rows: list[Example],
    spec: TaskFile,
    settings: Settings,
    journal_path: Path,
    path: Path,
    console: Console,
    json_output: bool,
) -> None:
    from sbs_edge.teacher.collect import unfinished
    from sbs_edge.teacher.outputs import emit_batch

    calls = unfinished(
        rows, spec, settings.model, settings.sampling, settings.samples, _journal_records(journal_path),
        retry_failed=settings.retry_failed,
    )  # fmt: skip
    paths = emit_batch(calls, settings.model, settings.sampling, path)
    if json_output:
        print_json({"files": [str(item) for item in paths]})
    console.print(
        f"Wrote {', '.join(map(str, paths))}. Read the results with the same options and --outputs FILE.",
        highlight=False,
    )


def _estimate(
    rows: list[Example],
    spec: TaskFile,
    settings: Settings,
    journal_path: Path,
    console: Console,
    json_output: bool,
) -> None:
    from sbs_edge.teacher.annotate import estimate

    found = estimate(rows, spec, settings, _journal_records(journal_path))
    if json_output:
        print_json({"rows": len(rows), **dataclasses.asdict(found)})
    console.print(
        f"{found.calls:,} calls for {len(rows):,} rows: about {found.prompt_tokens:,} prompt tokens and "
        f"{found.likely_completion_tokens:,} answer tokens (at most {found.most_completion_tokens:,}); cost "
        f"about {found.likely_cost:.4f}, at most {found.most_cost:.4f}. Tokens are estimated from characters.",
        highlight=False,
    )


def _ask(
    rows: list[Example],
    spec: TaskFile,
    settings: Settings,
    connection: _Connection,
    journal_path: Path,
    console: Console,
) -> Annotation:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from sbs_edge.teacher.annotate import Progress as Figures
    from sbs_edge.teacher.annotate import annotate

    teacher = _teacher(connection, settings)
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        shown = bar.add_task("", total=None)
        step = [0]

        def update(figures: Figures) -> None:
            speed = bar.tasks[0].speed
            text = f"{speed:.1f} rows/s  " if speed else ""
            text += f"cost {figures.cost:.4f}  usable {figures.usable / max(figures.done, 1):.1%}"
            if figures.known:
                text += f"  agrees with gold {figures.agree / figures.known:.1%}"
            bar.update(shown, completed=figures.done, total=figures.total, description=text)
            tenth = 10 * figures.done // max(figures.total, 1)
            if not console.is_terminal and tenth > step[0]:  # a log gets ten lines, not a bar
                step[0] = tenth
                console.print(f"{figures.done}/{figures.total}  {text}", highlight=False)

        return annotate(rows, spec, teacher, journal_path, settings, on_progress=update)


def _summary(report: dict[str, Any], out: Path, console: Console) -> None:
    agreement = report["agreement"]["rate"]
    console.print(
        f"{report['annotated']:,} of {report['rows']:,} rows annotated -> {out}"
        + (f"; agreement with gold {agreement:.1%}" if agreement is not None else "")
        + (f"; without: {report['reasons']}" if report["reasons"] else "")
        + f"; cost {report['calls']['cost']:.4f}. Read {out.with_suffix('.report.html')}.",
        highlight=False,
    )
