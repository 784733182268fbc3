"""Options that ``annotate`` and ``task try`` share: how a teacher answers and what is read from the answer."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sbs_edge.teacher.task import TaskFile

__all__ = ["RationaleFromOption", "StructuredOption", "with_rationale_from"]


class _Structured(StrEnum):
    """Whether and how the teacher is asked for a JSON object."""

    auto = "auto"
    on = "on"
    off = "off"
    json_schema = "json_schema"
    json_object = "json_object"
    tool = "tool"


class _RationaleFrom(StrEnum):
    """Where a row's rationale comes from."""

    answer = "answer"
    reasoning = "reasoning"
    summary = "summary"


StructuredOption = Annotated[
    _Structured | None,
    typer.Option(
        help="Ask for a JSON object with rationale and label. auto: if the server supports it; on: fail without support; "
        "tool: as a function call. Default: that of the task file or preset, otherwise auto."
    ),
]

RationaleFromOption = Annotated[
    _RationaleFrom | None,
    typer.Option(
        help="Take the rationale from the answer, from the model's reasoning, or from a summary of the "
        "reasoning by a second call. Default: that of the task file, otherwise answer."
    ),
]


def with_rationale_from(task: TaskFile, flag: str | None) -> TaskFile:
    """Return the task with what ``--rationale-from`` says."""
    from sbs_edge.teacher.task import TaskFile

    return task if flag is None else TaskFile.model_validate({**task.model_dump(), "rationale_from": flag})
