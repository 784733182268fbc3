"""``sbs-edge compare``: two bundles on the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sbs_edge import files
from sbs_edge.cli._common import ConfigOption, JsonOption, need, print_json
from sbs_edge.cli._data_options import ColumnOption, LeaveOutBadRowsOption, read_rows

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""

    @app.command()
    def compare(
        ctx: typer.Context,
        first: Annotated[Path, typer.Argument(help="The bundle in use.")],
        second: Annotated[Path, typer.Argument(help="The bundle that may replace it.")],
        data: Annotated[Path, typer.Option(help="Rows with gold labels that neither was trained on.")],
        column: ColumnOption = None,
        skip_bad_rows: LeaveOutBadRowsOption = False,
        target: Annotated[
            str | None, typer.Option(help="Target of both bundles. Default: the first of each.")
        ] = None,
        threads: Annotated[int, typer.Option(min=1, help="CPU threads per inference.")] = 1,
        report: Annotated[Path | None, typer.Option(help="Write the comparison to this HTML page.")] = None,
        config: ConfigOption = None,
        json: JsonOption = False,
    ) -> None:
        """Compare two bundles: accuracy with a paired interval, agreement, each label, latency, size.

        Example: sbs-edge compare runs/old/bundle runs/new/bundle --data test.jsonl --report compare.html
        """
        need(("onnxruntime",), "cpu", "Comparing bundles")
        from sbs_edge.pipelines.compare import compare_bundles
        from sbs_edge.report.compare import compare_page, compare_table, comparison_headline

        if report is not None:
            files.check_writable(report)
        rows = read_rows(data, column, skip_bad_rows)
        found = compare_bundles(first, second, rows, target=target, threads=threads)
        if report is not None:
            files.write_text(report, compare_page(found))
        if json:
            print_json(found)
            return
        console = Console()
        console.print(compare_table(found))
        console.print(comparison_headline(found), markup=False, highlight=False, soft_wrap=True)
        if report is not None:
            console.print(f"Page: {report}", markup=False, highlight=False, soft_wrap=True)
