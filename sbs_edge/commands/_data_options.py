"""The flags that say which rows a command reads; one spelling for every command that reads examples."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "ColumnOption",
    "Compare",
    "CompareOption",
    "DataArgument",
    "DatasetOption",
    "LabelKind",
    "LabelKindOption",
    "Mode",
    "ModeOption",
    "PaperDataset",
    "SkipBadRowsOption",
    "TestOption",
    "ValidationOption",
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


DataArgument = Annotated[str, typer.Argument(help="A file, a directory, a data set name, or 'builtin'.")]
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
    typer.Option(help="FIELD=COLUMN, for example input=question; several may be given."),
]
SkipBadRowsOption = Annotated[
    bool,
    typer.Option("--skip-bad-rows", help="Go on without malformed rows and list them in a file."),
]
ModeOption = Annotated[Mode, typer.Option(help="Gold or teacher's labels, with or without rationales.")]
