"""Options that say which rows a command reads, shared by all commands that read examples."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console

if TYPE_CHECKING:
    from sbs_edge.data.example import Example, Splits

__all__ = [
    "ColumnOption",
    "Compare",
    "CompareOption",
    "DataArgument",
    "DatasetOption",
    "LabelKind",
    "LabelKindOption",
    "LeaveOutBadRowsOption",
    "Mode",
    "ModeOption",
    "PaperDataset",
    "SkipBadRowsOption",
    "TestOption",
    "ValidationOption",
    "judge",
    "read_rows",
]


class Mode(StrEnum):
    """Where labels and rationales come from."""

    finetune = "finetune"
    distill = "distill"
    stepwise = "stepwise"
    stepwise_teacher = "stepwise-teacher"


class PaperDataset(StrEnum):
    """Data sets of the paper."""

    cqa = "cqa"
    svamp = "svamp"
    anli1 = "anli1"
    esnli = "esnli"


class Compare(StrEnum):
    """When two labels are the same answer."""

    text = "text"
    value = "value"


class LabelKind(StrEnum):
    """Where the labels to choose from come from."""

    closed = "closed"
    choices = "choices"
    open = "open"


DataArgument = Annotated[
    str, typer.Argument(help="A file, a directory, a data set name, 'builtin' or 'shift-log'.")
]
DatasetOption = Annotated[
    PaperDataset | None, typer.Option(help="Read DATA in the paper's layout instead of by its suffix.")
]
ValidationOption = Annotated[
    Path | None, typer.Option(help="File of validation rows; none: a tenth of the training inputs.")
]
TestOption = Annotated[
    Path | None,
    typer.Option(help="File of test rows, kept out of training; none: a tenth of the inputs."),
]
LabelKindOption = Annotated[
    LabelKind | None, typer.Option(help="closed, choices or open; none: decided from the rows.")
]
CompareOption = Annotated[
    Compare, typer.Option(help="Labels are equal as text, or by arithmetic value: 84/2 is 42.")
]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(help="For example input=question."),
]
SkipBadRowsOption = Annotated[
    bool,
    typer.Option("--skip-bad-rows", help="Go on without malformed rows and list them in a file."),
]
LeaveOutBadRowsOption = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Go on without malformed rows and say how many.")
]
ModeOption = Annotated[Mode, typer.Option(help="Gold or teacher's labels, with or without rationales.")]


def judge(splits: Splits, mode: str) -> None:
    """Say on stderr what the checks of ``data check`` warn of, and refuse at their stops.

    Raises:
        DataError: training would fail, or the student would be useless.

    """
    from sbs_edge.data.findings import examine, refuse_stops

    findings = examine(splits, cast("Any", mode))
    for finding in findings:
        if finding.level == "warn":
            Console(stderr=True).print(
                f"warning: {finding.message}", markup=False, highlight=False, soft_wrap=True
            )
    refuse_stops(findings)


def read_rows(path: Path, column: Iterable[str] | None, skip_bad_rows: bool) -> list[Example]:
    """Read one file of rows; malformed ones stop the command, or are left out and counted on stderr."""
    from sbs_edge.data.readers import ColumnMap, read_examples, refuse

    read = read_examples(path, columns=ColumnMap.parse(column or ()))
    if read.rejected and skip_bad_rows:
        Console(stderr=True).print(
            f"{path}: {len(read.rejected)} malformed row(s) left out; the first: {read.rejected[0]}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    else:
        refuse(read.rejected)
    return read.examples
