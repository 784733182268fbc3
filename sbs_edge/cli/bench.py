"""``sbs-edge bench``: latency, training and kernels beside their peers, and comparing two results."""

from __future__ import annotations

import contextlib
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as RichTable

from sbs_edge import files
from sbs_edge.cli._common import ConfigOption, JsonOption, print_json, save_resolved
from sbs_edge.errors import MissingExtra, UsageError

__all__ = ["register"]

_ALL = "transformers,ctranslate2,optimum,openvino,onnxruntime-int8"
_QUICK_SOURCES = (16, 32)

OutOption = Annotated[
    Path | None,
    typer.Option(help="Keep JSON, Markdown, pictures and a page here; else only stdout has the result."),
]


def _list(text: str, flag: str, least: int = 1) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise UsageError(f"{flag} takes whole numbers separated by commas; found {text!r}.") from error
    if not found or min(found) < least:
        raise UsageError(f"{flag} needs at least one number, none below {least}; found {text!r}.")
    return found


def _words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _show(document: dict[str, Any], console: Console) -> None:
    from sbs_edge.bench.core import tables
    from sbs_edge.bench.core.registry import tables_of

    console.print(tables.headline(document), style="bold")
    if document.get("quick"):
        from sbs_edge.bench.core.report import SMOKE

        console.print(SMOKE, style="bold red")
    for table in tables_of(document):
        drawn = RichTable(title=table.title, title_justify="left", caption=table.note or None)
        for index, name in enumerate(table.columns):
            drawn.add_column(name, justify="left" if index == 0 else "right")
        for row in table.rows:
            drawn.add_row(*row)
        console.print(drawn)


def _finish(document: dict[str, Any], out: Path | None, ctx: typer.Context, json: bool) -> None:
    """Tables and files to people, the last line of stdout to programs."""
    console = Console(stderr=True)
    if not json:
        _show(document, console)
    if out is not None:
        from sbs_edge.bench.core.report import write_report

        for path in write_report(document, out):
            console.print(f"wrote {path}", highlight=False)
        save_resolved(ctx, out / "config.yaml")
    print_json(document)


def check_out(out: Path | None) -> None:
    """Raise if the results could not be kept in ``out``: before the measurement, not after it."""
    if out is not None:
        files.check_writable(out / "result.json")


def _need(package: str, purpose: str) -> None:
    if find_spec(package) is None:
        raise MissingExtra(package, "bench", purpose)


def _latency(app: typer.Typer) -> None:
    @app.command()
    def latency(
        ctx: typer.Context,
        bundles: Annotated[
            list[Path] | None, typer.Argument(help="Bundles to measure; or give --shape.", show_default=False)
        ] = None,
        student: Annotated[
            Path | None,
            typer.Option(help="The student they were exported from; looked for beside the bundle."),
        ] = None,
        shape: Annotated[
            str | None,
            typer.Option(help="Random weights of t5-small, t5-v1_1-small, flan-t5-base or tiny instead."),
        ] = None,
        against: Annotated[
            str, typer.Option(help="Peers, separated by commas; an absent one is a row that says why.")
        ] = _ALL,
        target: Annotated[
            str, typer.Option(help="Targets of each bundle, by commas; default: its default target.")
        ] = "",
        threads: Annotated[int, typer.Option(min=1, help="Compute threads of every system.")] = 1,
        cpus: Annotated[
            str, typer.Option(help="Processors to pin the systems to; default: the last ones allowed.")
        ] = "",
        rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds at most.")] = 10,
        minutes: Annotated[
            float, typer.Option(min=0.01, help="Time for all timed parts; at least 3 rounds are run.")
        ] = 4.0,
        sources: Annotated[str, typer.Option(help="Source lengths in tokens.")] = "16,64,256",
        batches: Annotated[str, typer.Option(help="Batch sizes of the label task.")] = "1,8",
        rationale_batches: Annotated[str, typer.Option(help="Batch sizes of the rationale task.")] = "1",
        rows: Annotated[int, typer.Option(min=8, help="Validation rows behind the accuracy.")] = 96,
        seed: Annotated[int, typer.Option(min=0, help="Of inputs, arrivals and random weights.")] = 0,
        quick: Annotated[
            bool, typer.Option("--quick", help="A smoke run: two rounds, short inputs; figures mean nothing.")
        ] = False,
        prepare_only: Annotated[
            bool, typer.Option("--prepare-only", help="Convert, load and check the answers; time nothing.")
        ] = False,
        out: OutOption = None,
        json: JsonOption = False,
        config: ConfigOption = None,
    ) -> None:
        """Measure bundles and peers on the same weights, inputs, threads and minutes.

        Label and rationale latency, throughput, latency under load, cold start, memory, disk and
        installed size; accuracy stands beside every speed. The last line of stdout is one JSON document.

        Example: sbs-edge bench latency runs/demo/bundle --out runs/bench
        """
        _need("tokenizers", "The latency bench")
        from sbs_edge.bench.latency.bench import LatencyOptions, measure_latency
        from sbs_edge.bench.latency.sections import Schedule

        schedule = Schedule(
            rounds=rounds,
            least_rounds=min(3, rounds),
            seconds=60 * minutes,
            sources=_list(sources, "--sources"),
            batches=_list(batches, "--batches"),
            rationale_batches=_list(rationale_batches, "--rationale-batches"),
        )
        if quick:
            schedule = Schedule(
                rounds=2, least_rounds=2, seconds=5, call_seconds=0.01, sources=_QUICK_SOURCES,
                batches=(1, 8), rationale_steps=8, stream=16, load_seconds=0.3, cold_rounds=1,
            )  # fmt: skip
            rows = min(rows, 24)
        options = LatencyOptions(
            bundles=tuple(bundles or ()),
            student=student,
            shape=shape,
            against=_words(against),
            targets=_words(target),
            threads=threads,
            cpus=_list(cpus, "--cpus", least=0) if cpus else (),
            rows=rows,
            seed=seed,
            prepare_only=prepare_only,
            schedule=schedule,
        )
        console = Console(stderr=True)
        check_out(out)
        document = measure_latency(options, lambda text: console.print(text, highlight=False, style="dim"))
        document["quick"] = quick
        _finish(document, out, ctx, json)


