"""Training rows that stay on disk: a source opened anew for every pass, and a sample that describes it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

from sbs_edge.data.answers import normalise
from sbs_edge.data.example import Example, LabelKind, Splits
from sbs_edge.data.load import infer_task
from sbs_edge.data.readers import ColumnMap, RejectedRow, read_examples, refuse, stream_examples
from sbs_edge.errors import DataError, UsageError

__all__ = ["open_stream"]

SAMPLE_ROWS = 5000


def open_stream(
    source: str | Path,
    *,
    validation: str | Path | None,
    columns: ColumnMap,
    label_kind: LabelKind | None = None,
    compare: Literal["text", "value"] = "text",
    skip_bad_rows: bool = False,
) -> tuple[Splits, Callable[[], Iterable[Example]]]:
    """Return splits that hold a sample of the training rows, and what opens all of them.

    The sample (the first 5000 rows) gives the task, the tokenizer and the calibration rows. Rows
    whose input is a validation input are left out of every pass. A malformed row stops the run when
    it is reached, unless ``skip_bad_rows``.

    Raises:
        UsageError: there is no validation file; rows of a stream cannot be held out of it.
        DataError: no row is usable.

    """
    if validation is None:
        raise UsageError(
            "--stream cannot hold validation rows out of the source: name a file with --validation."
        )
    held = read_examples(validation, columns=columns)
    refuse(held.rejected)
    excluded = {normalise(row.input) for row in held.examples}

    def rows() -> Iterator[Example]:
        skip: Callable[[RejectedRow], None] | None = (lambda _: None) if skip_bad_rows else None
        for row in stream_examples(source, columns=columns, on_reject=skip):
            if normalise(row.input) not in excluded:
                yield row

    sample = list(itertools.islice(rows(), SAMPLE_ROWS))
    if not sample:
        raise DataError(f"{source} holds no usable training row outside {validation}.")
    task = infer_task(Path(source).stem, [*sample, *held.examples], label_kind, compare)
    return Splits(task, train=sample, validation=held.examples), rows
