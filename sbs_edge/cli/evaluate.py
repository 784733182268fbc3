"""``sbs-edge evaluate``: evaluate a student with PyTorch on rows it has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sbs_edge import files
from sbs_edge.cli._common import ConfigOption, JsonOption, print_json, save_resolved
from sbs_edge.cli._data_options import ColumnOption, LeaveOutBadRowsOption, read_rows
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
        batch_size: Annotated[int, typer.Option(min=1, help="Rows per forward pass.")] = 64,
        config: ConfigOption = None,
        json: JsonOption = False,
    ) -> None:
        """Evaluate a student with PyTorch: label accuracy, rationale token accuracy, exact rationales.

        Example: sbs-edge evaluate runs/student --data test.jsonl --json
        """
        try:
            import torch  # noqa: F401
        except ImportError as error:
            raise MissingExtra("torch", "train", "Evaluating a student") from error

        from sbs_edge.training.evaluate import evaluate as judge

        if predictions is not None:
            files.check_writable(predictions)
        rows = None if data is None else read_rows(data, column, skip_bad_rows)
        if rows is not None:
            from sbs_edge.data.labels import fit_labels
            from sbs_edge.training.student_dir import StudentDir

            rows, _ = fit_labels(rows, StudentDir.load(student).task)
        report = judge(
            student,
            rows,
            batch_size=batch_size,
            rationales=rationales,
            predictions=predictions is not None,
            progress=True,
        )
        answers = report.pop("predictions", [])
        if predictions is not None:
            lines = "".join(files.to_json(row) + "\n" for row in answers)
            files.write_text(predictions, lines)
            save_resolved(ctx, predictions.with_suffix(".config.yaml"))
        if json:
            print_json(report)
            return
        table = Table("figure", "value", title=escape(str(student)))
        for name, value in report.items():
            shown = f"{value:.4f}" if isinstance(value, float) else "unknown" if value is None else str(value)
            table.add_row(name.replace("_", " "), shown)
        Console().print(table)
