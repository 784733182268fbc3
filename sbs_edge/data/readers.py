"""Turn rows into examples: map columns to fields, and reject unusable rows.

:mod:`sbs_edge.data.rows` reads the file formats, and :mod:`sbs_edge.data.hub` Hugging Face data sets. Every
unusable row becomes a :class:`RejectedRow` with file, line and reason; the caller decides whether to continue
without it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from sbs_edge.data.answers import match_label
from sbs_edge.data.example import Example
from sbs_edge.data.rows import FORMATS, RawRow, is_text, iterate_rows, printable
from sbs_edge.errors import DataError, UsageError

__all__ = ["ColumnMap", "ReadResult", "RejectedRow", "choices_cell", "read_examples", "stream_examples"]


@dataclass(frozen=True, slots=True)
class ColumnMap:
    """The column of each field of an :class:`Example`.

    A field that is None is read from the column of its own name, if there is one. A column that
    is given must be present in every row. Only ``input`` is required.
    """

    id: str | None = None
    input: str | None = None
    label: str | None = None
    teacher_label: str | None = None
    rationale: str | None = None
    rationales: str | None = None
    teacher_probs: str | None = None
    choices: str | None = None
    confidence: str | None = None

    @classmethod
    def parse(cls, items: Iterable[str]) -> ColumnMap:
        """Build a map from texts of the form ``field=column``."""
        known = [part.name for part in dataclasses.fields(cls)]
        chosen: dict[str, str] = {}
        for item in items:
            name, equals, column = item.partition("=")
            if not equals or name not in known or not column or name in chosen:
                raise UsageError(
                    f"{item!r} is not a column mapping. Write FIELD=COLUMN, once for each field, for example "
                    f"input=question; the fields are {', '.join(known)}."
                )
            chosen[name] = column
        return cls(**chosen)


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A row that cannot be used.

    Attributes:
        file: where it was read.
        line: line in the file, from 1; row number where the format has no lines.
        reason: why; rows with the same reason are counted together.
        raw: the row as text.
        detail: more on the reason, for messages.

    """

    file: str
    line: int
    reason: str
    raw: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(slots=True)
class ReadResult:
    """The usable and the rejected rows of a source, both in file order."""

    examples: list[Example] = field(default_factory=list)
    rejected: list[RejectedRow] = field(default_factory=list)


# Reasons that a column of another name may explain.
_OTHER_NAME = ("missing column", "neither 'label'")


class _Unusable(Exception):
    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = printable(reason), printable(detail)  # names of columns may not be text


def _fetch(values: dict[str, Any], columns: ColumnMap, name: str) -> Any:
    column = getattr(columns, name)
    if column is None:
        if name == "input" and name not in values:
            raise _Unusable(
                "missing column 'input'", f"the columns are {', '.join(map(str, values)) or 'none'}"
            )
        return values.get(name)
    if column not in values:
        there = ", ".join(map(str, values)) or "none"
        raise _Unusable(f"missing column {column!r}", f"it was mapped to {name!r}; the columns are {there}")
    return values[column]


def _text(value: Any, name: str, *, numbers: bool = False) -> str | None:
    """Return ``value`` as text; only labels and ids may be numbers.

    A whole float is spelled as an integer, because some files write ``1`` and others ``1.0``.
    """
    if value is None:
        return None
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    if numbers and isinstance(value, Decimal) and value.is_finite():
        return str(int(value)) if value == value.to_integral_value() else str(value)
    if numbers and (type(value) is int or (isinstance(value, float) and math.isfinite(value))):
        # An int of 400 digits is finite too, and math.isfinite cannot take it.
        return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
    if isinstance(value, bool) and name in ("label", "teacher_label", "choices"):
        return "true" if value else "false"
    if not isinstance(value, str):
        raise _Unusable(f"wrong type of {name!r}", f"{type(value).__name__} instead of text")
    if not value.strip():
        raise _Unusable(f"empty {name!r}", "" if name == "input" else "leave out what is unknown")
    if not is_text(value):
        raise _Unusable("not UTF-8", f"a lone surrogate in {name!r}")
    return value


