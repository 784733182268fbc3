"""Words and numbers of a text, for checks that compare texts without a tokenizer."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["COMPARED_CHARACTERS", "words"]

COMPARED_CHARACTERS = 20_000
"""Checks read no more of an input, so that long documents do not make them slow."""

_WORD = re.compile(r"\d+(?:\.\d+)?|[^\W\d_]+")
_WHOLE = re.compile(r"(\d+)\.0+")


def words(text: str) -> list[str]:
    """Return the words and numbers of a text in order, case-folded; punctuation is left out and ``8.0`` is ``8``.

    Example:
        >>> words("Faye has 8.0 pens.")
        ['faye', 'has', '8', 'pens']

    """
    found = _WORD.findall(unicodedata.normalize("NFKC", text).casefold())
    return [whole[1] if (whole := _WHOLE.fullmatch(word)) else word for word in found]
