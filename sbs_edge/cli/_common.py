"""Parts that all commands share: the ``--config`` file, the resolved configuration, output helpers.

Precedence is flag over environment (``SBS_EDGE_<COMMAND>_<FLAG>``) over ``--config`` file over
default. The file is YAML or JSON: a mapping from flag names (dashes or underscores) to values.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from sbs_edge import files
from sbs_edge.cli._suggest import suggested
from sbs_edge.errors import MissingExtra, UsageError

__all__ = [
    "ConfigOption",
    "DryRunOption",
    "JsonOption",
    "either",
    "need",
    "print_json",
    "resolved",
    "save_resolved",
    "save_resolved_beside",
]

_NOT_CONFIGURATION = {"config", "dry_run", "json", "help"}


def _load_config(ctx: typer.Context, value: Path | None) -> Path | None:
    if value is None:
        return None
    value = value.expanduser()
    from sbs_edge.teacher.task import TextLoader, yaml_problem  # a label such as `no` stays text here too

    try:
        content = yaml.load(value.read_text(encoding="utf-8"), TextLoader)  # noqa: S506 (a safe loader)
    except OSError as error:
        raise UsageError(f"The configuration file {value} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(
            f"The configuration file {value} is not valid YAML: {yaml_problem(error)}."
        ) from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise UsageError(f"The configuration file {value} must hold a mapping of flags to values.")
    options = {item.name: item for item in ctx.command.params if item.name}
    known = set(options) - _NOT_CONFIGURATION
    defaults = {str(key).replace("-", "_"): item for key, item in content.items()}
    defaults.pop("command", None)
    for name, given in defaults.items():
        if name not in known:
            near = suggested(name, known)
            hint = (
                f"Did you mean {' or '.join(near)}?" if near else f"Its keys are: {', '.join(sorted(known))}."
            )
            raise UsageError(f"The configuration file {value} has the unknown key {name!r}. {hint}")
        several = getattr(options[name], "multiple", False) or options[name].nargs != 1
        if isinstance(given, dict) or (isinstance(given, list) and not several):
            kind = "a mapping; put JSON between quotation marks" if isinstance(given, dict) else "a list"
            raise UsageError(f"The configuration file {value}: {name} takes a single value, not {kind}.")
        if several and isinstance(given, str):
            defaults[name] = [given]
    ctx.default_map = {**(ctx.default_map or {}), **defaults}
    return value


ConfigOption = Annotated[
    Path | None,
    typer.Option(
        "--config",
        is_eager=True,
        callback=_load_config,
        help="YAML file of options; flags and environment variables win over it.",
        show_default=False,
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout; messages go to stderr.")
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Check everything and say what would be done, but change nothing.")
]


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return value


# Precedence of the sources, as in the module's docstring.
_RANK = {"COMMANDLINE": 3, "ENVIRONMENT": 2, "DEFAULT_MAP": 1}


def either(ctx: typer.Context, name: str, other: str, flags: str) -> Any:
    """Return the parameter ``name``, or its alias ``other`` if that was given; store it as ``name``.

    Args:
        ctx: context of the command; its resolved configuration then has only ``name``.
        name: the parameter.
        other: the alias; None if it was not given.
        flags: both as the user writes them, for the message.

    Raises:
        UsageError: both were given in the same way. Otherwise flag wins over environment, and environment over file.

    """
    second = ctx.params.pop(other)
    if second is None:
        return ctx.params[name]
    ranks = []
    for each in (name, other):
        source = ctx.get_parameter_source(each)
        ranks.append(_RANK.get(source.name, 0) if source else 0)
    if ranks[0] == ranks[1]:
        raise UsageError(f"{flags} are two names of the same option, and both were given. Leave one out.")
    if ranks[1] > ranks[0]:
        ctx.params[name] = second
    return ctx.params[name]


def need(packages: Iterable[str], extra: str, purpose: str) -> None:
    """Check, before any work, that the packages of an extra are installed.

    Raises:
        MissingExtra: a package is missing; the message says how to add it.

    """
    for package in packages:
        if find_spec(package) is None:
            raise MissingExtra(package, extra, purpose)


def resolved(ctx: typer.Context) -> dict[str, Any]:
    """Return the command's parameters, merged from flags, environment, file and defaults."""
    values = {
        name: _plain(value)
        for name, value in sorted(ctx.params.items())
        if name not in _NOT_CONFIGURATION and value is not None
    }
    return {"command": ctx.command_path.split(" ", 1)[-1], **values}


def save_resolved(ctx: typer.Context, path: Path) -> None:
    """Write the resolved configuration, so that ``--config`` on it repeats the command."""
    files.write_text(path, yaml.safe_dump(resolved(ctx), sort_keys=False, allow_unicode=True))


def save_resolved_beside(ctx: typer.Context, folder: str | Path) -> None:
    """Write it to ``NAME.config.yaml`` beside a directory that must have no other files; do nothing for a URI."""
    if "://" not in str(folder):
        place = Path(folder).resolve()  # "." has no name
        save_resolved(ctx, place.with_name(place.name + ".config.yaml"))


def print_json(content: Any) -> None:
    """Print ``content`` as one line of JSON on stdout."""
    sys.stdout.write(files.to_json(content) + "\n")
    sys.stdout.flush()
