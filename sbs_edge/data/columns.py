"""Further columns of the files that rows came from: what an example does not hold, read again by line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from sbs_edge.data.example import Example
from sbs_edge.data.rows import iterate_rows
from sbs_edge.errors import UsageError

__all__ = ["column_values"]

ABSENT = "(none)"


def column_values(rows: Sequence[Example], columns: Sequence[str]) -> dict[str, list[str]]:
    """Return the value of each column for each row, as text; ``(none)`` where a row lacks it.

    Args:
        rows: read from files, which are read again.
        columns: names as the files spell them.

    Raises:
        UsageError: the rows did not come from files, or no row has one of the columns.

    Example:
        >>> column_values(read_examples("rows.jsonl").examples, ["customer"])
        {'customer': ['north', 'south']}

    """
    if not columns:
        return {}
    wanted: dict[str, set[int]] = {}
    for row in rows:
        file, _, line = row.source.rpartition(":")
        if not line.isdigit() or not Path(file).is_file():
            raise UsageError(
                f"Slices are read from the file of the rows, but row {row.id} comes from "
                f"{row.source or 'no file'}. Give the rows "
                "as a file."
            )
        wanted.setdefault(file, set()).add(int(line))
    found: dict[str, dict[str, str]] = {}
    names: set[str] = set()
    for file, lines in wanted.items():
        for raw in iterate_rows(Path(file)):
            if raw.line in lines and raw.values is not None:
                names |= set(map(str, raw.values))
                found[f"{file}:{raw.line}"] = {
                    column: _text(raw.values[column])
                    for column in columns
                    if raw.values.get(column) is not None
                }
    for column in columns:
        if not any(column in values for values in found.values()):
            raise UsageError(
                f"No row has a value in the column {column!r}, which is used for slices. The columns are "
                f"{', '.join(sorted(names))}."
            )
    return {column: [found[row.source].get(column, ABSENT) for row in rows] for column in columns}


def _text(value: object) -> str:
    return value.strip() or ABSENT if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
