"""Inputs of two splits that nearly repeat each other, found by MinHash in bounded memory.

A text is the set of its sequences of three words. 32 hashes of each held-out text are kept (Broder 1997), banded so that a
training text meets only those it probably resembles; the resemblance of such a pair is then computed exactly.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from sbs_edge.data.answers import label_key, normalise
from sbs_edge.data.example import Example, Splits
from sbs_edge.data.finding import Finding, learnt_label, parts, places
from sbs_edge.data.targets import Mode
from sbs_edge.data.words import words

__all__ = ["NearDuplicate", "find_near_duplicates", "near_duplicates"]

LEAST_ALIKE = 0.8
"""Jaccard similarity from which two texts nearly repeat each other: about one word changed in thirty."""
LEAST_SHARE, LEAST_ROWS = 0.01, 3
_BANDS, _ROWS = 8, 4
_MOST_MET = 4  # kept texts that a text meets in a band
_BATCH_ROWS, _BATCH_CHARACTERS = 4096, 4 << 20
_ORDER = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9], np.uint64)
_HASHES = np.random.default_rng(0).integers(1, 2**63, (2, _BANDS * _ROWS), np.uint64) | np.uint64(1)


@dataclass(frozen=True, slots=True)
class NearDuplicate:
    """Two rows whose inputs nearly repeat each other.

    Attributes:
        row: the held-out row.
        other: the training row that is most like it.
        alike: share of their three-word sequences that both have, in [0.8, 1].

    """

    row: Example
    other: Example
    alike: float


def _sequences(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes of all three-word sequences, and where each text's begin; no text is without one."""
    found = [words(text) or [text] for text in texts]
    ids = [zlib.crc32(word.encode()) for own in found for word in (*own, "", "")]
    flat = np.array(ids, np.uint64) + np.uint64(1)
    sizes = np.array([len(own) for own in found])
    starts = np.concatenate([[0], np.cumsum(sizes + 2)[:-1]])
    mixed = flat[:-2] * _ORDER[0] + flat[1:-1] * _ORDER[1] + flat[2:] * _ORDER[2]
    keep = np.ones(len(flat), bool)
    keep[starts + sizes] = keep[starts + sizes + 1] = False  # the two marks behind each text
    mixed = mixed ^ (mixed >> np.uint64(29))
    return mixed[keep[:-2]], np.concatenate([[0], np.cumsum(sizes)[:-1]])


def _signatures(texts: Sequence[str]) -> np.ndarray:
    """Return uint32 (n, 32), the smallest hashes of each text's sequences."""
    hashes, starts = _sequences(texts)
    columns = [
        (np.minimum.reduceat(hashes * a + b, starts) >> np.uint64(32)).astype(np.uint32)
        for a, b in zip(*_HASHES, strict=True)
    ]
    return np.stack(columns, axis=1)


def _keys(signatures: np.ndarray) -> np.ndarray:
    """Return (8, n) one key for each band of four hashes."""
    bands = signatures.reshape(len(signatures), _BANDS, _ROWS)
    keys = np.zeros(bands.shape[:2], np.uint64)
    for column in range(_ROWS):
        keys = (keys ^ bands[:, :, column]) * _ORDER[1]
        keys ^= keys >> np.uint64(31)
    return keys.T


def _alike(first: str, second: str) -> float:
    own, other = (set(_sequences([text])[0].tolist()) for text in (first, second))
    return len(own & other) / len(own | other)


def _batches(rows: Sequence[Example]) -> Iterator[list[Example]]:
    """Yield the rows in lists of bounded length."""
    part: list[Example] = []
    size = 0
    for row in rows:
        if part and (len(part) == _BATCH_ROWS or size + len(row.input) > _BATCH_CHARACTERS):
            yield part
            part, size = [], 0
        part.append(row)
        size += len(row.input)
    yield part


def find_near_duplicates(held_out: Sequence[Example], rows: Sequence[Example]) -> list[NearDuplicate]:
    """Return the held-out rows that nearly repeat one of ``rows``, the most alike first.

    Rows whose inputs are equal (in NFKC, lower case, single spaces) are left out: they are an overlap of the splits.

    Args:
        held_out: rows of which 32 hashes are kept in memory.
        rows: the rows to look through, a few thousand at a time.

    Example:
        >>> found = find_near_duplicates(splits.test, splits.train)
        >>> print(found[0].alike, found[0].row.input, found[0].other.input)

    """
    if not held_out or not rows:
        return []
    kept = np.concatenate([_signatures([row.input for row in part]) for part in _batches(held_out)])
    order = np.argsort(_keys(kept), axis=1)
    keys = np.take_along_axis(_keys(kept), order, axis=1)
    best: dict[int, NearDuplicate] = {}
    for part in _batches(rows):
        for place, other in _candidates(_signatures([row.input for row in part]), kept, keys, order):
            row, train = held_out[other], part[place]
            if normalise(row.input) == normalise(train.input):
                continue
            alike = _alike(row.input, train.input)
            if alike >= LEAST_ALIKE and (other not in best or alike > best[other].alike):
                best[other] = NearDuplicate(row, train, alike)
    return sorted(best.values(), key=lambda pair: -pair.alike)


def _candidates(
    signatures: np.ndarray, kept: np.ndarray, keys: np.ndarray, order: np.ndarray
) -> Iterator[tuple[int, int]]:
    """Yield (text, kept text) for pairs that share a band and about as many hashes as near-duplicates would."""
    found: set[tuple[int, int]] = set()
    for band, own in enumerate(_keys(signatures)):
        left = np.searchsorted(keys[band], own, side="left")
        right = np.minimum(np.searchsorted(keys[band], own, side="right"), left + _MOST_MET)
        for place in map(int, np.flatnonzero(right > left)):
            found |= {(place, int(other)) for other in order[band, left[place] : right[place]]}
    for text, other in sorted(found):
        if (signatures[text] == kept[other]).mean() >= LEAST_ALIKE - 0.25:
            yield text, other


def near_duplicates(splits: Splits, mode: Mode | None) -> Iterator[Finding]:
    """Warn where many held-out inputs nearly repeat a training input and have its label."""
    for name, rows in parts(splits):
        if name == "train":
            continue
        found = [pair for pair in find_near_duplicates(rows, splits.train) if _same_label(pair, mode)]
        if len(found) < max(LEAST_ROWS, LEAST_SHARE * len(rows)):
            continue
        yield Finding(
            "warn",
            "near-duplicates",
            f"{len(found)} of {len(rows)} rows of {name} nearly repeat a training row with the same label: at least "
            f"{LEAST_ALIKE:.0%} of their three-word sequences are the same. Accuracy on them says little about new "
            "inputs: keep one of each, or split by what they have in common.",
            places(pair.row for pair in found),
            others=places(pair.other for pair in found),
            figures={"split": name, "rows": len(rows), "near_duplicates": len(found)},
        )


def _same_label(pair: NearDuplicate, mode: Mode | None) -> bool:
    first, second = learnt_label(pair.row, mode), learnt_label(pair.other, mode)
    return first is None or second is None or label_key(first) == label_key(second)
