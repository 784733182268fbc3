"""Disjoint splits, and the control with shuffled rationales."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence

from sbs_edge.data.answers import label_key, normalise
from sbs_edge.data.example import Example, Splits
from sbs_edge.data.readers import RejectedRow
from sbs_edge.errors import DataError

__all__ = [
    "VALIDATION_SHARE",
    "check_disjoint",
    "drop_overlaps",
    "find_overlaps",
    "hold_out",
    "shuffle_rationales",
]

VALIDATION_SHARE = 0.1
"""Share of the training inputs that is held out if a source has no validation split."""

_NAMES = ("train", "validation", "test")


def find_overlaps(splits: Splits) -> list[tuple[str, Example, str, Example]]:
    """Return pairs of rows with the same normalised input in two splits: (split, row, split, row)."""
    seen: dict[str, tuple[str, Example]] = {}
    found = []
    for name in _NAMES:
        own: dict[str, Example] = {}
        for example in getattr(splits, name):
            key = normalise(example.input)
            if key in seen:
                found.append((*seen[key], name, example))
            own.setdefault(key, example)
        seen.update({key: (name, example) for key, example in own.items() if key not in seen})
    return found


def check_disjoint(splits: Splits) -> None:
    """Raise a :class:`DataError` that names the rows if two splits share an input."""
    overlaps = find_overlaps(splits)
    if not overlaps:
        return
    shown = "; ".join(
        f"{first_split} row {first.source or first.id} and {second_split} row {second.source or second.id}"
        for first_split, first, second_split, second in overlaps[:5]
    )
    more = f" and {len(overlaps) - 5} more" if len(overlaps) > 5 else ""
    raise DataError(
        f"Two splits share {len(overlaps)} input(s), so accuracy on them would mean nothing: {shown}{more}. "
        "Remove these rows from one of the splits, or let skip_bad_rows=True drop them from training and "
        "validation. Inputs are compared in NFKC, lower case, with single spaces."
    )


def drop_overlaps(splits: Splits) -> list[RejectedRow]:
    """Remove rows from training and validation whose input a later split has too; return the removed rows.

    The test split is never changed, so that results stay comparable with others'.
    """
    dropped: list[RejectedRow] = []
    taken = {normalise(example.input): "test" for example in splits.test}
    for name in ("validation", "train"):
        kept: list[Example] = []
        for example in getattr(splits, name):
            where = taken.get(normalise(example.input))
            if where is None:
                kept.append(example)
                continue
            file, _, line = example.source.rpartition(":")
            raw = json.dumps({"id": example.id, "input": example.input}, ensure_ascii=False)
            number = int(line) if line.isdigit() else 0
            dropped.append(RejectedRow(file, number, f"input of {name} is in {where} too", raw))
        taken.update((normalise(example.input), name) for example in kept)
        setattr(splits, name, kept)
    return dropped


def hold_out(
    examples: Sequence[Example], share: float, seed: int, least: int = 1, *, stratify: bool = False
) -> tuple[list[Example], list[Example]]:
    """Split rows into (kept, held out) by input, so that equal inputs are never on both sides.

    Args:
        examples: rows in file order.
        share: share of the distinct inputs to hold out, in (0, 1).
        seed: decides which inputs.
        least: hold out at least this many distinct inputs, as far as ``stratify`` allows.
        stratify: hold out the same share of every label, and never all inputs of a label. A row
            without a gold label counts under the teacher's.

    Returns:
        Both parts in file order.
    """
    keys = sorted({normalise(example.input) for example in examples})
    random.Random(seed).shuffle(keys)
    wanted = max(least, round(share * len(keys)))
    held = _stratified(examples, keys, share, wanted) if stratify else set(keys[:wanted])
    kept = [example for example in examples if normalise(example.input) not in held]
    return kept, [example for example in examples if normalise(example.input) in held]


def _stratified(examples: Sequence[Example], keys: Sequence[str], share: float, wanted: int) -> set[str]:
    """Choose ``wanted`` of the shuffled ``keys`` in proportion to labels (largest remainders), never all keys of a label."""
    label_of: dict[str, str] = {}
    for example in examples:
        label = example.label if example.label is not None else example.teacher_label or ""
        label_of.setdefault(normalise(example.input), label_key(label))
    of_label: dict[str, list[str]] = {}
    for key in keys:
        of_label.setdefault(label_of[key], []).append(key)
    exact = {label: share * len(own) for label, own in of_label.items()}
    quota = {label: min(int(exact[label]), len(own) - 1) for label, own in of_label.items()}
    # Equal remainders keep the shuffled order, so that the seed decides.
    for label in sorted(of_label, key=lambda label: quota[label] - exact[label]):
        if sum(quota.values()) < wanted and quota[label] < len(of_label[label]) - 1:
            quota[label] += 1
    return {key for label, own in of_label.items() for key in own[: quota[label]]}


def shuffle_rationales(examples: Sequence[Example], seed: int) -> list[Example]:
    """Give every row the rationale of another row: a control with the same work but without the content."""
    rationales = [(example.rationale, example.rationales) for example in examples]
    random.Random(seed + 555).shuffle(rationales)
    return [
        dataclasses.replace(example, rationale=first, rationales=all_of_row)
        for example, (first, all_of_row) in zip(examples, rationales, strict=True)
    ]
