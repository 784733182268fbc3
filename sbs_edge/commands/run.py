"""``sbs-edge run``: from examples to a bundle and a report, in one command."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from sbs_edge import files
from sbs_edge.commands._common import (
    ConfigOption,
    DryRunOption,
    JsonOption,
    print_json,
    resolved,
    save_resolved,
)

if TYPE_CHECKING:
    from sbs_edge.data.example import Splits

__all__ = ["register"]


class Mode(StrEnum):
    """Where labels and rationales come from."""

    finetune = "finetune"
    distill = "distill"
    stepwise = "stepwise"
    stepwise_teacher = "stepwise-teacher"


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""

    @app.command()
    def run(
        ctx: typer.Context,
        data: Annotated[
            str, typer.Argument(help="A file, a directory, a data set name, or 'builtin'.")
        ] = "builtin",
        out: Annotated[
            Path,
            typer.Option(help="Where students, bundle and report go; an old bundle is replaced at the end."),
        ] = Path("runs/latest"),
        dataset: Annotated[
            str | None, typer.Option(help="Read DATA in the paper's layout: cqa, svamp, anli1 or esnli.")
        ] = None,
        mode: Annotated[
            Mode, typer.Option(help="Gold or teacher's labels, with or without rationales.")
        ] = Mode.stepwise,
        steps: Annotated[int, typer.Option(help="Optimiser steps of every compared student.")] = 600,
        rationale_weight: Annotated[
            float, typer.Option(help="lambda in L_label + lambda * L_rationale.")
        ] = 3.0,
        model: Annotated[
            str | None,
            typer.Option(
                help="T5-family checkpoint, by hub name or directory; none: a tiny one from scratch."
            ),
        ] = None,
        controls: Annotated[
            bool,
            typer.Option(
                "--controls", help="Also train on shuffled rationales, and label-only for twice the steps."
            ),
        ] = False,
        teacher_error: Annotated[
            float, typer.Option(help="Share of wrong answers of the built-in teacher; PaLM's was about 0.25.")
        ] = 0.0,
        train_rows: Annotated[int | None, typer.Option(help="Use at most this many training rows.")] = None,
        target: Annotated[list[str] | None, typer.Option(help="Export target; several may be given.")] = None,
        max_drop: Annotated[
            float,
            typer.Option(help="Points of accuracy a lossy target may cost before the guard stops (exit 3)."),
        ] = 1.0,
        skip_bad_rows: Annotated[
            bool,
            typer.Option(
                "--skip-bad-rows", help="Go on without malformed rows and list them in skipped.jsonl."
            ),
        ] = False,
        seed: Annotated[int, typer.Option(help="Seed of data, initial weights and row order.")] = 0,
        config: ConfigOption = None,
        json_output: JsonOption = False,
        dry_run: DryRunOption = False,
    ) -> None:
        """Train with rationales, compare with label-only, export, predict, and write a report.

        Examples: sbs-edge run; sbs-edge run --controls; sbs-edge run DIR --dataset svamp --steps 2000
        """
        from sbs_edge.pipeline import RunConfig, arms_for
        from sbs_edge.pipeline import run as run_pipeline

        console = Console(stderr=True)
        settings = RunConfig(
            mode=mode.value,
            steps=steps,
            controls=controls,
            targets=tuple(target or ("cpu-fp32", "cpu-int8")),
            seed=seed,
            max_drop=max_drop,
            training={"rationale_weight": rationale_weight, **({"model": model} if model else {})},
        )
        splits = _load(data, dataset, out, skip_bad_rows, seed, teacher_error, train_rows)
        if dry_run:
            plan = {
                **resolved(ctx),
                "rows": {n: len(getattr(splits, n)) for n in ("train", "validation", "test")},
                "students": [f"{arm.name}: mode {arm.mode}, {arm.steps} steps" for arm in arms_for(settings)],
            }
            print_json(plan) if json_output else console.print(plan)
            return
        out.mkdir(parents=True, exist_ok=True)
        save_resolved(ctx, out / "config.yaml")
        report = run_pipeline(splits, out, settings, say=lambda line: console.print(f"[dim]{line}[/]"))

        from sbs_edge.report.run import run_page, run_table

        files.write_json(out / "report.json", report)
        files.write_text(out / "report.html", run_page(report))
        if json_output:
            print_json(report)
        else:
            Console().print(run_table(report))
        console.print(
            f"Bundle: {report['bundle']['path']}   report: {out / 'report.html'}   {report['seconds']:.0f} s"
        )


def _load(
    data: str,
    dataset: str | None,
    out: Path,
    skip_bad_rows: bool,
    seed: int,
    teacher_error: float,
    train_rows: int | None,
) -> Splits:
    import dataclasses

    from sbs_edge.data.builtin import builtin_splits
    from sbs_edge.data.load import load_splits

    if data == "builtin":
        splits = builtin_splits(
            seed=seed, teacher_error=teacher_error, **({"n_train": train_rows} if train_rows else {})
        )
    else:
        splits = load_splits(
            data, dataset=dataset, skip_bad_rows=skip_bad_rows, seed=seed, skipped_file=out / "skipped.jsonl"
        )
        if train_rows:
            splits = dataclasses.replace(splits, train=splits.train[:train_rows])
    return splits
