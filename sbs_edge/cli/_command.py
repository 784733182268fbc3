"""What every command does around its own work: refuse numbers that are none, and say what Ctrl-C left behind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape
from typer.core import TyperCommand

from sbs_edge.errors import SbsEdgeError, UsageError

__all__ = ["Command", "Interrupted", "install"]

# By command: what an interrupted run keeps and how to go on; {fields} are the command's parameters.
_KEPT = {
    "run": "Students that were finished are under {out}/students, the others' checkpoints beside them; an old "
    "bundle is unchanged. The same command starts anew.",
    "train": "Checkpoints, if it came to one, are in {out}.training; go on with the same command and --resume.",
    "annotate": "Finished calls are in the journal. The same command goes on and asks only what is missing.",
    "export": "{out} is as it was before. The same command starts anew.",
    "predict": "Finished shards of --engine ray stay, and the same command goes on with the others; a file is "
    "written whole or not at all.",
}
_NOTHING = "Nothing half-written was kept under its final name. The same command starts anew."


class Interrupted(SbsEdgeError):
    """Ctrl-C; the message says what was kept."""

    exit_code = 130


class Command(TyperCommand):
    """A command of this program; every one is of this class (:func:`install`)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Make the command; its help is plain text, where ``[label]`` is not a tag of rich's."""
        super().__init__(*args, **kwargs)
        items: list[Any] = [self, *self.params]
        for item in items:
            if text := getattr(item, "help", None):
                item.help = escape(text)

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            UsageError: a float option is NaN or infinite, which no range check refuses.
            Interrupted: instead of ``KeyboardInterrupt``, which typer turns into a silent exit code.

        """
        for name, value in ctx.params.items():
            ctx.params[name] = value = _expanded(value)
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"--{name.replace('_', '-')} must be a finite number, not {value}.")
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            kept = _KEPT.get(self.name or "", _NOTHING) if ctx.parent.parent is None else _NOTHING
            raise Interrupted(kept.format(**ctx.params)) from stop


def _expanded(value: Any) -> Any:
    """Return a value with ``~/`` expanded, which the shell leaves alone in ``--out=~/x`` and in files of flags."""
    if isinstance(value, list | tuple):
        return type(value)(map(_expanded, value))
    if isinstance(value, Path):
        return value.expanduser()
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value


def install(group: typer.Typer) -> None:
    """Make every command of ``group`` and its subgroups a :class:`Command`."""
    for command in group.registered_commands:
        command.cls = Command
    for inner in group.registered_groups:
        if inner.typer_instance is not None:
            install(inner.typer_instance)