def _train(app: typer.Typer) -> None:
    @app.command()
    def train(
        ctx: typer.Context,
        data: Annotated[str, typer.Argument(help="A file, a directory, or 'builtin'.")] = "builtin",
        dataset: Annotated[
            str | None, typer.Option(help="Read DATA in the paper's layout: cqa, svamp, anli1 or esnli.")
        ] = None,
        shape: Annotated[
            str, typer.Option(help="Size of the student: t5-small, t5-v1_1-small, flan-t5-base or tiny.")
        ] = "t5-small",
        batch_size: Annotated[int, typer.Option(min=1, help="Examples a step; each gives two rows.")] = 8,
        examples: Annotated[int, typer.Option(min=2, help="Examples of the epoch.")] = 64,
        steps: Annotated[int, typer.Option(min=2, help="Optimiser steps of the loss curves.")] = 8,
        rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds of single steps.")] = 6,
        device: Annotated[str, typer.Option(help="cpu, cuda, or all: every device present.")] = "all",
        precision: Annotated[str, typer.Option(help="fp32, bf16 (autocast), by commas.")] = "fp32",
        threads: Annotated[int, typer.Option(min=1, help="Compute threads of every step.")] = 1,
        seed: Annotated[int, typer.Option(min=0, help="Of weights and of the order of the data.")] = 0,
        out: OutOption = None,
        json: JsonOption = False,
        config: ConfigOption = None,
    ) -> None:
        """Measure one optimiser step and one epoch against the two-forward step with full logits.

        Time, tokens a second, peak memory in a fresh process, padding, and the loss on the same seed
        and data, which must agree. The last line of stdout is one JSON document.

        Example: sbs-edge bench train --shape t5-small --out runs/bench-train
        """
        _need("torch", "The training bench")
        _need("transformers", "The training bench")
        from sbs_edge.bench.training.bench import TrainBenchOptions, measure_train

        options = TrainBenchOptions(
            data=data,
            dataset=dataset,
            shape=shape,
            batch_size=batch_size,
            examples=examples,
            steps=steps,
            rounds=rounds,
            device=device,
            precisions=_words(precision),
            threads=threads,
            seed=seed,
        )
        console = Console(stderr=True)
        check_out(out)
        document = measure_train(options, lambda text: console.print(text, highlight=False, style="dim"))
        _finish(document, out, ctx, json)


def _compare(app: typer.Typer) -> None:
    @app.command()
    def compare(
        first: Annotated[Path, typer.Argument(help="The older result (result.json of --out).")],
        second: Annotated[Path, typer.Argument(help="The newer result.")],
        tolerance: Annotated[
            float, typer.Option(min=0, help="Share a figure may grow before the exit code is 1.")
        ] = 0.15,
        system: Annotated[
            str, typer.Option(help="Judge systems whose name starts with this; '' judges the peers too.")
        ] = "sbs-edge",
        json: JsonOption = False,
    ) -> None:
        """Say what became slower or larger from FIRST to SECOND, with the noise bound; exit 1 if any did.

        Example: sbs-edge bench compare bench/results/old.json runs/bench/result.json --tolerance 0.1
        """
        from sbs_edge.bench.core.compare import compare as changes_of
        from sbs_edge.bench.core.compare import conditions
        from sbs_edge.bench.core.results import load_document

        old, new = load_document(first), load_document(second)
        changes = changes_of(old, new, tolerance, system or None)
        notes = conditions(old, new)
        worse = [change for change in changes if change.verdict == "worse"]
        console = Console(stderr=True)
        for note in notes:
            console.print(f"differs: {note}", highlight=False, markup=False)
        if json:
            print_json(
                {"worse": len(worse), "conditions": notes, "changes": [item.as_dict() for item in changes]}
            )
        else:
            drawn = RichTable(title=f"{len(worse)} of {len(changes)} figures became worse")
            for name in ("figure", "system", "before", "after", "change", "95 % interval", "verdict"):
                drawn.add_column(name)
            order = {"worse": 0, "better": 1, "within noise": 2, "within tolerance": 3}
            for item in sorted(changes, key=lambda change: (order[change.verdict], -change.change)):
                figure = " ".join(part for part in (item.section, item.variant, item.case) if part)
                drawn.add_row(
                    figure, item.system, f"{item.before:.4g} {item.unit}", f"{item.after:.4g} {item.unit}",
                    f"{item.change:.2f}x", f"{item.low:.2f} to {item.high:.2f}", item.verdict,
                )  # fmt: skip
            Console().print(drawn)
        if worse:
            raise typer.Exit(1)


def register(app: typer.Typer) -> None:
    """Add the command group to ``app``."""
    bench = typer.Typer(no_args_is_help=True, help="Measure against the peers, in the same run.")
    _latency(bench)
    _train(bench)
    _compare(bench)
    with contextlib.suppress(ModuleNotFoundError):
        import_module("sbs_edge.cli.bench_kernels").register(bench, _finish)
    app.add_typer(bench, name="bench")
