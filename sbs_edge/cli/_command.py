"""The classes of all commands: help pages, suggestions, checks of numbers, and the message after Ctrl-C."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from sbs_edge.cli._help import show_help
from sbs_edge.cli._suggest import suggested
from sbs_edge.disk import lacks_space
from sbs_edge.errors import SbsEdgeError, UsageError

__all__ = ["Command", "Group", "Interrupted", "install"]

# By command: what an interrupted run keeps and how to continue; {fields} are the command's parameters.
_KEPT = {
    "run": "Finished students are under {out}/students, with the checkpoints of the others beside them. An old "
    "bundle is unchanged. The same command starts again.",
    "study": "Finished runs and checkpoints of the others are in {work}. The same command continues with them.",
    "train": "Checkpoints, if there are any, are in {out}.training; continue with the same command and --resume.",
    "annotate": "Finished calls are in the journal. The same command continues and asks only what is missing.",
    "export": "{out} is unchanged. The same command starts again.",
    "predict": "With --engine ray finished shards stay, and the same command makes the others. A file is "
    "written whole or not at all.",
}
# The order in which a project uses the commands, for the help page; commands of groups keep their own.
_ORDER = (
    "run",
    "study",
    "data",
    "task",
    "annotate",
    "train",
    "evaluate",
    "compare-teacher",
    "compare",
    "export",
    "predict",
    "serve",
    "bench",
)
_NOTHING = "No incomplete file was left under its final name. The same command starts again."


class Interrupted(SbsEdgeError):
    """Ctrl-C; the message says what was kept."""

    exit_code = 130


class _Answering:
    """The help page and the words about an unknown option, the same for commands and groups."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help page."""
        show_help(self, ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments; for an unknown option, suggest similar ones."""
        try:
            return list(super().parse_args(ctx, args))  # type: ignore[misc]  # of the class beside this one
        except Exception as error:
            _name_near_options(self, ctx, error)
            raise


class Command(_Answering, TyperCommand):
    """A command of this program; :func:`install` makes every command one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Write the names of arguments in capitals, as the texts do."""
        super().__init__(*args, **kwargs)
        for item in self.params:
            if item.param_type_name == "argument" and item.metavar is None and item.name:
                item.metavar = item.name.upper() + ("..." if item.nargs != 1 else "")

    def invoke(self, ctx: Any) -> Any:
        """Run the command.

        Raises:
            UsageError: a float option is NaN or infinite, which range checks accept.
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
        except SbsEdgeError as error:
            error.args = (_with_options(str(error), self.params), *error.args[1:])
            raise
        except Exception as error:
            if not lacks_space(error):
                raise
            where = getattr(error, "filename", None)
            raise SbsEdgeError(
                f"The disk is full{f' (while writing {where})' if where else ''}: no space is left on the "
                "device, or a quota "
                f"or a limit on the size of a file was reached. Free some space. {self._kept(ctx)}"
            ) from error

    def _kept(self, ctx: Any) -> str:
        kept = _KEPT.get(self.name or "", _NOTHING) if ctx.parent.parent is None else _NOTHING
        return kept.format(**ctx.params)


class Group(_Answering, TyperGroup):
    """The program itself, or a group of its commands such as ``data``."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands in the order of a project: data before training before serving."""
        names = list(super().list_commands(ctx))
        order = {name: place for place, name in enumerate(_ORDER)} if ctx.parent is None else {}
        return sorted(names, key=lambda name: order.get(name, len(order)))

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command; for an unknown one, suggest similar ones."""
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
    """Add suggestions to the message of an unknown option, in place; other errors are not changed."""
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


_VALUE = r"=(?P<value>True|\[[^][]*\]|'[^']*'|[\w./-]*\w)"


def _with_options(message: str, parameters: Iterable[Any]) -> str:
    """Write the parameters that a message of the library names as options: ``max_steps`` as ``--max-steps``.

    A name of one word is an option only with a value, since it may be an ordinary word: ``mode='distill'`` becomes
    ``--mode distill``. Names inside paths and quotes stay.
    """
    options = {item.name: max(item.opts, key=len) for item in parameters if item.param_type_name == "option"}
    names = "|".join(sorted(map(re.escape, options), key=len, reverse=True))
    if not names:
        return message

    def option(found: re.Match[str]) -> str:
        flag, value = str(options[found["name"]]), found["value"]
        if value is None:
            return flag if "_" in found["name"] else str(found[0])
        if value == "True":
            return flag
        each = re.findall(r"'([^']*)'", value) if value.startswith("[") else [value.strip("'")]
        return " ".join(f"{flag} {shlex.quote(item)}" for item in each)

    return re.sub(rf"(?<![\w./'\"-])(?P<name>{names})(?:{_VALUE})?(?![\w/'\"-]|\.\w)", option, message)


def _expanded(value: Any) -> Any:
    """Return a value with ``~/`` expanded, which the shell does not do in ``--out=~/x`` and configuration files."""
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
