"""Rows of Parquet files, with class labels by name.

``datasets`` and the hub store a class label as a number and its names in the metadata of the schema.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sbs_edge.data.raw import RawRow, printable
from sbs_edge.errors import DataError, MissingExtra

__all__ = ["class_names", "name_classes", "parquet_file_rows", "parquet_rows", "shown"]


def shown(values: Any) -> str:
    """Return a row as JSON, for messages."""
    try:
        return printable(json.dumps(values, ensure_ascii=False, default=str))
    except RecursionError:
        return ""  # nested too deeply; no field that is read is so deep


def parquet_file_rows(path: Path) -> Iterator[RawRow]:
    """Yield the rows of a file, numbered from 1."""
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
                        yield RawRow(number, values, shown(values))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {error}. Write the file again.") from error


def parquet_rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """Yield the rows of a pyarrow batch; a row that Python cannot represent is yielded as a message.

    Parquet does not check that text is UTF-8, and its times have more range and precision than Python's.

    Raises:
        DataError: two columns have the same name.

    """
    names = batch.schema.names
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"The Parquet file has two columns {twice!r}. Rename one of them.")
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):  # pyarrow's ArrowInvalid is a ValueError
        rows = [_parquet_row(batch, number) for number in range(batch.num_rows)]
    classes = class_names((batch.schema.metadata or {}).get(b"huggingface"))
    for row in rows:
        yield name_classes(row, classes) if classes and isinstance(row, dict) else row


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


def class_names(metadata: bytes | None) -> dict[str, list[str]]:
    """Return the class names of each column from the metadata that ``datasets`` writes; empty without it."""
    try:
        features = json.loads(metadata or b"{}")["info"]["features"].items()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {name: found for name, feature in features if (found := _names_in(feature))}


def _names_in(feature: Any) -> list[str] | None:
    """Return the names of a class label, or of a list of them."""
    if isinstance(feature, list) and len(feature) == 1:
        return _names_in(feature[0])
    if not isinstance(feature, dict):
        return None
    if feature.get("_type") == "ClassLabel":
        names = feature.get("names")
        return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
    return _names_in(feature["feature"]) if isinstance(feature.get("feature"), dict) else None


def name_classes(row: dict[str, Any], classes: Mapping[str, list[str]]) -> dict[str, Any] | str:
    """Return the row with class numbers replaced by names; -1 means unknown, a number without a name is a message."""
    named = dict(row)
    for column, names in classes.items():
        if column not in row:
            continue
        value = row[column]
        numbers = value if isinstance(value, list | tuple) else [value]
        if not all(number is None or (type(number) is int and number >= -1) for number in numbers):
            continue  # already text
        if any(number is not None and number >= len(names) for number in numbers):
            return f"{column!r} is {value}, and the schema names {len(names)} classes"
        texts = [None if number is None or number < 0 else names[number] for number in numbers]
        named[column] = texts if isinstance(value, list | tuple) else texts[0]
    return named
