"""``sbs-edge bench kernels``: the fused loss beside its peers."""

from __future__ import annotations

from typing import Annotated

import typer

from sbs_edge.commands._common import print_json
from sbs_edge.errors import MissingExtra

__all__ = ["register"]


def register(app: typer.Typer) -> None:
    """Add ``kernels`` to the command group ``app``."""

    @app.command()
    def kernels(
        quick: Annotated[bool, typer.Option(help="A tiny shape: proves that it runs, not a speed.")] = False,
        repeats: Annotated[int, typer.Option(min=1, help="More repeats steady the median of times.")] = 3,
    ) -> None:
        """Time, extra memory and gradient error of the loss beside eager torch and torch's own, on this CPU."""
        try:
            from sbs_edge.bench.kernel_bench import measure

            shape = (64, 16, 128) if quick else (2048, 512, 32128)
            result = measure(*shape, repeats=repeats)
        except ImportError as error:
            raise MissingExtra(error.name or "torch", "train", "measuring the loss") from error
        print_json(result)
