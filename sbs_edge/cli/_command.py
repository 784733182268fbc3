"""The classes of all commands: help pages, near misses, NaN and infinity, and what Ctrl-C leaves behind."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from sbs_edge.cli._help import show_help
from sbs_edge.cli._suggest import suggested
from sbs_edge.disk import lacks_space
from sbs_edge.errors import SbsEdgeError, UsageError

__all__ = ["Command", "Group", "Interrupted", "install"]

# By command: what an interrupted run keeps and how to go on; {fields} are the command's parameters.
_KEPT = {
    "run": "Students that were finished are under {out}/students, the others' checkpoints beside them; an old "
    "bundle is unchanged. The same command starts again.",
    "study": "Finished runs and checkpoints of the others are in {work}. The same command goes on with them.",
    "train": "Checkpoints, if it came to one, are in {out}.training; go on with the same command and --resume.",
    "annotate": "Finished calls are in the journal. The same command goes on and asks only what is missing.",
    "export": "{out} is as it was before. The same command starts again.",
    "predict": "Finished shards of --engine ray stay, and the same command goes on with the others; a file is "
    "written whole or not at all.",
}
_NOTHING = "Nothing half-written was kept under its final name. The same command starts again."


class Interrupted(SbsEdgeError):
    """Ctrl-C; the message says what was kept."""

    exit_code = 130


class Command(TyperCommand):
    """A command of this program; :func:`install` makes every command one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Write the names of arguments in capitals, as the texts do."""
        super().__init__(*args, **kwargs)
        for item in self.params:
            if item.param_type_name == "argument" and item.metavar is None and item.name:
                item.metavar = item.name.upper() + ("..." if item.nargs != 1 else "")

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help page."""
        show_help(self, ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; an unknown option is answered with the options it may stand for."""
        try:
            return list(super().parse_args(ctx, args))
        except Exception as error:
            _name_near_options(self, ctx, error)
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            UsageError: a float option is NaN or infinite, which no range check refuses.
            SbsEdgeError: the disk is full.
            Interrupted: instead of ``KeyboardInterrupt``, which typer turns into a silent exit code.

        """
        for name, value in ctx.params.items():
            ctx.params[name] = value = _expanded(value)
            if isinstance(value, float) and not math.isfinite(value):
                raise UsageError(f"--{name.replace('_', '-')} must be a finite number, not {value}.")
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise Interrupted(self._kept(ctx)) from stop
        except Exception as error:
            if not lacks_space(error):
                raise
            where = getattr(error, "filename", None)
            raise SbsEdgeError(
                f"The disk is full{f' (while writing {where})' if where else ''}: no space left on the device, a quota, "
                f"or a limit on the size of a file. Make room. {self._kept(ctx)}"
            ) from error

    def _kept(self, ctx: Any) -> str:
        kept = _KEPT.get(self.name or "", _NOTHING) if ctx.parent.parent is None else _NOTHING
        return kept.format(**ctx.params)


class Group(TyperGroup):
    """The program itself, or a group of its commands such as ``data``."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help page."""
        show_help(self, ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments in front of the command's name."""
        try:
            return list(super().parse_args(ctx, args))
        except Exception as error:
            _name_near_options(self, ctx, error)
            raise

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command; an unknown one is answered with the commands it may stand for."""
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            inner = {
                f"{name} {each}": each
                for name, group in self.commands.items()
                for each in getattr(group, "commands", ())
            }
            near = suggested(args[0], self.commands) or [
                path for path, each in inner.items() if each == args[0]
            ]
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            ctx.fail(f"No such command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)


def _name_near_options(command: Any, ctx: Any, error: Exception) -> None:
    """Complete the message of an unknown option in place; other errors stay as they are."""
    given = getattr(error, "option_name", None)
    if given is None or not hasattr(error, "possibilities"):
        return
    known = [
        name
        for parameter in command.get_params(ctx)
        if not getattr(parameter, "hidden", False)
        for name in (*parameter.opts, *parameter.secondary_opts)
        if name.startswith("--")
    ]
    near = suggested(given, known)
    where = f" Did you mean {' or '.join(near)}?" if near else ""
    vars(error).update(possibilities=None, message=f"No such option: {given}.{where}")


def _expanded(value: Any) -> Any:
    """Return a value with ``~/`` expanded, which the shell leaves alone in ``--out=~/x`` and in files of flags."""
    if isinstance(value, list | tuple):
        return type(value)(map(_expanded, value))
    if isinstance(value, Path):
        return value.expanduser()
    return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~/") else value


def install(group: typer.Typer) -> None:
    """Make every command of ``group`` and its subgroups a :class:`Command`, and the groups a :class:`Group`."""
    group.info.cls = Group
    for command in group.registered_commands:
        command.cls = Command
    for inner in group.registered_groups:
        if inner.typer_instance is not None:
            install(inner.typer_instance)
            inner.cls = Group
