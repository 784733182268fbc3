"""``sbs-edge bench docs``: the benchmark page and its picture, from the committed results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sbs_edge.cli._bench import progress, require

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add ``docs`` to the benchmark commands."""

    @app.command()
    def docs(
        root: Annotated[
            Path, typer.Option(help="Root of the repository.", exists=True, file_okay=False)
        ] = Path(),
    ) -> None:
        """Write docs/benchmarks.md and docs/pictures/peers.svg from the files in bench/results.

        Example: sbs-edge bench docs
        """
        require("matplotlib", "The picture")
        from sbs_edge.bench.report.docs import write_docs

        for path in write_docs(root):
            progress(f"wrote {path}")
