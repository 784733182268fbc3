"""Read raw rows from files, one at a time, before their values are interpreted.

This module knows files and encodings, and nothing of examples. A row that cannot be decoded is yielded with its
problem instead of raising an error, so that a broken line affects only itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sbs_edge.data.delimited import csv_rows, tsv_rows
from sbs_edge.data.parquet import parquet_file_rows, parquet_rows, shown
from sbs_edge.data.raw import BOM, RawRow, is_text, printable, refuse_foreign_bytes
from sbs_edge.errors import DataError

__all__ = [
    "FORMATS",
    "RawRow",
    "is_text",
    "iterate_rows",
    "json_line_rows",
    "json_row",
    "parquet_rows",
    "printable",
    "read_json",
    "starts_as_array",
]

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")

_ROW_FIELDS = ("data", "rows", "examples", "instances", "records", "items", "train")
"""The fields in which a JSON object may have its rows."""


def iterate_rows(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a file, whose suffix gives the format (:data:`FORMATS`).

    Memory does not grow with the number of rows, except for JSON that is one document: an array, or an
    object with its rows in a field such as ``data``.

    Raises:
        DataError: the file is missing, of an unknown format, or broken as a whole.
        MissingExtra: the file is Parquet and pyarrow is not installed.

    """
    if not path.is_file():
        raise DataError(f"{path} is not a file. Give a file that ends in {', '.join(FORMATS)}.")
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson", ".json"):
        document = _document_rows(path)
        return _json_lines(path) if document is None else _array_rows(document)
    if suffix == ".csv":
        return csv_rows(path)
    if suffix == ".tsv":
        return tsv_rows(path)
    if suffix == ".parquet":
        return parquet_file_rows(path)
    with path.open("rb") as handle:
        refuse_foreign_bytes(handle.read(8), path)
    raise DataError(
        f"The format of {path} is unknown, because it ends in {suffix or 'nothing'!r}. Rename it after its format: "
        f"{', '.join(FORMATS)}."
    )


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"the name {next(n for n in names if names.count(n) > 1)!r} occurs twice in one object"
        )
    return found


_DECODER = json.JSONDecoder(
    parse_constant=_no_constant, object_pairs_hook=_object
)  # json.loads would make one a line


def _json_lines(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as handle:
        yield from json_line_rows(handle, path)


def json_line_rows(lines: Iterable[bytes], where: object = "stdin") -> Iterator[RawRow]:
    """Yield the rows of JSON Lines from an open file or stdin, one object per line; blank lines are skipped."""
    for number, line in enumerate(lines, start=1):
        if number == 1:
            refuse_foreign_bytes(line[:8], where)
        line = line.removeprefix(BOM)
        if line.strip():
            yield json_row(number, line)


def json_row(number: int, line: bytes) -> RawRow:
    """Return the row in a line of JSON Lines, or the reason why it cannot be read."""
    try:
        text = line.removeprefix(BOM).decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        shown_line = line.decode("utf-8", errors="backslashreplace").rstrip("\r\n")
        return RawRow(number, None, shown_line, "not UTF-8", f"byte {error.start + 1} of the line")
    try:
        values = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        detail = f"{error.msg} at column {error.colno}"
        if "\r" in text:
            detail += "; lines end in a carriage return alone, convert them to line feeds"
        return RawRow(number, None, text, "broken JSON", detail)
    except ValueError as error:  # a number of 5000 digits, NaN, a name that stands twice
        return RawRow(number, None, text, "broken JSON", printable(str(error))[:200])
    except RecursionError:
        return RawRow(number, None, text, "broken JSON", "nested too deeply")
    if not isinstance(values, dict):
        return RawRow(number, None, text, "not a JSON object", f"it is {type(values).__name__}")
    return RawRow(number, values, text)


def starts_as_array(start: bytes) -> bool:
    """Return whether a JSON file that begins with ``start`` is an array of objects, not JSON Lines."""
    text = start.removeprefix(BOM).lstrip()
    return text.startswith(b"[") and text[1:].lstrip()[:1] in (b"{", b"]", b"")


def _document_rows(path: Path) -> list[Any] | None:
    """Return the rows of a file that is one JSON document, or None if it is JSON Lines."""
    with path.open("rb") as handle:
        start = handle.read(4096)
        refuse_foreign_bytes(start[:8], path)
        array = starts_as_array(start) or (path.suffix.lower() == ".json" and _begins(start, b"["))
        if not array:
            handle.seek(0)
            line = next((line for line in handle if line.removeprefix(BOM).strip()), b"")
            more = any(line.strip() for line in handle)
    if array:
        content = read_json(path)
        assert isinstance(content, list)  # its first character is a bracket
        return content
    if not _begins(line, b"{"):
        return None
    if more and not line.rstrip().endswith((b"{", b"[", b",", b":")):
        return None
    if not more:
        values = json_row(1, line).values or {}
        rows = next((values[name] for name in _ROW_FIELDS if _are_rows(values.get(name))), None)
        return rows if rows is not None and "input" not in values else None
    try:
        content = read_json(path)
    except DataError:
        return None  # broken lines, each of which is reported
    if not isinstance(content, dict):
        return None
    fields = [name for name, value in content.items() if _are_rows(value)]
    if len(fields) != 1:
        raise DataError(
            f"{path} is one JSON object over several lines, with "
            + (f"rows in {' and '.join(map(repr, fields))}" if fields else "no list of rows in it")
            + ". Write an array of rows, or one object per line."
        )
    rows = content[fields[0]]
    assert isinstance(rows, list)  # checked by _are_rows
    return rows


def _begins(text: bytes, mark: bytes) -> bool:
    return text.removeprefix(BOM).lstrip().startswith(mark)


def _are_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; :class:`DataError` names the place where it breaks."""
    content = path.read_bytes()
    refuse_foreign_bytes(content[:8], path)
    try:
        return _DECODER.decode(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 at byte {error.start + 1}. Convert the file to UTF-8 and try again."
        ) from error
    except RecursionError as error:
        raise DataError(
            f"{path} is broken JSON: nested too deeply. Write the file again; in JSON Lines only this row is affected."
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is broken JSON: {printable(str(error))}. Write the file again.") from error


def _array_rows(content: list[Any]) -> Iterator[RawRow]:
    for number, item in enumerate(content, start=1):
        if isinstance(item, dict):
            yield RawRow(number, item, shown(item))
        else:
            yield RawRow(number, None, shown(item), "not a JSON object", f"it is {type(item).__name__}")
