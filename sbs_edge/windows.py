"""Long inputs as overlapping chunks, each like an input of its own.

A chunk is the task's prefix, the input's header where there is one, a marker where one is wanted, a window of the
remaining tokens, and end-of-sequence. Of the encoder's states of a chunk only those in the middle of its window are
kept, where context is on both sides; over all chunks every token of the input is kept once, in order. The repeated
beginning is kept from the first chunk and end-of-sequence from the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from sbs_edge.errors import UsageError
from sbs_edge.tokens import TextTokenizer

__all__ = ["MARKER", "Chunk", "ChunkReader", "LongSettings", "chunks_of", "kept_tokens"]

MARKER = "part {} of {}"
_LEAST_SHARE = 4  # the window gets at least a quarter of a chunk


@dataclass(frozen=True, slots=True)
class LongSettings:
    """Settings for reading inputs over ``max_source_tokens``; the section ``long`` of a manifest.

    Attributes:
        chunk: tokens of a chunk, prefix, header, marker and end-of-sequence included.
        overlap: share of a window that it has in common with the next one, in [0, 1).
        header: the text up to and including the first occurrence of this string stands in every chunk, unless it
            takes more than half of a chunk; "": none.
        marker: tell each chunk its place, as the text "part 3 of 9".
        top_k: encoder states each attention head of the decoder reads; None: all of them.
        max_tokens: longest input that is read.
        trained: how the student learnt to read long inputs: "full", "random" or "never".

    Example:
        >>> LongSettings(chunk=512, max_tokens=32768).overlap
        0.25
    """

    chunk: int
    max_tokens: int
    overlap: float = 0.25
    header: str = ""
    marker: bool = False
    top_k: int | None = None
    trained: str = "never"

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` for values that cannot be used."""
        if self.chunk < 8:
            raise UsageError(f"A chunk has at least 8 tokens, not {self.chunk}.")
        if not 0 <= self.overlap < 1:
            raise UsageError(f"The overlap of chunks is a share in [0, 1), not {self.overlap}.")
        if self.max_tokens < self.chunk:
            raise UsageError(
                f"Inputs are read up to {self.max_tokens} tokens, which is less than one chunk of {self.chunk}; "
                "allow more tokens, or make the chunks smaller."
            )
        if self.top_k is not None and self.top_k < 1:
            raise UsageError(f"top_k must be at least 1, not {self.top_k}; leave it out to read all states.")

    def describe(self) -> dict[str, Any]:
        """Return the settings as a manifest and a student's card keep them."""
        return asdict(self)

    @classmethod
    def of(cls, section: Mapping[str, Any] | None) -> LongSettings | None:
        """Return the settings of a section that :meth:`describe` wrote, or None for None."""
        return None if section is None else cls(**section)


@dataclass(frozen=True, slots=True)
class Chunk:
    """One input of the encoder; its states ``start`` to ``stop`` (exclusive) are kept.

    Attributes:
        ids: token ids, end-of-sequence included.
        start: the first state that is kept.
        stop: one after the last state that is kept.
    """

    ids: list[int]
    start: int
    stop: int


def kept_tokens(chunks: Sequence[Chunk]) -> list[int]:
    """Return the token ids whose states are kept, in order."""
    return [token for chunk in chunks for token in chunk.ids[chunk.start : chunk.stop]]


