"""Read a label from the words of a model, ignoring ornaments, typography and letters of choices.

A label that matches two members of its set, or a letter that contradicts the text beside it, is not read at all: a
lost row costs a call, but a wrong label costs accuracy.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

__all__ = ["choice_letter", "fold", "match_label", "plain_label", "read_choice"]

_TYPOGRAPHY = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63\uff0d", "-")
    | dict.fromkeys("\u2018\u2019\u201a\u201b\u2032\u02bc\u02b9\u00b4\uff07", "'")
    | dict.fromkeys("\u201c\u201d\u201e\u201f\u2033\u00ab\u00bb\uff02", '"')
)
_OUTER = " \t\n\"'`*_~#"
_PAIRS = (("**", "**"), ("__", "__"), ("`", "`"), ('"', '"'), ("'", "'"), ("*", "*"), ("_", "_"), ("$", "$"),
          ("\\(", "\\)"), ("\\[", "\\]"), ("~~", "~~"), ("「", "」"),
          ("『", "』"), ("(", ")"), ("<", ">"), ("[", "]"), ("{", "}"), ("«", "»"))  # fmt: skip
_BOXED = re.compile(r"\\(?:boxed|text|textbf|textit|mathrm|mathbf|mathsf|fbox)\s*\{([^{}]*)\}")
_TAGGED = re.compile(r"\A<(\w+)>([^<>]+)</\1>\Z")
_ANNOUNCED = re.compile(r"\A(?:the\s+)?(?:label|answer|choice|category)\s*(?::|\bis\b:?)?\s+", re.IGNORECASE)
_LETTER = re.compile(
    r"(?:(?:option|choice|answer|letter)\s+)?"
    r"(?:[(\[]\s*([a-z]{1,2})\s*[)\]]\s*[:.-]?|([a-z]{1,2})\s*(?:[).:]|-\s|$))\s*(.*)",
    re.IGNORECASE | re.DOTALL,
)


def choice_letter(index: int) -> str:
    """Return the letter of a choice: ``a`` to ``z``, then ``aa``, ``ab``, up to ``zz``, then ``aaa``."""
    letters = ""
    index += 1
    while index:
        index, rest = divmod(index - 1, 26)
        letters = chr(ord("a") + rest) + letters
    return letters


def _visible(text: str) -> str:
    """Fold dashes, quotation marks and spaces to their plain forms and drop format characters."""
    kept = "".join(c for c in text if unicodedata.category(c) not in ("Cf", "Cc") or c in "\n\t")
    return " ".join(kept.translate(_TYPOGRAPHY).split())


def fold(text: str) -> str:
    """Return a key that is equal for two spellings of a label: it ignores case, typography, width and white space."""
    return " ".join(_visible(unicodedata.normalize("NFKC", _visible(text))).casefold().split())


def _inside(inner: str, left: str, right: str) -> bool:
    """Return whether ``left`` and ``right`` around ``inner`` are one pair, not the ends of two."""
    return right not in inner or (inner.startswith(left) and inner.endswith(right))


def _end(text: str) -> str:
    return re.sub(r"(?<=[^\s.!;,。！])\s*[.!;,。！]+$", "", text.strip())


def plain_label(text: str) -> str:
    r"""Return a label without the ornaments around it: quotation marks, Markdown, LaTeX, brackets, a final stop.

    Example:
        >>> plain_label(r"**\boxed{\text{follow-up}}**.")
        'follow-up'

    """
    text = _visible(text)
    while True:
        before = text
        text = _end(_TAGGED.sub(r"\2", _BOXED.sub(r"\1", text)))
        for left, right in _PAIRS:
            inner = text[len(left) : len(text) - len(right)]
            if (
                text.startswith(left)
                and text.endswith(right)
                and inner.strip()
                and _inside(inner, left, right)
            ):
                text = inner.strip()
                break
        if text == before:
            break
    for left, right in _PAIRS[:6]:  # **refund** (money back), or "refund" without its partner
        found = re.match(
            rf"{re.escape(left)}([^{re.escape(left[0])}]+){re.escape(right)}\s*(?:\(|[.,;:]|-\s)", text
        )
        if found is not None:
            return _end(found[1]).strip()
    # The partner stands before the marker: _So the answer is refund._
    if any(
        text.count(mark) % 2 and (text.startswith(mark) or text.endswith(mark))
        for mark in ('"', "**", "*", "`", "_")
    ):
        text = _end(text.strip(_OUTER))
    return text


def _loose(text: str) -> str:
    return " ".join(re.sub(r"[-_/]", " ", _bare(text)).split())


def _bare(text: str) -> str:
    return fold(plain_label(text)) or fold(text)


def match_label(text: str, known: Sequence[str]) -> str | None:
    """Return the only member of ``known`` that ``text`` spells, or None if there is none or more than one.

    Tried in turn are the exact text, its folded form, the form without ornaments, and hyphens as spaces; then the
    same for the first sentence and for the part before a bracket or a dash.
    """
    tests: tuple[Callable[[str], str], ...] = (str.strip, fold, _bare, _loose)
    heads = [
        text,
        _ANNOUNCED.sub("", plain_label(text)),
        re.split(r"[.!;,:]\s|\s[-(\u2013\u2014]|\n", text.strip())[0],
    ]
    for candidate in heads:
        for key in tests:
            wanted = key(candidate)
            found = {item: None for item in known if wanted and key(item) == wanted}
            if len(found) == 1:
                return next(iter(found))
            if found:
                return None
    return None


def read_choice(text: str, choices: Sequence[str]) -> str | None:
    """Return the choice that ``(c) math problem``, ``c``, ``(c)`` or ``math problem`` names, or None.

    The whole text is tried first, because a choice may itself contain a bracketed letter; then a letter at the start.
    Text beside the letter must be that choice's, or an abbreviation of it that matches no other choice.
    """
    if (whole := match_label(text, choices)) is not None and not re.match(
        r"\(\s*[A-Za-z]{1,2}\s*\)", text.strip()
    ):
        return whole
    found = _LETTER.fullmatch(re.sub(r"\*\*|__|`", "", plain_label(text)))
    if found is None:
        return whole
    letter, rest = (found[1] or found[2]).casefold(), found[3].strip()
    named = next((choice for i, choice in enumerate(choices) if choice_letter(i) == letter), None)
    if not rest:
        return named if named is not None else whole
    if whole is not None and fold(whole) == fold(text):
        return whole
    if re.search(r"\(\s*[A-Za-z]{1,2}\s*\)", rest) and not any(
        fold(rest) == fold(choice) for choice in choices
    ):
        return None  # (a) closet, (b) chest or (c) drawer
    spelled = match_label(rest, choices)
    if spelled is not None or named is None:
        return spelled if named is None or spelled is None or fold(spelled) == fold(named) else None
    if fold(plain_label(rest)) == fold(plain_label(named)):
        return named  # two choices are equal after folding, so the letter decides
    words = set(_loose(rest).split())
    fitting = [choice for choice in choices if words and words <= set(_loose(choice).split())]
    return named if fitting and all(choice == named for choice in fitting) else None
