"""Check how a tokenizer spells labels, rationales and inputs: labels it cannot tell apart, characters it loses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sbs_edge.data.answers import normalise
from sbs_edge.data.example import Example
from sbs_edge.errors import UsageError
from sbs_edge.tokens import TextTokenizer

__all__ = ["check_choices", "label_ids", "spelling_of_rows", "spelling_sentences"]

CHECKED_ROWS = 5000
SHOWN = 3
SHOWN_CHARACTERS = 60


def label_ids(labels: Sequence[str], texts: TextTokenizer, eos_id: int) -> list[tuple[int, ...]]:
    """Return every label's tokens, end-of-sequence included.

    Raises:
        UsageError: a label has no token of its own, or two labels have the same tokens.
    """
    found: dict[tuple[int, ...], str] = {}
    for label in labels:
        ids = tuple(texts.encode_target(label, eos_id))
        if not texts.decode([index for index in ids if index != texts.unknown_id]):
            raise UsageError(
                f"The label {label!r} has no token in this student's tokenizer. Rename the label, or train with "
                "a tokenizer that has its characters."
            )
        if ids in found:
            raise UsageError(
                f"The labels {found[ids]!r} and {label!r} have the same tokens, so no student can tell "
                "them apart. Rename one of them."
            )
        found[ids] = label
    return list(found)


def check_choices(rows: Iterable[Example], texts: TextTokenizer, eos_id: int) -> None:
    """Refuse a row whose choices the tokenizer cannot tell apart.

    Raises:
        UsageError: as :func:`label_ids`, naming the row.
    """
    for row in rows:
        if row.choices:
            try:
                label_ids(row.distinct_choices, texts, eos_id)
            except UsageError as error:
                raise UsageError(f"{row.source or row.id}: {error}") from error


def _letters(text: str) -> str:
    """Return ``text`` in NFKC without case and white space, to compare two spellings of it."""
    return "".join(normalise(text).split())


def _fate(text: str, texts: TextTokenizer) -> str | None:
    """Return "lost" where characters are lost, "folded" where line breaks or tabs become spaces, or None."""
    if _letters(text) != _letters(texts.respelled(text)):
        return "lost"
    # Splitting at both and comparing lines: a tokenizer that keeps line breaks keeps their number.
    inner = text.strip()
    if any(mark in inner and mark not in texts.respelled(inner) for mark in "\n\t"):
        return "folded"
    return None


def spelling_of_rows(rows: Sequence[Example], texts: TextTokenizer) -> dict[str, dict[str, Any]]:
    """Count the texts of the first 5,000 rows that encoding and decoding changes.

    Returns:
        for ``labels`` (the different labels, teacher's labels and choices), ``rationales`` and ``inputs``: ``checked``;
        ``lost``, texts that lose characters; ``folded``, texts whose line breaks or tabs become spaces;
        and ``examples``, a few pairs of such a text and its decoded form.
    """
    some = rows[:CHECKED_ROWS]
    labels = {
        text: None
        for row in some
        for text in (row.label, row.teacher_label, *(row.choices or ()))
        if text is not None
    }
    kinds = {
        "labels": list(labels),
        "rationales": [row.rationale for row in some if row.rationale],
        "inputs": [row.input for row in some],
    }
    report: dict[str, dict[str, Any]] = {}
    for kind, found in kinds.items():
        fates = [_fate(text, texts) for text in found]
        lost = [text for text, fate in zip(found, fates, strict=True) if fate == "lost"]
        report[kind] = {
            "checked": len(found),
            "lost": len(lost),
            "folded": fates.count("folded"),
            "examples": [
                [text[:SHOWN_CHARACTERS], texts.respelled(text)[:SHOWN_CHARACTERS]] for text in lost[:SHOWN]
            ],
        }
    return report


def spelling_sentences(report: dict[str, dict[str, Any]]) -> list[str]:
    """Return the report of :func:`spelling_of_rows` as sentences; empty if no text changes."""
    sentences = []
    for kind, counts in report.items():
        if counts["lost"]:
            shown = "; ".join(f"{text!r} becomes {back!r}" for text, back in counts["examples"])
            sentences.append(
                f"{counts['lost']} of {counts['checked']} {kind} hold characters that the tokenizer cannot spell: "
                f"{shown}."
            )
        if counts["folded"]:
            sentences.append(
                f"{counts['folded']} of {counts['checked']} {kind} hold line breaks or tabs, which the tokenizer "
                "reads and writes as spaces."
            )
    return sentences
