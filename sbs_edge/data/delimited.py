"""Read CSV and TSV one row at a time; a stray quote affects only its own line.

``.tsv`` has no quoting: a quote is an ordinary character, and each line is a row. ``.csv`` is
RFC 4180: a quoted cell may contain commas, doubled quotes and line ends. A quote that is never closed, or is
closed lines later by another stray quote, would swallow the rows between. Such a row is reported with
its lines, and reading continues at the line after the one that opened the quote.
"""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from sbs_edge.data.raw import RawRow, is_text, refuse_foreign_bytes
from sbs_edge.errors import DataError

__all__ = ["csv_rows", "tsv_rows"]


class _Lines:
    """The physical lines of a file, which can be put back; ``number`` is that of the last line read."""

    def __init__(self, handle: IO[str]) -> None:
        self._handle = handle
        self._back: deque[str] = deque()
        self.number = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        line = self._back.popleft() if self._back else next(self._handle)
        self.number += 1
        return line

    def put_back(self, lines: list[str]) -> None:
        self._back.extendleft(reversed(lines))
        self.number -= len(lines)


def _open(path: Path) -> IO[str]:
    with path.open("rb") as handle:
        refuse_foreign_bytes(handle.read(8), path)
    # A byte that does not decode becomes a lone surrogate, so that only its row is rejected.
    return path.open(encoding="utf-8-sig", errors="surrogateescape", newline="")


def tsv_rows(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a ``.tsv`` file: one per line, cells between tabs, quotes as ordinary characters."""
    with _open(path) as handle:
        header: list[str] | None = None
        for number, text in enumerate(handle, start=1):
            line = text.removeprefix("\ufeff").rstrip("\r\n")
            if not line.strip(" "):
                continue
            cells = line.split("\t")
            if header is None:
                header = _header(path, cells, number)
            else:
                yield _row(number, number, header, cells, "\t")


def csv_rows(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a ``.csv`` file."""
    with _open(path) as handle:
        lines = _Lines(handle)
        header: list[str] | None = None
        while True:
            start = lines.number + 1
            taken: list[str] = []
            cells, problem = _record(lines, taken)
            if cells is None and not problem:
                return
            end = lines.number
            if header is None:
                if cells:
                    header = _header(path, cells, start)
                elif problem:
                    raise DataError(
                        f"{path}:{start}: the header is not a row of CSV ({problem}). Correct its quotes."
                    )
                continue
            if cells is not None and (not cells or not _swallows_rows(taken, cells, len(header))):
                if cells:
                    yield _row(start, end, header, cells, ",")
                continue
            lines.put_back(taken[1:])
            what = f"{problem}, up to line {end}"
            if cells is not None:
                what = f"a quote opens here and closes in line {end}, and the lines between look like rows"
            yield RawRow(start, None, _shown(taken[0].rstrip("\r\n")), "broken CSV", what)


def _record(lines: _Lines, taken: list[str]) -> tuple[list[str] | None, str]:
    """Read a record; return its cells, or None and the problem (no problem at the end of the file)."""

    def feed() -> Iterator[str]:
        for line in lines:
            taken.append(line)
            yield line.removeprefix("\ufeff") if len(taken) == 1 else line

    try:
        return next(csv.reader(feed(), strict=True)), ""
    except StopIteration:
        return None, ""
    except csv.Error as error:
        return None, str(error)


def _swallows_rows(taken: list[str], cells: list[str], width: int) -> bool:
    """Return whether a record of several lines is really several rows that a stray quote joined.

    Its lines look like rows if each, split at every comma, has as many cells as the header, none of them empty
    and none with a space at its ends, as after the commas of prose. If the record itself has
    the wrong number of cells, one such line is enough.
    """
    if len(taken) < 2 or width < 2:
        return False
    alike = [_looks_like_row(line, width) for line in taken]
    return all(alike) or (len(cells) != width and any(alike[1:]))


def _looks_like_row(line: str, width: int) -> bool:
    cells = line.rstrip("\r\n").split(",")
    return len(cells) == width and all(cell and cell == cell.strip() for cell in cells)


def _header(path: Path, cells: list[str], line: int) -> list[str]:
    names = [cell.strip() for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(f"{path}:{line}: the header names the column {twice[0]!r} twice. Rename one of them.")
    if not all(map(is_text, names)):
        raise DataError(f"{path}:{line}: the header is not UTF-8. Convert the file to UTF-8 and try again.")
    return names


def _shown(raw: str) -> str:
    return raw.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _row(line: int, end: int, header: list[str], cells: list[str], delimiter: str) -> RawRow:
    raw = delimiter.join(cells)
    if not all(map(is_text, cells)):
        return RawRow(line, None, _shown(raw), "not UTF-8")
    if "\0" in raw:
        return RawRow(line, None, raw, "a NUL byte", "the file is damaged or not UTF-8")
    if len(cells) != len(header):
        detail = f"{len(cells)} cells under {len(header)} columns"
        if end > line:
            detail += f", lines {line} to {end}"
        if delimiter == "\t" and '"' in raw:
            detail += "; a .tsv has no quoting"
        return RawRow(line, None, raw, "wrong number of cells", detail)
    if [cell.strip() for cell in cells] == header:
        return RawRow(line, None, raw, "the header again", "files were joined with their headers")
    # These formats have no null: an empty cell is an unknown value.
    return RawRow(line, {name: cell if cell else None for name, cell in zip(header, cells, strict=True)}, raw)
