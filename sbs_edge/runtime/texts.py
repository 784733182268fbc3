"""Text to token ids and back, with a bundle's tokenizer, prefixes and limits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set

from sbs_edge.errors import UsageError
from sbs_edge.tokens import (
    TextTokenizer,
    most_characters,
    read_whole,
    text_fault,
    within_limit,
    without_limits,
)
from sbs_edge.windows import Chunk, ChunkReader, LongSettings

__all__ = ["Texts", "check_texts", "over_limit"]


def check_texts(texts: Iterable[str]) -> list[str]:
    """Return ``texts`` as a list, read once, or raise an error for the first that cannot be answered.

    Raises:
        UsageError: ``texts`` is not an ordered iterable of strings, or a text is not a string, is empty or blank,
            or is not valid Unicode; the message names its row.
    """
    if isinstance(texts, str | bytes | Mapping | Set) or getattr(texts, "ndim", 1) != 1:
        raise UsageError(
            f"The texts must be a list of strings, not a {type(texts).__name__}; pass a single text as a list: [text]."
        )
    try:
        found = list(texts)
    except TypeError as error:
        raise UsageError(f"The texts must be a list of strings, not a {type(texts).__name__}.") from error
    for row, text in enumerate(found):
        fault = text_fault(text)
        if fault is not None:
            raise UsageError(f"Text {row} {fault}. Every text needs an answer: correct it or leave it out.")
    return found


def over_limit(where: str, text: str, n_tokens: int, limit: int, remedy: str, task: str | None = None) -> str:
    """Return the message about a text over the token limit.

    Args:
        where: the text's place, as the subject of the sentence.
        text: the text without its prefix.
        n_tokens: how many tokens were found, at least ``limit`` + 1 unless the text is over the limit of characters.
        limit: most tokens of an input.
        remedy: the option that allows cutting.
        task: the task whose prefix counts; None: not named.
    """
    prefix = "its prefix" if task is None else f"the {task} prefix"
    if n_tokens <= limit:
        much = f"{len(text):,} characters, and at most {most_characters(limit):,} are read for {limit} tokens"
        return f"{where} has {much}. Shorten it, or allow cutting with {remedy}."
    # Of a text far over the limit only the beginning was read.
    more = f"more than {limit}" if len(text) > read_whole(limit) else str(n_tokens)
    return (
        f"{where} has {more} tokens with {prefix}; this bundle's limit is {limit}. "
        f"Shorten it, or allow cutting with {remedy}."
    )


class Texts:
    """The tokenizer of a bundle; safe to share between threads. Its texts have passed :func:`check_texts`.

    Attributes:
        max_tokens: longest input that is read, prefix and end-of-sequence included.
    """

    def __init__(
        self,
        tokenizer: bytes,
        prefixes: Mapping[str, str],
        limits: Mapping[str, int],
        eos_token_id: int,
        long: LongSettings | None = None,
    ) -> None:
        """Read the tokenizer.

        Args:
            tokenizer: content of ``tokenizer.json``.
            prefixes: task -> the prefix of its inputs.
            limits: ``max_source_tokens`` and ``max_label_tokens``.
            eos_token_id: the id that ends a sequence.
            long: how inputs over ``max_source_tokens`` are read; None: not at all.
        """
        from tokenizers import Tokenizer

        self._tokenizer = TextTokenizer(without_limits(Tokenizer.from_buffer(tokenizer)))
        self._prefixes, self._limits, self._eos = prefixes, limits, eos_token_id
        self.max_tokens = limits["max_source_tokens"] if long is None else long.max_tokens
        self._chunks = None if long is None else ChunkReader(self._tokenizer, long, eos_token_id)

    def tokenize(self, texts: Sequence[str], task: str) -> list[list[int]]:
        """Return every text's ids for ``task``, uncut: prefix and end-of-sequence included.

        Of a text far over the token limit only the beginning is read. It still has more ids than the limit, and up
        to the limit they are those of the whole text.
        """
        return self._tokenizer.encode_beginnings(texts, self.max_tokens, self._prefixes[task])

    def count(self, texts: Sequence[str], task: str) -> list[int]:
        """Return how many tokens every text has for ``task``, however long it is."""
        return [len(ids) for ids in self._tokenizer.encode_batch(texts, self._prefixes[task])]

    def encode(
        self, texts: Sequence[str], task: str, truncate: bool, tokens: Sequence[Sequence[int]] | None = None
    ) -> tuple[list[list[int]], list[bool]]:
        """Return the ids of every text within the limit, and whether it was cut.

        Args:
            texts: inputs without prefix.
            task: "label" or "rationale".
            truncate: cut texts over the limit, instead of raising an error.
            tokens: the result of :meth:`tokenize` for these texts.

        Raises:
            UsageError: a text is over the limit.
        """
        limit = self.max_tokens
        if tokens is None:
            tokens = self.tokenize(texts, task)
        elif len(tokens) != len(texts):
            raise UsageError(f"{len(texts)} text(s) came with {len(tokens)} list(s) of tokens.")
        rows: list[list[int]] = []
        cut: list[bool] = []
        most = most_characters(limit)
        for row, (text, ids) in enumerate(zip(texts, tokens, strict=True)):
            too_long = len(ids) > limit or len(text) > most
            if too_long and not truncate:
                raise UsageError(over_limit(f"Text {row}", text, len(ids), limit, "truncate=True"))
            rows.append(within_limit(ids, limit, self._eos))
            cut.append(too_long)
        return rows, cut

    def documents(
        self, texts: Sequence[str], rows: Sequence[Sequence[int]], task: str
    ) -> dict[int, list[Chunk]]:
        """Return the chunks of every text over ``max_source_tokens``, by its number.

        Args:
            texts: inputs without prefix.
            rows: their ids, from :meth:`encode`.
            task: "label" or "rationale".

        Raises:
            UsageError: prefix and marker leave too little of a chunk for the text.
        """
        found: dict[int, list[Chunk]] = {}
        for number, row in enumerate(rows):
            if self._chunks is None or len(row) <= self._limits["max_source_tokens"]:
                continue
            found[number] = self._chunks.chunks(texts[number], row, self._prefixes[task], f"Text {number}")
        return found

    def label_tokens(self, label: str) -> list[int]:
        """Return the ids of a label, end-of-sequence included.

        Raises:
            UsageError: the vocabulary has no token for it, or it is over the limit.
        """
        tokens = self._tokenizer.encode_target(label, self._eos)
        if len(tokens) < 2:
            raise UsageError(f"The label {label!r} has no token in this student's vocabulary.")
        limit = self._limits["max_label_tokens"]
        if len(tokens) > 1 + limit:
            raise UsageError(f"The label {label!r} has {len(tokens) - 1} tokens; the limit is {limit}.")
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ``tokens``, special ones left out."""
        return self._tokenizer.decode(tokens)
