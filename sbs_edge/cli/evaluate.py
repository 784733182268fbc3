"""``sbs-edge evaluate``: evaluate a student with PyTorch on rows it has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sbs_edge import files
from sbs_edge.cli._common import ConfigOption, JsonOption, need, print_json, save_resolved
from sbs_edge.cli._data_options import ColumnOption, LeaveOutBadRowsOption, SliceOption, read_rows
from sbs_edge.errors import MissingExtra

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""

    @app.command()
    def evaluate(
        ctx: typer.Context,
        student: Annotated[Path, typer.Argument(help="The student directory that training wrote.")],
        data: Annotated[
            Path | None, typer.Option(help="Rows to evaluate on. Default: the student's own validation rows.")
        ] = None,
        column: ColumnOption = None,
        skip_bad_rows: LeaveOutBadRowsOption = False,
        rationales: Annotated[
            int | None,
            typer.Option(min=0, help="Decode at most this many rationales; 0 decodes none. Default: all."),
        ] = None,
        predictions: Annotated[
            Path | None, typer.Option(help="Write every answer to this JSON Lines file.")
        ] = None,
        report: Annotated[
            Path | None, typer.Option(help="Write the error analysis to this HTML page.")
        ] = None,
        slice: SliceOption = None,
        batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 64,
        config: ConfigOption = None,
        json: JsonOption = False,
    ) -> None:
        """Evaluate a student with PyTorch: accuracy, and errors by label, confidence, length and column.

        Examples: sbs-edge evaluate runs/student --data test.jsonl --report errors.html;
        sbs-edge evaluate runs/student --data test.jsonl --slice customer --json
        """
        try:
            import torch  # noqa: F401
        except ImportError as error:
            raise MissingExtra("torch", "train", "Evaluating a student") from error

        from sbs_edge.report.analysis import analysis_lines, evaluation_page
        from sbs_edge.training.evaluate import evaluate as judge

        for path in (predictions, report):
            if path is not None:
                files.check_writable(path)
        if report is not None:
            need(("matplotlib",), "train", "The page of an evaluation")
        rows = None if data is None else read_rows(data, column, skip_bad_rows)
        if rows is not None:
            from sbs_edge.data.labels import fit_labels
            from sbs_edge.training.student_dir import StudentDir

            rows, _ = fit_labels(rows, StudentDir.load(student).task)
        found = judge(
            student,
            rows,
            batch_size=batch_size,
            rationales=rationales,
            predictions=predictions is not None,
            analysis=True,
            slices=slice or (),
            progress=True,
        )
        answers = found.pop("predictions", [])
        if predictions is not None:
            lines = "".join(files.to_json(row) + "\n" for row in answers)
            files.write_text(predictions, lines)
            save_resolved(ctx, predictions.with_suffix(".config.yaml"))
        if report is not None:
            files.write_text(report, evaluation_page(found, student.name, data.name if data else None))
        if json:
            print_json(found)
            return
        analysis = found.pop("analysis")
        table = Table("figure", "value", title=escape(str(student)))
        for name, value in found.items():
            shown = f"{value:.4f}" if isinstance(value, float) else "unknown" if value is None else str(value)
            table.add_row(name.replace("_", " "), shown)
        console = Console()
        console.print(table)
        for line in analysis_lines(analysis) if analysis else ():
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        if report is not None:
            console.print(f"Page: {report}", markup=False, highlight=False, soft_wrap=True)
