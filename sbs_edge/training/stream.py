"""Training rows that stay on disk: a source that is opened again for every pass, and a sample of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from sbs_edge.data.answers import normalise
from sbs_edge.data.example import Example, LabelKind, Splits, TaskSpec
from sbs_edge.data.labels import fit_labels, infer_task
from sbs_edge.data.readers import ColumnMap, RejectedRow, read_examples, refuse, stream_examples
from sbs_edge.errors import DataError, UsageError

__all__ = ["StreamSource", "open_stream"]

SAMPLE_ROWS = 5000


class StreamSource:
    """Opens the training rows for another pass, and counts the rows that a pass left out.

    Attributes:
        left_out: the largest number of malformed rows in a pass; a pass may have been cut short.
        first: the first of them.
        task: if set, labels get the spelling of its label set.

    """

    def __init__(
        self, source: str | Path, columns: ColumnMap, excluded: set[str], *, skip_bad_rows: bool
    ) -> None:
        self._source, self._columns, self._excluded = source, columns, excluded
        self._skip = skip_bad_rows
        self.left_out = 0
        self.first: RejectedRow | None = None
        self.task: TaskSpec | None = None

    def __call__(self) -> Iterator[Example]:
        """Read the rows once, without those whose input is a validation input.

        Raises:
            DataError: a malformed row, unless such rows are left out.

        """
        met = 0

        def count(row: RejectedRow) -> None:
            nonlocal met
            met += 1
            self.left_out = max(self.left_out, met)
            self.first = self.first or row

        on_reject = count if self._skip else None
        for row in stream_examples(self._source, columns=self._columns, on_reject=on_reject):
            if normalise(row.input) not in self._excluded:
                yield row if self.task is None else fit_labels([row], self.task)[0][0]


def open_stream(
    source: str | Path,
    *,
    validation: str | Path | None,
    columns: ColumnMap,
    label_kind: LabelKind | None = None,
    compare: Literal["text", "value"] = "text",
    skip_bad_rows: bool = False,
) -> tuple[Splits, StreamSource]:
    """Return splits with a sample of the training rows, and the source that opens all of them.

    The sample (the first 5000 rows) gives the task, the tokenizer and the calibration rows. Rows
    whose input is a validation input are left out of every pass. A malformed row stops the run when
    it is reached; with ``skip_bad_rows`` the source counts it instead.

    Raises:
        UsageError: there is no validation file; rows of a stream cannot be held out of it.
        DataError: no row is usable.

    """
    if validation is None:
        raise UsageError("A stream cannot hold out validation rows: pass a file of them as validation=FILE.")
    held = read_examples(validation, columns=columns)
    refuse(held.rejected)
    excluded = {normalise(row.input) for row in held.examples}

    rows = StreamSource(source, columns, excluded, skip_bad_rows=skip_bad_rows)
    sample = list(itertools.islice(rows(), SAMPLE_ROWS))
    if not sample:
        raise DataError(f"{source} has no usable training row outside {validation}.")
    task = infer_task(Path(source).stem, [*sample, *held.examples], label_kind, compare)
    rows.task = task
    return Splits(task, fit_labels(sample, task)[0], fit_labels(held.examples, task)[0]), rows
