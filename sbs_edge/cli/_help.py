"""The help page of a command: its options in panels, each with its value, default and bounds."""

from __future__ import annotations

import textwrap
import typing
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

from rich.console import Console
from rich.panel import Panel
from rich.text import Text

__all__ = ["show_help"]

_MOST_WIDTH = 100
_LEFT = 28  # columns of an option's name and value

_DATA = {"dataset": "Data"}
_COMMON = {"config", "dry_run", "help", "json"}
# By command: the option that starts a panel, in the order of declaration.
_PANELS: dict[str, dict[str, str]] = {
    "run": {"mode": "Students", "target": "Export", "skip_bad_rows": "Data", "seed": "Students"},
    "study": {
        "method": "Grid",
        "within": "Choice",
        "target": "Export",
        "engine": "Execution",
    },
    "train": {
        "mode": "Objective",
        "model": "Student",
        "learning_rate": "Optimisation",
        "eval_steps": "Evaluation and checkpoints",
        "bf16": "Execution",
    },
    "annotate": {
        "backend": "Teacher",
        "dataset": "Data",
        "samples": "Sampling",
        "concurrency": "Calls and budget",
        "journal": "Results",
        "engine": "Ray",
    },
    "export": {
        "guard_data": "Accuracy check",
        "calibration_rows": "Bundle",
        "label": "Checkpoints trained elsewhere",
        "keep_float": "Size and speed",
        "layout": "Layout",
    },
    "predict": {"labels": "Answers", "label": "Answers", "engine": "Ray"},
    "serve": {
        "watch": "Versions",
        "max_batch_tokens": "Batches",
        "truncate": "Limits",
        "tls_cert": "Security",
        "escalate_url": "Escalation",
        "abstain_below": "Answers and logs",
        "token_file": "Security",
        "log_level": "Answers and logs",
    },
}
_DIRECTORIES = {"served", "student", "out", "tokenizer", "work"}
_FILES = {"task", "input", "journal", "emit_batch"}
_VALUES = {
    **dict.fromkeys(("against", "batches", "cpus", "dtype", "padding", "peers", "precision"), "LIST"),
    **dict.fromkeys(("rationale_batches", "shapes", "sources", "stages"), "LIST"),
    "base_url": "URL",
    "column": "FIELD=COLUMN",
    "decoder_layers": "LAYERS",
    "encoder_layers": "LAYERS",
    "escalate_url": "URL",
    "extra_body": "JSON",
    "header": "NAME=VALUE",
    "label": "TEXT",
    "label_prefix": "TEXT",
    "otel_endpoint": "URL",
    "rationale_prefix": "TEXT",
    "request": "NAME=VALUE",
    "training": "FIELD=VALUE",
}
_OUT_IS_A_FILE = {"annotate", "predict", "new"}


def show_help(command: Any, ctx: Any) -> None:
    """Print the help page of ``command`` on stdout, as wide as the terminal allows."""
    console = Console(highlight=False)
    width = min(console.width, _MOST_WIDTH)
    console = Console(highlight=False, width=width)
    console.print(Text(command.get_usage(ctx)))
    for paragraph in (command.help or "").split("\n\n"):
        if paragraph.strip():
            console.print(Text("\n" + _paragraph(paragraph, width)))
    hints = typing.get_type_hints(command.callback, include_extras=True) if command.callback else {}
    panels: dict[str, list[tuple[str, str]]] = {}
    starts = {**_DATA, **_PANELS.get(command.name or "", {})}
    current = "Options"
    for parameter in command.get_params(ctx):
        current = starts.get(parameter.name, current)
        if getattr(parameter, "hidden", False):
            continue
        kind, info = _declared(hints.get(parameter.name))
        argument = parameter.param_type_name == "argument"
        panel = "Arguments" if argument else "General" if parameter.name in _COMMON else current
        panels.setdefault(panel, []).append(_row(parameter, kind, info, argument, command.name or ""))
    if "General" in panels and not (set(panels) - {"Arguments", "Options", "General"}):
        panels.setdefault("Options", []).extend(panels.pop("General"))  # a short page needs one panel
    for title in sorted(panels, key=lambda name: (name != "Arguments", name == "General")):
        _print_panel(console, title, panels[title], width)
    if commands := getattr(command, "commands", None):
        rows = [(name, (commands[name].help or "").split("\n\n")[0]) for name in command.list_commands(ctx)]
        _print_panel(console, "Commands", rows, width, max(len(name) for name in commands) + 2)
    elif ctx.auto_envvar_prefix:
        named = [item for item in command.get_params(ctx) if item.param_type_name == "option"]
        one = next((item for item in named if item.name not in _COMMON and not item.hidden), named[0])
        variable = f"{ctx.auto_envvar_prefix}_{one.name.upper()}"
        rule = f"Each option is also an environment variable: {max(one.opts, key=len)} is {variable}."
        console.print(Text(rule, style="dim"))