def choices_cell(value: Any) -> Any:
    """Return the choices in a CSV cell, a JSON list or ``a|b|c``; a broken list and other values are returned unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.lstrip().startswith("[") else value.split("|")
    except (ValueError, RecursionError):
        return value


def _choices(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    value = choices_cell(value)
    if isinstance(value, str):
        raise _Unusable("wrong type of 'choices'", "neither a JSON list nor 'a|b|c'")
    if not isinstance(value, list | tuple):
        raise _Unusable("wrong type of 'choices'", f"{type(value).__name__} instead of a list")
    texts = tuple(_text(item, "choices", numbers=True) or "" for item in value)
    stripped = tuple(text.strip() for text in texts)
    if len(set(stripped)) < 2 or not all(stripped):
        raise _Unusable("unusable 'choices'", "at least two different ones, none empty")
    return stripped


def _confidence(value: Any) -> float:
    if value is None:
        return 1.0
    try:
        number = float(value) if not isinstance(value, bool) else math.nan
    except (TypeError, ValueError, OverflowError):
        raise _Unusable("wrong type of 'confidence'", f"{type(value).__name__} instead of a number") from None
    if not 0.0 < number <= 1.0:
        raise _Unusable("'confidence' outside (0, 1]", f"it is {value}")
    return number


def _rationales(value: Any, first: str | None) -> tuple[str, ...]:
    """Read a list of texts, or a cell that holds one as JSON; ``first`` leads, and every text stands once."""
    if value is None:
        return ()
    if isinstance(value, str):
        listed = choices_cell(value) if value.lstrip().startswith("[") else value
        value = [value] if isinstance(listed, str) else listed  # text may begin with a bracket
    if not isinstance(value, list | tuple):
        raise _Unusable("wrong type of 'rationales'", f"{type(value).__name__} instead of a list of texts")
    texts = [_text(item, "rationales") or "" for item in value]
    if not all(texts):
        raise _Unusable("empty 'rationales'", "leave out what is unknown")
    found = tuple(dict.fromkeys([*([first] if first else []), *texts]))
    return found if len(found) > 1 else ()


def _probs(value: Any) -> tuple[tuple[str, float], ...]:
    """Read ``{"refund": 0.7, "reply": 0.3}``, or a cell that holds it as JSON, and scale it to the sum 1."""
    if value is None:
        return ()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise _Unusable("wrong type of 'teacher_probs'", "the text is not a JSON object") from None
    if not isinstance(value, dict):
        raise _Unusable("wrong type of 'teacher_probs'", f"{type(value).__name__} instead of an object")
    shares: dict[str, float] = {}
    for label, share in value.items():
        name = (_text(label, "teacher_probs", numbers=True) or "").strip()
        if share is None:  # a Parquet struct has every name in every row
            continue
        if isinstance(share, bool) or not isinstance(share, int | float | Decimal):
            raise _Unusable(
                "wrong type of 'teacher_probs'", f"{name!r} has {type(share).__name__}, not a number"
            )
        if not 0.0 <= share < math.inf:
            raise _Unusable("'teacher_probs' below 0 or not finite", f"{name!r} has {share}")
        shares[name] = shares.get(name, 0.0) + float(share)
    total = sum(shares.values())
    if value and not 0.0 < total < math.inf:
        raise _Unusable("'teacher_probs' without a probability above 0")
    return tuple((label, share / total) for label, share in shares.items() if share > 0.0)


def to_example(values: dict[str, Any], columns: ColumnMap, default_id: str, source: str) -> Example:
    """Turn a row into an example, or raise the module's private error with the reason."""
    text = _text(_fetch(values, columns, "input"), "input")
    if text is None:
        raise _Unusable("empty 'input'")
    label = _text(_fetch(values, columns, "label"), "label", numbers=True)
    choices = _choices(_fetch(values, columns, "choices"))
    if choices and label is not None:
        found = match_label(label, choices)
        if found is None:
            raise _Unusable("'label' is not among 'choices'", f"{label!r} is not in {list(choices)}"[:200])
        label = found
    rationale = _text(_fetch(values, columns, "rationale"), "rationale")
    rationales = _rationales(_fetch(values, columns, "rationales"), rationale)
    return Example(
        id=_text(_fetch(values, columns, "id"), "id", numbers=True) or default_id,
        input=text,
        label=label,
        teacher_label=_text(_fetch(values, columns, "teacher_label"), "teacher_label", numbers=True),
        rationale=rationale or (rationales[0] if rationales else None),
        rationales=rationales,
        teacher_probs=_probs(_fetch(values, columns, "teacher_probs")),
        choices=choices,
        confidence=_confidence(_fetch(values, columns, "confidence")),
        source=source,
    )


