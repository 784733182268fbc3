"""``sbs-edge bench gpu``: everything that needs a GPU, within a time limit."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from sbs_edge.cli._bench import names, progress, require
from sbs_edge.cli._common import ConfigOption, JsonOption, print_json, save_resolved
from sbs_edge.errors import UsageError

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add ``gpu`` to the benchmark commands."""

    @app.command()
    def gpu(
        ctx: typer.Context,
        out: Annotated[Path, typer.Option(help="Directory for the JSON and the log of every stage.")],
        minutes: Annotated[float, typer.Option(min=0.01, help="Time for everything.")] = 8.0,
        device: Annotated[
            str, typer.Option(help="cuda, or cpu: a rehearsal on small shapes, whose times mean nothing.")
        ] = "cuda",
        stages: Annotated[
            str, typer.Option(help="Stages to run, separated by commas. Default: all.", show_default=False)
        ] = "",
        json: JsonOption = False,
        config: ConfigOption = None,
    ) -> None:
        """Run all GPU measurements in order of importance, within --minutes.

        Exit 1 if a stage did not finish or an engine's result is wrong. The last line of stdout is one JSON
        document.

        Example: sbs-edge bench gpu --out runs/gpu --minutes 8
        """
        require("torch", "The GPU session", "train")
        import torch

        from sbs_edge.bench.gpu.session import STAGES, passed, run_session, summary

        wanted = names(stages) or tuple(STAGES)
        unknown = [name for name in wanted if name not in STAGES]
        if unknown:
            raise UsageError(f"--stages takes {', '.join(STAGES)}; found {', '.join(unknown)}.")
        if device not in ("cuda", "cpu"):
            raise UsageError(f"--device takes cuda or cpu; found {device!r}.")
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError("torch finds no CUDA device here. --device cpu rehearses the session.")
        document = run_session(out, device, minutes, wanted, progress)
        with contextlib.suppress(ImportError):  # the pictures need matplotlib, the result does not
            from sbs_edge.bench.report.document import write_report

            write_report(document, out)
        save_resolved(ctx, out / "config.yaml")
        if not json:
            Console(stderr=True).print(summary(document), highlight=False, markup=False, soft_wrap=True)
        print_json(document)
        if not passed(document):
            raise typer.Exit(1)
