"""``sbs-edge bench scale``: offline scoring on Ray beside a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sbs_edge.cli._bench import OutOption, finish, require
from sbs_edge.cli._common import ConfigOption, JsonOption

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add ``scale`` to the benchmark commands."""

    @app.command()
    def scale(
        ctx: typer.Context,
        bundle: Annotated[
            Path | None,
            typer.Argument(
                help="Bundle to score with. Default: a student of the built-in task after one training step.",
                show_default=False,
            ),
        ] = None,
        rows: Annotated[int, typer.Option(min=1, help="Rows to score.")] = 100_000,
        rounds: Annotated[
            int, typer.Option(min=1, help="Interleaved rounds, of which the median is taken.")
        ] = 3,
        shard_rows: Annotated[int, typer.Option(min=1, help="Approximate rows per output shard.")] = 5000,
        out: OutOption = None,
        json: JsonOption = False,
        config: ConfigOption = None,
    ) -> None:
        """Compare offline scoring on Ray with a plain loop: overhead and scaling.

        The loop, one actor and two actors score the same rows in fresh processes, in turn. Exit 1 if their
        outputs differ. The last line of stdout is a JSON document.

        Example: sbs-edge bench scale runs/demo/bundle --rows 100000 --out runs/bench/scale
        """
        require("ray", "Offline scoring on Ray", "scale")
        from sbs_edge.bench.scale.bench import measure

        document = measure(rows, bundle=bundle, rounds=rounds, shard_rows=shard_rows)
        finish(document, out, ctx, json)
        if not document["outputs_equal"]:
            raise typer.Exit(1)
