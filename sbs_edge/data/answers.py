"""Compare labels: when two are the same answer, and how a label is spelled."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Literal

from sbs_edge.data.arithmetic import same_value

__all__ = ["label_key", "match_label", "normalise", "same_answer"]

_WHOLE_FLOAT = re.compile(r"([+-]?\d+)\.0*")


def normalise(text: str) -> str:
    """Return ``text`` in NFKC, lower case, with runs of white space folded: the key for overlaps."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def label_key(label: str) -> str:
    """Return the key under which spellings of one label are the same: ``Refund`` and ``refund ``, ``1.0`` and ``1``."""
    key = normalise(label)
    whole = _WHOLE_FLOAT.fullmatch(key)
    return whole[1] if whole else key


def match_label(label: str, known: Iterable[str]) -> str | None:
    """Return the member of ``known`` that ``label`` spells, or None.

    The same text wins; otherwise the keys (:func:`label_key`) must be equal for exactly one member.

    Example:
        >>> match_label("Refund ", ["refund", "follow-up"])
        'refund'

    """
    names = list(dict.fromkeys(known))
    plain = label.strip()
    if plain in names:
        return plain
    found = [name for name in names if label_key(name) == label_key(plain)]
    return found[0] if len(found) == 1 else None


def same_answer(first: str, second: str, compare: Literal["text", "value"] = "text") -> bool:
    """Return whether two labels agree: as stripped strings, or by arithmetic value."""
    if compare == "value":
        return same_value(first, second)
    return first.strip() == second.strip()
