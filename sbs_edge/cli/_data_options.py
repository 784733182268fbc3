"""Options that select the rows of a command, shared by all commands that read examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.console import Console

if TYPE_CHECKING:
    from sbs_edge.data.example import Example, Splits
    from sbs_edge.data.finding import Finding

__all__ = [
    "ColumnOption",
    "Compare",
    "CompareOption",
    "DataArgument",
    "DatasetOption",
    "DecoderLayersOption",
    "EncoderLayersOption",
    "LabelKind",
    "LabelKindOption",
    "LeaveOutBadRowsOption",
    "Mode",
    "ModeOption",
    "PaperDataset",
    "SkipBadRowsOption",
    "SliceOption",
    "TaskOption",
    "TeacherErrorOption",
    "TeacherSamplesOption",
    "TestOption",
    "ValidationOption",
    "judge",
    "load_rows",
    "read_rows",
]


class Mode(StrEnum):
    """The training modes: gold or teacher labels, with or without rationales."""

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
    """The ways to compare two labels."""

    text = "text"
    value = "value"


class LabelKind(StrEnum):
    """The kinds of label sets."""

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
    Path | None, typer.Option(help="File of validation rows. Default: a tenth of the training inputs.")
]
TestOption = Annotated[
    Path | None,
    typer.Option(help="File of test rows, kept out of training. Default: a tenth of the inputs."),
]
TeacherErrorOption = Annotated[
    float,
    typer.Option(
        min=0,
        max=1,
        help="Share of the built-in teacher's answers that are wrong; PaLM's was about 0.25.",
    ),
]
TeacherSamplesOption = Annotated[
    int,
    typer.Option(min=1, help="Answers of the built-in teacher to each input; their votes are kept."),
]
TaskOption = Annotated[
    Path | None,
    typer.Option(
        help="The task file that the data was annotated with; gives the labels and how they compare."
    ),
]
LabelKindOption = Annotated[
    LabelKind | None,
    typer.Option(
        help="One fixed label set, choices in each row, or free text. Default: decided from the rows."
    ),
]
CompareOption = Annotated[
    Compare, typer.Option(help="Compare labels as text, or by arithmetic value (84/2 is 42).")
]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(help="Read FIELD from COLUMN, for example input=question."),
]
SkipBadRowsOption = Annotated[
    bool,
    typer.Option("--skip-bad-rows", help="Leave malformed rows out and list them in a file."),
]
LeaveOutBadRowsOption = Annotated[
    bool, typer.Option("--skip-bad-rows", help="Leave malformed rows out and say how many.")
]
EncoderLayersOption = Annotated[
    str | None,
    typer.Option(
        help="Encoder layers to keep of the checkpoint: a number, evenly spaced, or indices such as 0,3,5."
    ),
]
DecoderLayersOption = Annotated[
    str | None, typer.Option(help="Decoder layers to keep of the checkpoint, as --encoder-layers.")
]
SliceOption = Annotated[
    list[str] | None,
    typer.Option(help="Also report accuracy for each value of this column."),
]
ModeOption = Annotated[Mode, typer.Option(help="Learn gold or teacher labels, with or without rationales.")]


def judge(splits: Splits, mode: str) -> list[Finding]:
    """Print the warnings of ``data check`` on stderr and return them; raise an error if a check says stop.

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
    return findings


def load_rows(values: Mapping[str, Any], *, seed: int, skipped_file: Path | None, **instead: Any) -> Splits:
    """Read the splits that a command's data options name.

    Args:
        values: the command's parameters.
        seed: of splits that are drawn.
        skipped_file: where rows that were left out are listed.
        instead: arguments of ``load_splits`` that replace what ``values`` says.
    """
    from sbs_edge.data.load import load_splits
    from sbs_edge.data.readers import ColumnMap

    names = ("dataset", "validation", "test", "label_kind", "compare", "skip_bad_rows")
    options = {name: values[name] for name in names}
    options["columns"] = ColumnMap.parse(values["column"] or ())
    return load_splits(values["data"], **{**options, **instead}, seed=seed, skipped_file=skipped_file)


def read_rows(path: Path, column: Iterable[str] | None, skip_bad_rows: bool) -> list[Example]:
    """Read a file of rows; malformed rows stop the command, or are left out and counted on stderr."""
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