def _paragraph(text: str, width: int) -> str:
    """Join the lines of a paragraph. The commands after ``Examples:`` get lines of their own, ready to be copied."""
    text = " ".join(text.split())
    heading, _, commands = text.partition(": ")
    if heading not in ("Example", "Examples"):
        return text
    lines = [f"{heading}:"]
    for command in commands.split("; "):
        parts = textwrap.wrap(
            command, width - 6, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
        )
        lines.append("  " + " \\\n  ".join(parts))
    return "\n".join(lines)


def _declared(hint: Any) -> tuple[Any, Any]:
    if get_origin(hint) is Annotated:
        kind, info = get_args(hint)[:2]
        return kind, info
    return hint, None


def _row(parameter: Any, kind: Any, info: Any, argument: bool, command: str) -> tuple[str, str]:
    """Return the name with its value, and the help with default, choices and bounds."""
    atoms = _atoms(kind)
    value = parameter.metavar or _value(parameter.name, atoms, command)
    if argument:
        left = parameter.metavar or parameter.name.upper()
        left = f"[{left}]" if not parameter.required and not left.startswith("[") else left
    else:
        left = " / ".join([*sorted(parameter.opts, key=len), *parameter.secondary_opts])
        left += f" {value}" if value and not parameter.is_flag else ""
    notes = []
    choices = [item.value for atom in atoms if _is_enum(atom) for item in atom]
    if choices:
        notes.append("|".join(choices))
    low, high = getattr(info, "min", None), getattr(info, "max", None)
    if low is not None and high is not None:
        notes.append(f"{low:g} to {high:g}")
    elif low is not None:
        notes.append(f"from {low:g}")
    if parameter.required:
        notes.append("required")
    elif getattr(parameter, "multiple", False):
        notes.append("repeatable")
    if (shown := _default(parameter)) is not None:
        notes.append(f"default: {shown}")
    text = (parameter.help or "").replace("\\[", "[")
    return left, f"{text} [{'; '.join(notes)}]" if notes else text


def _atoms(kind: Any) -> list[Any]:
    parts = get_args(kind)
    return [atom for part in parts for atom in _atoms(part)] if parts else [kind]


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _value(name: str, atoms: list[Any], command: str) -> str:
    if name == "out":
        return "FILE" if command in _OUT_IS_A_FILE else "DIR"
    if name in _VALUES:
        return _VALUES[name]
    if int in atoms:
        return "N"
    if float in atoms:
        return "X"
    if Path in atoms:
        return "DIR" if name in _DIRECTORIES else "FILE"
    if bool in atoms:
        return ""
    return "FILE" if name in _FILES else "NAME"


def _default(parameter: Any) -> str | None:
    default = parameter.default
    if callable(default) or default is None or isinstance(default, list | tuple) or default == "":
        return None
    if isinstance(default, bool):
        return ("on" if default else "off") if parameter.secondary_opts else None
    if isinstance(default, Enum):
        return str(default.value)
    return f"{default:g}" if isinstance(default, float) else str(default)


def _print_panel(
    console: Console, title: str, rows: list[tuple[str, str]], width: int, left: int = 0
) -> None:
    inner = width - 4
    left = left or min(_LEFT, max(len(name) for name, _ in rows) + 2)
    text = Text()
    for name, note in rows:
        lines = textwrap.wrap(note, inner - left, break_on_hyphens=False) or [""]
        text.append(name, style="bold cyan")
        if len(name) + 2 > left:
            text.append("\n")
        else:
            text.append(" " * (left - len(name)) + lines.pop(0) + "\n")
        for line in lines:
            text.append(" " * left + line + "\n")
    text.rstrip()
    console.print(Panel(text, title=title, title_align="left", border_style="dim", width=width))
