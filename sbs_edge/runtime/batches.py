"""Which rows share a call, and how long they are padded.

A row's padded length depends on its own length alone, so that a row is computed the same way alone and in
company. Rows of one padded length share a call up to a budget of tokens: about 256 to 512 tokens a call
keep the activations in the second-level cache (more is slower, not faster).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

__all__ = ["PAD_MULTIPLE", "pad_rows", "padded_length", "token_budget_batches"]

PAD_MULTIPLE = 8


def padded_length(n_tokens: int) -> int:
    """Return the length a row of ``n_tokens`` is padded to."""
    return -(-n_tokens // PAD_MULTIPLE) * PAD_MULTIPLE


def token_budget_batches(
    lengths: Sequence[int], budget: int, most_rows: int | None = None
) -> Iterator[list[int]]:
    """Yield lists of row numbers: equal padded length, at most ``budget`` padded tokens (at least one row).

    Args:
        lengths: tokens of every row.
        budget: most padded tokens a call.
        most_rows: most rows a call, for graphs that were built for so many; None: any number.
    """
    by_length: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        by_length.setdefault(padded_length(length), []).append(row)
    for length in sorted(by_length):
        size = max(1, min(budget // max(length, 1), most_rows or len(lengths)))
        rows = by_length[length]
        for start in range(0, len(rows), size):
            yield rows[start : start + size]


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (ids, mask), each (B, S) int64, padded on the right to the longest row's padded length."""
    length = padded_length(max(len(row) for row in rows))
    ids = np.full((len(rows), length), pad_id, np.int64)
    mask = np.zeros((len(rows), length), np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = 1
    return ids, mask
