"""``sbs-edge compare-teacher``: what the teacher's answers bought."""

from __future__ import annotations

from json import loads
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sbs_edge.cli._common import ConfigOption, JsonOption, print_json, save_resolved
from sbs_edge.cli._data_options import LeaveOutBadRowsOption, read_rows

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""

    @app.command(name="compare-teacher")
    def compare_teacher(
        ctx: typer.Context,
        annotated: Annotated[Path, typer.Argument(help="Training rows that 'annotate' wrote.")],
        test: Annotated[
            Path,
            typer.Option(
                help="Test rows with gold labels. If they are annotated too, the teacher is evaluated as well."
            ),
        ],
        task: Annotated[str, typer.Option(help="Task file or preset.")],
        out: Annotated[Path, typer.Option(help="Directory of the students, bundles and report.")] = Path(
            "runs/compare-teacher"
        ),
        gold: Annotated[
            Path | None,
            typer.Option(
                help="Gold labels of the training rows, by id, for the student that learns gold labels."
            ),
        ] = None,
        skip_bad_rows: LeaveOutBadRowsOption = False,
        validation_share: Annotated[
            float,
            typer.Option(
                min=0.01, max=0.5, help="Share of the annotated rows that is held out for model selection."
            ),
        ] = 0.15,
        steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of each student.")] = 600,
        rationale_weight: Annotated[float, typer.Option(min=0, help="lambda of the rationale loss.")] = 3.0,
        row_weight: Annotated[
            str,
            typer.Option(help="none, or confidence: weight each row by the teacher's agreement with itself."),
        ] = "none",
        target: Annotated[str, typer.Option(help="Export target of both students.")] = "cpu-int8",
        core_hour_price: Annotated[
            float, typer.Option(min=0, help="Price of a CPU core for an hour, in the teacher's currency.")
        ] = 0.0,
        teacher_parameters: Annotated[
            int | None, typer.Option(min=1, help="The teacher's number of parameters, if known.")
        ] = None,
        seed: Annotated[
            int, typer.Option(min=0, help="Seed of initial weights, row order and the split.")
        ] = 0,
        config: ConfigOption = None,
        json: JsonOption = False,
    ) -> None:
        """Compare the teacher with a student trained on its labels and a student trained on gold labels.

        Example: sbs-edge compare-teacher annotated.jsonl --test test.jsonl --task task.yaml --gold gold.jsonl
        """
        import dataclasses

        from rich.table import Table

        from sbs_edge import files
        from sbs_edge.data.labels import fit_labels
        from sbs_edge.data.splits import hold_out
        from sbs_edge.pipelines.compare_teacher import COLUMNS, compare_with_teacher, comparison_page
        from sbs_edge.teacher.presets import load_task

        spec = load_task(task).spec
        rows = read_rows(annotated, None, skip_bad_rows)
        if gold is not None:
            labels = {row.id: row.label for row in read_rows(gold, None, skip_bad_rows)}
            rows = [dataclasses.replace(row, label=labels.get(row.id, row.label)) for row in rows]
        rows, _ = fit_labels(rows, spec)
        train_rows, validation_rows = hold_out(
            rows, validation_share, seed, stratify=spec.label_kind == "closed"
        )
        report_path = annotated.with_suffix(".report.json")
        annotation = loads(report_path.read_text(encoding="utf-8")) if report_path.is_file() else None
        console = Console(stderr=True)
        out.mkdir(parents=True, exist_ok=True)
        save_resolved(ctx, out / "config.yaml")
        report = compare_with_teacher(
            spec, train_rows, validation_rows, fit_labels(read_rows(test, None, skip_bad_rows), spec)[0], out,
            annotation=annotation, teacher_parameters=teacher_parameters, steps=steps, target=target,
            core_hour_price=core_hour_price,
            training={"rationale_weight": rationale_weight, "row_weight": row_weight, "seed": seed},
            say=lambda line: console.print(line, style="dim", markup=False),
        )  # fmt: skip
        files.write_json(out / "report.json", report)
        files.write_text(out / "report.html", comparison_page(report))
        if json:
            print_json(report)
            return
        table = Table(*COLUMNS)
        for arm in report["arms"]:
            table.add_row(
                *(
                    "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
                    for value in list(arm.values())[: len(COLUMNS)]
                )
            )
        Console().print(table)
