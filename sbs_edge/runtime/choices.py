"""Labels that come with a request: one list for all texts, or a list for each text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sbs_edge.errors import UsageError
from sbs_edge.runtime.trie import Trie, build_trie

__all__ = ["label_lists", "places_of", "tries_of"]


def label_lists(labels: Iterable[Any], n_texts: int) -> list[tuple[str, ...]]:
    """Return a tuple of labels for each text.

    Args:
        labels: strings, to choose from for every text, or a list of strings for each.
        n_texts: how many texts there are.

    Raises:
        UsageError: the numbers of lists and texts differ, or a list is empty, repeats a label or has
            anything but strings.
    """
    if isinstance(labels, str):
        raise UsageError(
            f"labels must be a list of strings, or a list of them for each text, not the string {labels!r}."
        )
    labels = [
        names if isinstance(names, str) or not isinstance(names, Iterable) else list(names)
        for names in labels
    ]
    if labels and all(isinstance(label, str) for label in labels):
        labels = [labels] * n_texts
    if len(labels) != n_texts:
        raise UsageError(
            f"{n_texts} text(s) came with {len(labels)} list(s) of labels; give a list for each text."
        )
    found = []
    for row, names in enumerate(labels):
        if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
            raise UsageError(f"The labels of text {row} must be a non-empty list of strings, not {names!r}.")
        if len(set(names)) != len(names):
            raise UsageError(f"The labels of text {row} contain a label twice: {list(names)!r}.")
        found.append(tuple(names))
    return found


def tries_of(
    choices: Iterable[tuple[str, ...]], tokens_of: Callable[[str], Sequence[int]], start_id: int
) -> dict[tuple[str, ...], Trie]:
    """Return the prefix trie of every different tuple of labels.

    Raises:
        UsageError: two labels of one tuple have the same tokens.
    """
    tries: dict[tuple[str, ...], Trie] = {}
    for names in choices:
        if names not in tries:
            tokens = [tuple(tokens_of(name)) for name in names]
            if len(set(tokens)) != len(tokens):
                raise UsageError(
                    f"Two of the labels {list(names)!r} have the same tokens, so no student can tell them apart."
                )
            tries[names] = build_trie(tokens, start_id)
    return tries


def places_of(choices: Sequence[tuple[str, ...]], known: Sequence[str]) -> list[list[int]]:
    """Return the position of every chosen label among ``known``, the bundle's own labels.

    Raises:
        UsageError: one is not among them.
    """
    place = {name: index for index, name in enumerate(known)}
    unknown = sorted({name for names in choices for name in names} - set(place))
    if unknown:
        raise UsageError(
            f"This bundle has the labels {', '.join(known)}, not {unknown[0]!r}. Choose among "
            "these, or export a student whose rows have their own choices."
        )
    return [[place[name] for name in names] for names in choices]
