"""Checks on rationales: whether they say something, and something other than the input and the label."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sbs_edge.data.answers import normalise
from sbs_edge.data.example import Example, Splits
from sbs_edge.data.finding import Finding, learnt_label, places
from sbs_edge.data.targets import Mode
from sbs_edge.data.words import COMPARED_CHARACTERS, words

__all__ = ["Traits", "rationale_figures", "rationale_findings", "traits_of"]

LEAST_ROWS = 20
SHORT_WORDS = 3
COPIED_SHARE = 0.9
WARN_SHORT, WARN_COPIES, WARN_MARKS = 0.05, 0.2, 0.05
COMMON_SHARE, WARN_BOILERPLATE = 0.8, 0.9
WARN_FIXED = 0.95
CHECKED_ROWS = 20_000
_LENGTH = 4  # words of a sequence that may be boilerplate
_MARK = re.compile(r"\b(?:the|my|final) answer (?:is|:)|\banswer\s*:|\blabel\s*:", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Traits:
    """Traits of one rationale.

    Attributes:
        n_words: words and numbers.
        beyond: words that the label does not have.
        leaks: the label's words stand in the rationale, in order.
        copied: share of the rationale's three-word sequences that the input has.
        marked: it announces the answer, as in "the answer is".

    """

    n_words: int
    beyond: int
    leaks: bool
    copied: float
    marked: bool


def _sequences(found: Sequence[str], length: int) -> list[tuple[str, ...]]:
    return [tuple(found[i : i + length]) for i in range(max(1, len(found) - length + 1))]


def traits_of(row: Example, label: str | None) -> Traits:
    """Return the traits of the row's rationale.

    Example:
        >>> traits_of(Example("1", "it is cold", "wait", rationale="so wait"), "wait")
        Traits(n_words=2, beyond=1, leaks=True, copied=0.0, marked=False)

    """
    found, own = words(row.rationale or ""), words(label or "")
    there = set(_sequences(words(row.input[:COMPARED_CHARACTERS]), 3))
    sequences = _sequences(found, 3)
    spelled = f" {' '.join(found)} "
    return Traits(
        n_words=len(found),
        beyond=sum(word not in own for word in found),
        leaks=bool(own) and f" {' '.join(own)} " in spelled,
        copied=sum(item in there for item in sequences) / len(sequences) if len(found) >= 3 else 0.0,
        marked=_MARK.search(row.rationale or "") is not None,
    )


def rationale_figures(rows: Sequence[Example], mode: Mode | None) -> dict[str, Any] | None:
    """Return the quality of the rationales of a split in numbers, of its first 20,000; None without rationales.

    ``n``; ``distinct``; shares of rationales that are ``short`` (fewer than three words besides the label), ``leak`` the
    label's words, are ``copies`` (nine tenths of their three-word sequences are the input's) or announce the answer
    (``marked``); ``boilerplate``, the share of words in four-word sequences that four fifths of the rationales have; and
    ``fixed``, the share of rows with the most frequent rationale of their label (None for one label, or for many).
    """
    known = _with_traits(rows, mode)
    return _figures(known, mode) if known else None


def _with_traits(rows: Sequence[Example], mode: Mode | None) -> list[tuple[Traits, Example]]:
    known = [row for row in rows if row.rationale][:CHECKED_ROWS]
    return [(traits_of(row, learnt_label(row, mode)), row) for row in known]


def _figures(known: Sequence[tuple[Traits, Example]], mode: Mode | None) -> dict[str, Any]:
    traits = [item for item, _ in known]
    rows = [row for _, row in known]
    n = len(known)
    texts = Counter(normalise(row.rationale or "") for row in rows)
    by_label: dict[str, Counter[str]] = {}
    for row in rows:
        by_label.setdefault(learnt_label(row, mode) or "", Counter())[normalise(row.rationale or "")] += 1
    return {
        "n": n,
        "distinct": len(texts),
        "short": sum(item.beyond < SHORT_WORDS for item in traits) / n,
        "leaks": sum(item.leaks for item in traits) / n,
        "copies": sum(item.copied >= COPIED_SHARE for item in traits) / n,
        "marked": sum(item.marked for item in traits) / n,
        "boilerplate": _boilerplate([words(row.rationale or "") for row in rows]),
        "fixed": sum(own.most_common(1)[0][1] for own in by_label.values()) / n if 1 < len(by_label) < n / 4 else None,
    }  # fmt: skip


def _boilerplate(texts: Sequence[list[str]]) -> float:
    """Return the share of all words that stand in a four-word sequence which at least four fifths of the texts have."""
    holders: Counter[tuple[str, ...]] = Counter()
    for found in texts:
        holders.update(set(_sequences(found, _LENGTH)))
    common = {
        item for item, count in holders.items() if len(item) == _LENGTH and count >= COMMON_SHARE * len(texts)
    }
    covered = total = 0
    for found in texts:
        marked: set[int] = set()
        for place, item in enumerate(_sequences(found, _LENGTH)):
            if item in common:
                marked.update(range(place, place + _LENGTH))
        covered += len(marked)
        total += len(found)
    return covered / max(total, 1)


def rationale_findings(splits: Splits, mode: Mode | None) -> Iterator[Finding]:
    """Warn of training rationales from which a student learns little."""
    if mode in ("finetune", "distill"):
        return
    known = _with_traits(splits.train, mode)
    if len(known) < LEAST_ROWS:
        return
    figures = _figures(known, mode)
    short = sorted(((t, row) for t, row in known if t.beyond < SHORT_WORDS), key=lambda item: item[0].beyond)
    copies = sorted(
        ((t, row) for t, row in known if t.copied >= COPIED_SHARE), key=lambda item: -item[0].copied
    )
    marked = [(t, row) for t, row in known if t.marked]
    faults: list[tuple[str, bool, float, list[tuple[Traits, Example]], str]] = [
        (
            "short-rationales", figures["short"] >= WARN_SHORT, figures["short"], short,
            f"have fewer than {SHORT_WORDS} words besides the label. Ask the teacher for reasons, or leave them out.",
        ),
        (
            "copied-rationales", figures["copies"] >= WARN_COPIES, figures["copies"], copies,
            "repeat the input: nine tenths of their three-word sequences stand there. A student learns to copy from "
            "them. Show the teacher examples that give reasons.",
        ),
        (
            "answers-in-rationales", figures["marked"] >= WARN_MARKS, figures["marked"], marked,
            "announce the answer ('the answer is', 'label:'). Cut them before that mark: the label has its own task.",
        ),
        (
            "rationale-is-label", (figures["fixed"] or 0) >= WARN_FIXED, figures["fixed"] or 0, [],
            "are the most frequent one of their label. They say no more than the label does: expect no gain from them.",
        ),
    ]  # fmt: skip
    for code, is_found, share, worst, says in faults:
        if is_found:
            count = round(share * len(known))
            message = f"{count} of {len(known)} training rationales {says}"
            yield Finding("warn", code, message, places(row for _, row in worst), figures=figures)
    if figures["boilerplate"] >= WARN_BOILERPLATE and figures["distinct"] > 1:
        yield Finding(
            "warn",
            "boilerplate",
            f"{figures['boilerplate']:.0%} of the words of {len(known)} training rationales stand in phrases that four "
            "fifths of them have. The student spends its rationale loss on them: cut the phrases, or ask for reasons "
            "alone.",
            figures=figures,
        )
