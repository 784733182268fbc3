"""Group rows into calls, and pad them.

A row's padded length depends only on its own length, so a row is computed in the same way alone and in a batch.
Rows of equal padded length share a call up to a budget of tokens. With about 256 to 512 tokens per call the
activations stay in the L2 cache; more is slower, not faster.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

import numpy as np

__all__ = ["PAD_MULTIPLE", "pad_rows", "padded_length", "token_budget_batches"]

PAD_MULTIPLE = 8


def padded_length(n_tokens: int) -> int:
    """Return the length a row of ``n_tokens`` is padded to."""
    return -(-n_tokens // PAD_MULTIPLE) * PAD_MULTIPLE


def token_budget_batches(
    lengths: Sequence[int],
    budget: int,
    most_rows: int | None = None,
    shapes: Sequence[Hashable] | None = None,
) -> Iterator[list[int]]:
    """Yield lists of row numbers: equal padded length, at most ``budget`` padded tokens (at least one row).

    Args:
        lengths: tokens of every row.
        budget: most padded tokens per call.
        most_rows: most rows per call, for graphs that are built for so many; None: any number.
        shapes: padded shapes of a row's other inputs; rows of different shapes never share a call.
    """
    alike: dict[tuple[int, Hashable], list[int]] = {}
    for row, length in enumerate(lengths):
        alike.setdefault((padded_length(length), shapes[row] if shapes else None), []).append(row)
    for (length, _), rows in sorted(alike.items(), key=lambda item: item[0][0]):
        size = max(1, min(budget // max(length, 1), most_rows or len(lengths)))
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