def chunks_of(
    body: Sequence[int],
    head: Sequence[int],
    tail: Sequence[int],
    size: int,
    overlap: float,
    marker: Callable[[int, int], Sequence[int]] | None = None,
) -> list[Chunk]:
    """Cut ``body`` into chunks of at most ``size`` tokens.

    All windows have the same length, the last one too: it begins earlier instead of being shorter.

    Args:
        body: the tokens to cut; each is kept in one chunk.
        head: tokens that begin every chunk.
        tail: tokens that end every chunk.
        size: most tokens of a chunk.
        overlap: share of a window that it has in common with the next one.
        marker: number of a chunk, from 1, and how many there are -> tokens after ``head``; None: no marker. An
            input that fits one chunk has none.

    Raises:
        UsageError: head, marker and tail leave less than a quarter of a chunk for the window; the message lacks its
            subject, the text.
    """
    if len(head) + len(body) + len(tail) <= size:
        return [Chunk([*head, *body, *tail], 0, len(head) + len(body) + len(tail))]
    count, needed = 0, 2
    markers: list[Sequence[int]] = []
    while needed > count:  # markers of more chunks are longer, and may ask for one chunk more
        count = needed
        markers = [marker(part, count) for part in range(1, count + 1)] if marker is not None else []
        room = size - len(head) - len(tail) - max(map(len, markers), default=0)
        if room < max(1, size // _LEAST_SHARE):
            raise UsageError(
                f"has a beginning of {len(head)} tokens that stands in every chunk, which leaves {max(room, 0)} of "
                f"{size} tokens for the text itself; at least {max(1, size // _LEAST_SHARE)} are needed. Shorten it."
            )
        step = max(1, room - int(room * overlap))
        needed = 1 + math.ceil(max(0, len(body) - room) / step)
    starts = [min(index * step, len(body) - room) for index in range(count)]
    chunks: list[Chunk] = []
    kept = 0  # tokens of the body kept so far
    for index, start in enumerate(starts):
        opening = [*head, *(markers[index] if markers else ())]
        ids = [*opening, *body[start : start + room], *tail]
        if index + 1 < count:
            # The middle of what this window shares with the next one.
            stop = (starts[index + 1] + start + room + 1) // 2
            last = len(opening) + stop - start
        else:
            stop, last = len(body), len(ids)
        chunks.append(Chunk(ids, 0 if index == 0 else len(opening) + kept - start, last))
        kept = stop
    return chunks


class ChunkReader:
    """Cuts tokenised texts into chunks; safe to share between threads."""

    def __init__(self, tokenizer: TextTokenizer, settings: LongSettings, eos_id: int) -> None:
        """Take a tokenizer, the settings and the id that ends a sequence."""
        self._tokenizer, self._settings, self._eos = tokenizer, settings, eos_id
        self._markers: dict[tuple[int, int], list[int]] = {}

    def chunks(self, text: str, ids: Sequence[int], prefix: str, where: str = "The text") -> list[Chunk]:
        """Return the chunks of ``text``.

        Args:
            text: the text without its prefix.
            ids: its tokens with ``prefix``, end-of-sequence last; they may be cut.
            prefix: the task's prefix.
            where: the text's place, as the subject of a sentence.

        Raises:
            UsageError: the prefix and the marker leave too little of a chunk.
        """
        tail = list(ids[-1:]) if ids[-1:] == [self._eos] else []
        body = ids[: len(ids) - len(tail)]
        settings = self._settings
        n_head = self._common(self._header(text), prefix, body)
        if n_head > settings.chunk // 2:  # the string stands somewhere in the text: that is not a header
            n_head = self._common("", prefix, body)
        try:
            return chunks_of(
                body[n_head:], body[:n_head], tail, settings.chunk, settings.overlap,
                self._marker if settings.marker else None,
            )  # fmt: skip
        except UsageError as error:
            raise UsageError(f"{where} {error}") from error

    def _common(self, header: str, prefix: str, body: Sequence[int]) -> int:
        """Return how many tokens of ``body`` are those of the prefix and the header alone."""
        beginning = self._tokenizer.encode(header, prefix)
        pairs = zip(beginning, body, strict=False)
        return next(
            (n for n, (one, other) in enumerate(pairs) if one != other), min(len(beginning), len(body))
        )

    def _header(self, text: str) -> str:
        mark = self._settings.header
        place = text.find(mark) if mark else -1
        return text[: place + len(mark)] if place >= 0 else ""

    def _marker(self, part: int, parts: int) -> list[int]:
        if (part, parts) not in self._markers:
            ids = self._tokenizer.encode(MARKER.format(part, parts))
            self._markers[part, parts] = ids[:-1] if ids[-1:] == [self._eos] else ids
        return self._markers[part, parts]
