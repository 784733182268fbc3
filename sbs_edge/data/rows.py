"""Raw rows out of files, one at a time: what a format holds, before anybody asks what it means.

Knows files and encodings, nothing of examples. A row that cannot be decoded is yielded with its
problem instead of being raised, so that one broken line costs one line.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbs_edge.errors import DataError, MissingExtra

__all__ = [
    "FORMATS",
    "RawRow",
    "is_text",
    "iterate_rows",
    "json_line_rows",
    "json_row",
    "parquet_rows",
    "printable",
]

FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row of a file.

    Attributes:
        line: line of the file the row starts at, from 1; the row number where a format has no lines.
        values: column to value, or None when the row could not be decoded.
        problem: why it could not be decoded; rows of one problem are counted together.
        detail: where in the row, for messages.
        raw: the row as text, as far as it is text.

    """

    line: int
    values: dict[str, Any] | None
    raw: str
    problem: str = ""
    detail: str = ""


def iterate_rows(path: Path) -> Iterator[RawRow]:
    """Yield the rows of one file, format by its suffix (:data:`FORMATS`).

    Memory does not grow with the number of rows, except for a ``.json`` file that holds one array.

    Raises:
        DataError: the file is absent, of an unknown format, or broken as a whole.
        MissingExtra: a Parquet file without pyarrow.

    """
    if not path.is_file():
        raise DataError(f"{path} is not a file. Give a file that ends in {', '.join(FORMATS)}.")
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _json_lines(path)
    if suffix == ".json":
        return _json_array(path) if _starts_with_bracket(path) else _json_lines(path)
    if suffix in (".csv", ".tsv"):
        return _csv(path, "\t" if suffix == ".tsv" else ",")
    if suffix == ".parquet":
        return _parquet(path)
    raise DataError(
        f"{path} ends in {suffix or 'nothing'!r}, which says no format. Known are {', '.join(FORMATS)}; "
        "rename the file after what it holds."
    )


def is_text(value: str) -> bool:
    r"""Tell whether ``value`` is valid Unicode: JSON can spell half a character, ``"\ud800"``, a lone surrogate."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def printable(value: str) -> str:
    r"""Return ``value`` with lone surrogates spelt out (``\ud800``), as no file in UTF-8 can hold them."""
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON value")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)  # json.loads would make one a line


def _json_lines(path: Path) -> Iterator[RawRow]:
    with path.open("rb") as handle:
        yield from json_line_rows(handle)


def json_line_rows(lines: Iterable[bytes]) -> Iterator[RawRow]:
    """Yield the rows of JSON Lines from an open file or stdin, one object a line; blank lines are passed over."""
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark says nothing in UTF-8
        if line.strip():
            yield json_row(number, line)


def json_row(number: int, line: bytes) -> RawRow:
    """Return the row that one line of JSON Lines holds, or why it holds none."""
    try:
        text = line.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        shown = line.decode("utf-8", errors="backslashreplace").rstrip("\r\n")
        return RawRow(number, None, shown, "not UTF-8", f"byte {error.start + 1} of the line")
    try:
        values = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        return RawRow(number, None, text, "broken JSON", f"{error.msg} at column {error.colno}")
    except ValueError as error:  # a number of 5000 digits, NaN
        return RawRow(number, None, text, "broken JSON", str(error)[:200])
    except RecursionError:
        return RawRow(number, None, text, "broken JSON", "nested too deeply")
    if not isinstance(values, dict):
        return RawRow(number, None, text, "not a JSON object", f"it is {type(values).__name__}")
    return RawRow(number, values, text)


def _starts_with_bracket(path: Path) -> bool:
    with path.open("rb") as handle:
        return handle.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; :class:`DataError` names the place where it breaks."""
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"), parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 at byte {error.start + 1}. Convert the file to UTF-8 and try again."
        ) from error
    except RecursionError as error:
        raise DataError(
            f"{path} is broken JSON: nested too deeply. Write the file again; in JSON Lines one such row costs one line."
        ) from error
    except ValueError as error:
        raise DataError(f"{path} is broken JSON: {error}. Write the file again.") from error


def _json_array(path: Path) -> Iterator[RawRow]:
    content = read_json(path)
    for number, item in enumerate(content, start=1):
        raw = _shown(item)
        if isinstance(item, dict):
            yield RawRow(number, item, raw)
        else:
            yield RawRow(number, None, raw, "not a JSON object", f"it is {type(item).__name__}")


def _csv(path: Path, delimiter: str) -> Iterator[RawRow]:
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as handle:
        reader = csv.reader(handle, delimiter=delimiter, strict=True)
        header: list[str] | None = None
        while True:
            start = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                if header is None:
                    raise DataError(
                        f"{path}:{start}: the header is no row of CSV ({error}). Mend the quotes."
                    ) from error
                yield RawRow(start, None, "", "broken CSV", f"{error}, up to line {reader.line_num}")
                continue
            if not cells:
                continue
            if header is None:
                header = _header(path, cells)
                continue
            yield _csv_row(start, header, cells, delimiter)


def _header(path: Path, cells: list[str]) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}:1: the header names the column {twice[0]!r} twice. Rename one of them.")
    if not all(map(is_text, names)):
        raise DataError(f"{path}:1: the header is not UTF-8. Convert the file to UTF-8 and try again.")
    return names


def _csv_row(line: int, header: list[str], cells: list[str], delimiter: str) -> RawRow:
    raw = delimiter.join(cells)
    if not all(map(is_text, cells)):  # a byte that did not decode is kept as a lone surrogate
        shown = raw.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        return RawRow(line, None, shown, "not UTF-8")
    if len(cells) != len(header):
        return RawRow(
            line, None, raw, "wrong number of cells", f"{len(cells)} cells under {len(header)} columns"
        )
    # CSV has no null: an empty cell is an unknown value.
    return RawRow(line, {name: cell if cell else None for name, cell in zip(header, cells, strict=True)}, raw)


def _parquet(path: Path) -> Iterator[RawRow]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtra("pyarrow", "train", f"Reading {path}") from error
    try:
        # Closed by the caller's loop ending; batches of 1024 rows bound the memory.
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for values in parquet_rows(batch):
                    number += 1
                    if isinstance(values, str):
                        yield RawRow(number, None, "", "cannot be read", values)
                    else:
                        yield RawRow(number, values, _shown(values))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}. Write the file again.") from error


def parquet_rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Yield the rows of a batch of pyarrow's; one that Python cannot hold is yielded as a message.

    Parquet does not check that text is UTF-8, and its times reach further and finer than Python's.
    """
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):  # of pyarrow's errors it is ArrowInvalid that is a ValueError
        rows = [_parquet_row(batch, number) for number in range(batch.num_rows)]
    yield from rows


def _parquet_row(batch: Any, number: int) -> dict[str, Any] | str:
    values = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            values[name] = column[number].as_py()
        except UnicodeDecodeError:
            return f"{name!r} is not UTF-8"
        except (ValueError, OverflowError) as error:
            return f"{name!r}: {error}"
    return values


def _shown(values: Any) -> str:
    try:
        return printable(json.dumps(values, ensure_ascii=False, default=str))
    except RecursionError:
        return ""  # read near the limit; nothing that was asked for lies so deep
