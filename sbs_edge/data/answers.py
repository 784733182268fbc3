"""The one definition of when two labels are the same answer."""

from __future__ import annotations

import unicodedata
from typing import Literal

from sbs_edge.data.arithmetic import same_value

__all__ = ["normalise", "same_answer"]


def normalise(text: str) -> str:
    """Return ``text`` in NFKC, lower case, with runs of white space folded: the key for overlaps."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def same_answer(first: str, second: str, compare: Literal["text", "value"] = "text") -> bool:
    """Tell whether two labels agree: as stripped strings, or by arithmetic value."""
    if compare == "value":
        return same_value(first, second)
    return first.strip() == second.strip()
