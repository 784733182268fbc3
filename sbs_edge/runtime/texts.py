"""Text to token ids and back, with a bundle's tokenizer, prefixes and limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set

from sbs_edge.errors import UsageError

__all__ = ["Texts", "check_texts"]


def check_texts(texts: object) -> list[str]:
    """Return the strings of any iterable, gone through once.

    Raises:
        UsageError: it is a single string or not an iterable of strings, or a string cannot be encoded as UTF-8
            (a lone surrogate); the message names the row.
    """
    if isinstance(texts, str | bytes | Mapping | Set) or getattr(texts, "ndim", 1) != 1:
        raise UsageError(
            f"The texts must be a list of strings, not a {type(texts).__name__}; put a single text into a list: [text]."
        )
    try:
        found: list[str] = list(texts)  # type: ignore[call-overload]
    except TypeError as error:
        raise UsageError(f"The texts must be a list of strings, not a {type(texts).__name__}.") from error
    for row, text in enumerate(found):
        if not isinstance(text, str):
            raise UsageError(f"Text {row} is a {type(text).__name__}, not a string.")
        if not text.isascii():
            try:
                text.encode("utf-8")
            except UnicodeEncodeError as error:
                raise UsageError(
                    f"Text {row} is not valid Unicode: it has half of a surrogate pair at character {error.start}. "
                    "Decode the input with its own encoding."
                ) from error
    return found


class Texts:
    """The tokenizer of a bundle; safe to share between threads."""

    def __init__(
        self, tokenizer: bytes, prefixes: Mapping[str, str], limits: Mapping[str, int], eos_token_id: int
    ) -> None:
        """Read the tokenizer.

        Args:
            tokenizer: content of ``tokenizer.json``.
            prefixes: task -> what stands before every input of it.
            limits: ``max_source_tokens`` and ``max_label_tokens``.
            eos_token_id: the id that ends a sequence.
        """
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_buffer(tokenizer)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._prefixes, self._limits, self._eos = prefixes, limits, eos_token_id

    def tokenize(self, texts: Sequence[str], task: str) -> list[list[int]]:
        """Return every text's ids for ``task``, uncut: prefix and end-of-sequence included."""
        prefix = self._prefixes[task]
        return [encoding.ids for encoding in self._tokenizer.encode_batch([prefix + t for t in texts])]

    def encode(
        self, texts: Sequence[str], task: str, truncate: bool, tokens: Sequence[Sequence[int]] | None = None
    ) -> tuple[list[list[int]], list[bool]]:
        """Return the ids of every text within the limit, and whether it was cut.

        Args:
            texts: inputs without prefix.
            task: "label" or "rationale".
            truncate: cut what is over the limit, instead of refusing it.
            tokens: what :meth:`tokenize` gave for these texts.

        Raises:
            UsageError: a text is over the limit.
        """
        limit = self._limits["max_source_tokens"]
        if tokens is None:
            tokens = self.tokenize(texts, task)
        elif len(tokens) != len(texts):
            raise UsageError(f"{len(texts)} text(s) came with {len(tokens)} list(s) of tokens.")
        rows: list[list[int]] = []
        cut: list[bool] = []
        for row, ids in enumerate(tokens):
            too_long = len(ids) > limit
            if too_long and not truncate:
                raise UsageError(
                    f"Text {row} has {len(ids)} tokens with its prefix; this bundle's limit is {limit}. "
                    "Shorten it, or allow cutting with truncate=True (--truncate)."
                )
            rows.append([*ids[: limit - 1], self._eos] if too_long else list(ids))
            cut.append(too_long)
        return rows, cut

    def label_tokens(self, label: str) -> list[int]:
        """Return the ids of a label, end-of-sequence included.

        Raises:
            UsageError: the vocabulary has no token of it, or it is over the limit.
        """
        tokens: list[int] = self._tokenizer.encode(label).ids
        if len(tokens) < 2:
            raise UsageError(f"The label {label!r} has no token of this student's vocabulary.")
        limit = self._limits["max_label_tokens"]
        if len(tokens) > 1 + limit:
            raise UsageError(f"The label {label!r} has {len(tokens) - 1} tokens; the limit is {limit}.")
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ``tokens``, special ones left out."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()
