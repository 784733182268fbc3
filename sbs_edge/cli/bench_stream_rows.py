"""``sbs-edge bench stream-rows``: memory of streamed training."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from sbs_edge.cli._bench import OutOption, finish, require
from sbs_edge.cli._common import ConfigOption, JsonOption

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add ``stream-rows`` to the benchmark commands."""

    @app.command("stream-rows")
    def stream_rows(
        ctx: typer.Context,
        rows: Annotated[int, typer.Option(min=1, help="Generated rows to train on.")] = 1_000_000,
        max_rss_mb: Annotated[
            float, typer.Option(min=1, help="Resident memory in MiB above which the exit code is 1.")
        ] = 1500.0,
        out: OutOption = None,
        json: JsonOption = False,
        config: ConfigOption = None,
    ) -> None:
        """Train on a stream of generated rows and sample the memory.

        The last line of stdout is a JSON document.

        Example: sbs-edge bench stream-rows --rows 1000000 --out runs/bench/stream-rows
        """
        require("torch", "The streaming bench", "train")
        from sbs_edge.bench.training.stream_rows import measure

        with tempfile.TemporaryDirectory() as folder:
            document = measure(rows, Path(folder) / "student", max_rss_mb=max_rss_mb)
        finish(document, out, ctx, json)
        if document["peak_rss_mb"] > max_rss_mb:
            raise typer.Exit(1)
