"""Choose among several rationales for one label by what can be read off their texts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from sbs_edge.data.answers import normalise

__all__ = ["best_rationale"]

LONGEST_COPY = 0.9
"""A rationale that takes more of its words than this from the input repeats it and explains nothing."""


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", normalise(text))


def _overlap(first: Counter[str], second: Counter[str]) -> float:
    """Return the F1 score of two bags of words."""
    shared = sum((first & second).values())
    return 2.0 * shared / max(1, sum(first.values()) + sum(second.values()))


def _names(words: Sequence[str], label: Sequence[str]) -> bool:
    """Tell whether the words of ``label`` stand in ``words``, one after another."""
    width = len(label)
    return width > 0 and any(
        list(words[start : start + width]) == list(label) for start in range(len(words) - width + 1)
    )


def best_rationale(
    rationales: Sequence[str], text: str, label: str | None, labels: Sequence[str] = ()
) -> str:
    """Return the rationale to learn from, of several that argue for one label.

    Rationales that name the label, name another one, or copy the input come last. Among the others the one
    whose words most agree with the other rationales wins: it holds the evidence they share, at a usual
    length. What it takes up of the input decides next, then the order in which they were sampled.

    Args:
        rationales: at least one.
        text: the input.
        label: what they argue for; None: unknown.
        labels: all labels of the task or the row; empty for open labels.

    Example:
        >>> best_rationale(["it is cold", "it is cold outside", "refund , clearly"], "cold outside", "refund")
        'it is cold outside'

    """
    words = [_words(item) for item in rationales]
    bags = [Counter(own) for own in words]
    source = Counter(_words(text))
    named = [_words(name) for name in dict.fromkeys([*([label] if label else []), *labels])]

    def rank(index: int) -> tuple[bool, bool, float, float, int]:
        own = bags[index]
        copied = sum((own & source).values()) / max(1, len(words[index]))
        others = [_overlap(own, other) for other in (*bags[:index], *bags[index + 1 :])]
        return (
            not any(_names(words[index], name) for name in named),
            bool(words[index]) and copied <= LONGEST_COPY,
            round(sum(others) / max(1, len(others)), 6),
            round(_overlap(own, source), 6),
            -index,
        )

    return rationales[max(range(len(rationales)), key=rank)]
