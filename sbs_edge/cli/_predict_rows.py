"""The rows of ``sbs-edge predict``: lines of text, JSON Lines, or a table by its suffix."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbs_edge.data.questions import Unanswerable, choices_of, id_of, text_of
from sbs_edge.data.raw import BOM, refuse_foreign_bytes
from sbs_edge.data.readers import ColumnMap
from sbs_edge.data.rows import FORMATS, RawRow, iterate_rows, json_line_rows
from sbs_edge.errors import DataError, UsageError

__all__ = ["PredictRow", "columns_of", "is_table", "table_rows", "text_rows"]


@dataclass(frozen=True, slots=True)
class PredictRow:
    """One row to answer.

    Attributes:
        place: file and line, for messages.
        text: the input.
        labels: the row's own choices, or None.
        rest: fields that are copied into the answer: the row's id, if it has one.

    """

    place: str
    text: str
    labels: list[str] | None
    rest: dict[str, Any]


def is_table(source: str) -> bool:
    """Return whether the suffix of ``source`` is that of a format with columns (:data:`sbs_edge.data.rows.FORMATS`)."""
    return Path(source).suffix.lower() in FORMATS


def columns_of(column: Iterable[str], field: str) -> ColumnMap:
    """Merge ``--column`` and ``--field``, of which the second is the short form of ``input=FIELD``."""
    columns = ColumnMap.parse(column)
    read = ("id", "input", "choices")
    unused = [
        part.name
        for part in dataclasses.fields(columns)
        if part.name not in read and getattr(columns, part.name)
    ]
    if unused:
        raise UsageError(
            f"predict reads no column for {unused[0]!r}: it takes input, choices and id. Leave out "
            f"--column {unused[0]}={getattr(columns, unused[0])}."
        )
    if columns.input is not None and field != "input":
        raise UsageError("--field NAME is short for --column input=NAME. Give one of the two.")
    return ColumnMap(id=columns.id, input=columns.input or field, choices=columns.choices)


def text_rows(lines: Iterable[bytes], source: str) -> Iterator[PredictRow]:
    """Yield a row for each line.

    Raises:
        DataError: a line is blank, not UTF-8, or has a carriage return or a NUL byte. Each line gets an answer, so
            no line may be dropped or joined.

    """
    for number, line in enumerate(lines, 1):
        if number == 1:
            refuse_foreign_bytes(line[:8], source)
        try:
            text = line.removeprefix(BOM).decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{source}:{number} is not UTF-8 (byte {error.start}). Convert the file first."
            ) from error
        if not text.strip():
            raise DataError(
                f"{source}:{number} is blank. predict needs a text in every line: fill it or remove it."
            )
        if "\r" in text or "\0" in text:
            what = (
                "carriage return inside; convert the line ends to line feeds" if "\r" in text else "NUL byte"
            )
            raise DataError(f"{source}:{number} has a {what}.")
        yield PredictRow(f"{source}:{number}", text, None, {})


def table_rows(
    source: str, columns: ColumnMap, lines: Iterable[bytes] | None = None, *, own_choices: bool = True
) -> Iterator[PredictRow]:
    """Yield the rows of a file with columns.

    Args:
        source: the file, whose suffix gives its format; with ``lines``, only a name for messages.
        columns: the columns of the fields; all but ``input`` may be None.
        lines: JSON Lines to read instead of the file.
        own_choices: read each row's choices; otherwise they are ignored.

    Raises:
        DataError: a row cannot be read or has no text; no row is left out.

    """
    for raw in iterate_rows(Path(source)) if lines is None else json_line_rows(lines, source):
        yield _row(raw, f"{source}:{raw.line}", columns, own_choices)


def _row(raw: RawRow, place: str, columns: ColumnMap, own_choices: bool) -> PredictRow:
    if raw.values is None:
        detail = f" ({raw.detail})" if raw.detail else ""
        raise DataError(
            f"{place}: {raw.problem}{detail}. predict needs a valid input in every row: fix or remove it."
        )
    for field in ("choices", "id"):
        wanted = getattr(columns, field)
        if wanted is not None and wanted not in raw.values:
            raise DataError(f"{place} has no column {wanted!r}, which --column names for {field!r}.")
    key = columns.id or "id"
    try:
        return PredictRow(
            place,
            text_of(raw.values, columns.input or "input"),
            choices_of(raw.values.get(columns.choices or "choices")) if own_choices else None,
            {"id": id_of(raw.values[key])} if key in raw.values else {},
        )
    except Unanswerable as error:
        raise DataError(f"{place}: {error}. {error.remedy}") from error
