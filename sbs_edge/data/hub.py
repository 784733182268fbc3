"""Hugging Face data sets: a directory that ``save_to_disk`` wrote, or a name on the hub.

``datasets`` is imported only here and only when such a source is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sbs_edge.data.parquet import name_classes
from sbs_edge.data.rows import FORMATS, RawRow
from sbs_edge.errors import DataError, MissingExtra

__all__ = ["is_dataset", "is_saved_dataset", "iterate_dataset", "split_names"]

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_saved_dataset(path: str | Path) -> bool:
    """Return whether ``path`` is a directory that ``datasets`` saved."""
    folder = Path(path)
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def is_dataset(path: str | Path) -> bool:
    """Return whether ``path`` is a saved data set, or can only be the name of one on the hub."""
    if is_saved_dataset(path):
        return True
    text = str(path)
    return bool(_NAME.fullmatch(text)) and not Path(path).exists() and not text.lower().endswith(FORMATS)


def _open(source: str | Path, *, streaming: bool = False) -> dict[str, Any]:
    """Return a mapping from split name to data set."""
    try:
        import datasets
    except ImportError as error:
        raise MissingExtra("datasets", "train", f"Reading the data set {source}") from error
    try:
        if is_saved_dataset(source):
            content = datasets.load_from_disk(str(source))
        else:
            content = datasets.load_dataset(str(source), streaming=streaming)
    except Exception as error:  # the library raises a dozen kinds of error
        if is_saved_dataset(source):
            raise DataError(
                f"The data set in {source} cannot be read: {error}. Save it again with save_to_disk."
            ) from error
        raise DataError(
            f"There is no file or directory {source}, and it could not be fetched as a Hugging Face data "
            f"set of that name ({type(error).__name__}). Check the spelling and the network; or, on a "
            f"machine that has one, run datasets.load_dataset({str(source)!r}).save_to_disk('folder'), "
            "copy the folder here and give its path."
        ) from error
    return dict(content) if isinstance(content, dict) else {"train": content}


def split_names(source: str | Path) -> list[str]:
    """Return the splits of a data set."""
    return list(_open(source, streaming=True))


def iterate_dataset(source: str | Path, split: str, *, streaming: bool = False) -> Iterator[RawRow]:
    """Yield the rows of one split; class labels are given by name, an unknown one (-1) as None.

    A saved data set is mapped into memory by ``datasets``, not loaded; ``streaming`` does the same
    for one on the hub.
    """
    splits = _open(source, streaming=streaming)
    if split not in splits:
        raise DataError(f"The data set {source} has no split {split!r}; it has {', '.join(splits)}.")
    content = splits[split]
    classes = {
        column: found
        for column, feature in (content.features or {}).items()
        if (found := _names_in(feature)) is not None
    }
    for number, row in enumerate(content, start=1):
        values = name_classes(row, classes)
        if isinstance(values, str):
            yield RawRow(
                number, None, json.dumps(row, ensure_ascii=False, default=str), "unknown class", values
            )
        else:
            yield RawRow(number, values, json.dumps(values, ensure_ascii=False, default=str))


def _names_in(feature: Any) -> list[str] | None:
    """Return the names of a class label, or of a list of them."""
    if type(feature).__name__ == "ClassLabel":
        return list(feature.names)
    inner = getattr(feature, "feature", None)
    return None if inner is None else _names_in(inner)
