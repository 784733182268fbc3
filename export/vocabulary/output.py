"""Choose the tokens that a student needs to write: those of its targets, and a margin.

The LM head is a third of a rationale's cost, and most of its rows never win.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from sbs_edge.data.example import Example
from sbs_edge.errors import UsageError
from sbs_edge.tokens import TextTokenizer

__all__ = ["output_tokens"]

MULTIPLE = 64  # widths the kernels like


def output_tokens(
    rows: Sequence[Example], tokenizer: Any, eos_id: int, pad_id: int, vocab_size: int
) -> np.ndarray:
    """Return the sorted token ids to keep.

    Kept: every token of a label, choice or rationale, and of an input (rationales quote their input); the
    special tokens; every single character, so that any word can still be spelled; then the tokenizer's
    first, most frequent tokens up to a quarter more.

    Raises:
        UsageError: there is no row to learn from.
    """
    if not rows:
        raise UsageError(
            "Pruning the vocabulary needs rows that show which tokens are written, but this student has none stored."
        )
    counts: Counter[int] = Counter()
    texts = TextTokenizer(tokenizer)
    for row in rows:
        for text in (
            row.input,
            row.label,
            row.teacher_label,
            row.rationale,
            *row.rationales,
            *(row.choices or ()),
        ):
            if text:
                counts.update(texts.encode(text))
    kept = {eos_id, pad_id, *counts}
    for token, index in tokenizer.get_vocab().items():
        if len(token.lstrip("▁Ġ")) <= 1:
            kept.add(index)
    kept = {index for index in kept if index < vocab_size}
    wanted = min(vocab_size, -(-(len(kept) * 5 // 4) // MULTIPLE) * MULTIPLE)
    for index in range(vocab_size):
        if len(kept) >= wanted:
            break
        kept.add(index)
    return np.array(sorted(kept), np.int64)