def examples_of(
    rows: Iterable[RawRow], file: str, columns: ColumnMap, stem: str
) -> Iterator[Example | RejectedRow]:
    """Yield an example or a rejected row for each row, in order."""
    for row in rows:
        if row.values is None:
            yield RejectedRow(file, row.line, row.problem, row.raw, row.detail)
            continue
        try:
            yield to_example(row.values, columns, f"{stem}-{row.line}", f"{file}:{row.line}")
        except _Unusable as error:
            yield RejectedRow(file, row.line, error.reason, row.raw, error.detail)


def _files(path: str | Path) -> list[Path]:
    """Return the files of a path: the file itself, a directory's data files, or a pattern's matches, by name."""
    given = Path(path)
    if given.is_file():
        return [given]
    if given.is_dir():
        found = sorted(p for p in given.iterdir() if p.is_file() and p.suffix.lower() in FORMATS)
    elif any(mark in str(path) for mark in "*?["):
        anchor = Path(given.anchor)
        found = sorted(p for p in anchor.glob(str(given.relative_to(anchor))) if p.is_file())
    else:
        found = []
    if not found:
        raise DataError(f"There is no data at {path}. Give a file, or a directory of {', '.join(FORMATS)}.")
    return found


def _stream(path: str | Path, columns: ColumnMap, split: str) -> Iterator[Example | RejectedRow]:
    from sbs_edge.data import hub

    if hub.is_dataset(path):
        yield from examples_of(
            hub.iterate_dataset(path, split, streaming=True), f"{path}[{split}]", columns, split
        )
        return
    for file in _files(path):
        yield from examples_of(iterate_rows(file), str(file), columns, file.stem)


def stream_examples(
    path: str | Path,
    *,
    columns: ColumnMap = ColumnMap(),
    split: str = "train",
    on_reject: Callable[[RejectedRow], None] | None = None,
) -> Iterator[Example]:
    """Yield examples one at a time, so that memory does not grow with the number of rows.

    Args:
        path: a file, a directory of files or a ``*`` pattern (files in order of their names), a saved
            Hugging Face data set, or a data set's name.
        columns: which column is which field.
        split: split of a Hugging Face data set; unused for files.
        on_reject: receives every unusable row; without it the first one raises an error.

    Raises:
        DataError: the source is missing or broken, or a row is unusable and ``on_reject`` is None.
            Ids are not checked to be unique, because that would need all of them in memory.

    """
    for item in _stream(path, columns, split):
        if isinstance(item, Example):
            yield item
        elif on_reject is None:
            raise DataError(f"{item}. Correct the row, or leave such rows out with skip_bad_rows=True.")
        else:
            on_reject(item)


def collect(items: Iterable[Example | RejectedRow], limit: int | None = None) -> ReadResult:
    """Collect a stream; a row whose id occurred before is rejected."""
    result = ReadResult()
    first: dict[str, str] = {}
    for item in items:
        if limit is not None and len(result.examples) >= limit:
            break
        if isinstance(item, RejectedRow):
            result.rejected.append(item)
        elif item.id in first:
            file, _, line = item.source.rpartition(":")
            raw = json.dumps({"id": item.id, "input": item.input}, ensure_ascii=False)
            reason = RejectedRow(file, int(line), "duplicate 'id'", raw, f"{item.id!r} is {first[item.id]}")
            result.rejected.append(reason)
        else:
            first[item.id] = item.source
            result.examples.append(item)
    return result


def read_examples(
    path: str | Path,
    *,
    columns: ColumnMap = ColumnMap(),
    limit: int | None = None,
    split: str = "train",
) -> ReadResult:
    """Read a whole source into memory.

    Args:
        path: as for :func:`stream_examples`.
        columns: which column is which field.
        limit: stop after this many usable rows.
        split: split of a Hugging Face data set; unused for files.

    Returns:
        Usable and rejected rows. Ids are unique; a row without one is named after file and line.

    """
    return collect(_stream(path, columns, split), limit)


def refuse(rejected: Sequence[RejectedRow]) -> None:
    """Raise a :class:`DataError` that names the first of ``rejected``, if there are any."""
    if not rejected:
        return
    shown = "; ".join(map(str, rejected[:5])) + (
        f"; and {len(rejected) - 5} more" if len(rejected) > 5 else ""
    )
    renamed = any(row.reason.startswith(_OTHER_NAME) for row in rejected)
    raise DataError(
        f"{len(rejected)} row(s) cannot be used: {shown}. "
        + (
            "If a column has another name, map it with column=['FIELD=COLUMN']. Otherwise correct "
            if renamed
            else "Correct "
        )
        + "the rows, or leave them out with skip_bad_rows=True, which reports them."
    )
