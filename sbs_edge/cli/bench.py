"""``sbs-edge bench``: the group of benchmark commands, each in a module of its own."""

from __future__ import annotations

from importlib import import_module

import typer

__all__ = ["register"]

# In the order of the help text.
_COMMANDS = (
    "latency",
    "train",
    "kernels",
    "serving",
    "scale",
    "stream_rows",
    "long",
    "gpu",
    "compare",
    "docs",
)


def register(app: typer.Typer) -> None:
    """Add the command group to ``app``."""
    bench = typer.Typer(
        no_args_is_help=True,
        help="Measure latency, training, kernels, serving and scale, beside other systems.",
    )
    for name in _COMMANDS:
        import_module(f"sbs_edge.cli.bench_{name}").register(bench)
    app.add_typer(bench, name="bench")
