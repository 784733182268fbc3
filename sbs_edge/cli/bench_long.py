"""``sbs-edge bench long``: ways to read long inputs at several lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sbs_edge.cli._bench import OutOption, finish, int_list, names, progress, require
from sbs_edge.cli._common import ConfigOption, JsonOption

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add ``long`` to the benchmark commands."""

    @app.command()
    def long(
        ctx: typer.Context,
        bundle: Annotated[Path, typer.Argument(help="A bundle that was exported with --long.")],
        lengths: Annotated[str, typer.Option(help="Lengths in words, numbers and signs.")] = "512,2048,8192",
        rows: Annotated[int, typer.Option(min=1, help="Logs behind each accuracy.")] = 50,
        calls: Annotated[int, typer.Option(min=1, help="Timed calls of each measurement.")] = 3,
        top_k: Annotated[int, typer.Option(min=1, help="States each head reads in the way top-k.")] = 64,
        target: Annotated[str | None, typer.Option(help="Target of the bundle. Default: its first.")] = None,
        against: Annotated[
            str, typer.Option(help="Models of the same size with random weights: led, longt5; '' for none.")
        ] = "led,longt5",
        threads: Annotated[int, typer.Option(min=1, help="Compute threads.")] = 1,
        seed: Annotated[int, typer.Option(min=0, help="Seed of the logs.")] = 0,
        out: OutOption = None,
        json: JsonOption = False,
        config: ConfigOption = None,
    ) -> None:
        """Measure accuracy, time and peak memory against length: truncation, voting, chunks, full attention.

        Each measurement runs in a fresh process; one that fails is listed with its reason, and if all fail the command
        exits with 1. Accuracy is that on the logs of the task shift-log. The last line of stdout is one JSON document.

        Example: sbs-edge bench long runs/latest/bundle --lengths 512,8192 --out runs/bench/long
        """
        if against:
            require("torch", "Running LED and LongT5", "train")
        from sbs_edge.bench.long.bench import measure_lengths

        document = measure_lengths(
            bundle, int_list(lengths, "--lengths", 48), rows=rows, calls=calls, top_k=top_k, target=target,
            peers=names(against), threads=threads, seed=seed, say=progress,
        )  # fmt: skip
        finish(document, out, ctx, json)
        if all(record["ms"] is None for record in document["records"]):
            raise typer.Exit(1)
