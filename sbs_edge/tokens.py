"""Turn text into token ids, with the same rules in training, export and at run time. Imports no torch."""

from __future__ import annotations

import json
import re
import string
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "TextTokenizer",
    "first_tokens",
    "most_characters",
    "read_tokenizer",
    "read_whole",
    "start_token_id",
    "text_fault",
    "unicode_fault",
    "within_limit",
    "without_limits",
]

_PRINTABLE = frozenset(filter(str.isprintable, map(chr, range(128))))
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Normalizers that treat the text before and after a space between two ASCII letters or digits independently.
_LOCAL_NORMALIZERS = frozenset(
    ("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Lowercase", "StripAccents", "Strip")
)
_LOCAL_PATTERNS = (r"\s+", " {2,}", " +", r"[\s]+")  # of the normalizer Replace


def read_tokenizer(path: Path) -> Tokenizer:
    """Return the tokenizer in the file ``path``, with truncation and padding switched off.

    Raises:
        Exception: the file is not a tokenizer; the library raises no narrower class.
    """
    from tokenizers import Tokenizer

    return without_limits(Tokenizer.from_file(str(path)))


def without_limits(tokenizer: Tokenizer) -> Tokenizer:
    """Switch off a tokenizer's own truncation and padding, and return it."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def within_limit(ids: Sequence[int], limit: int, eos_id: int) -> list[int]:
    """Return ``ids``, cut to ``limit`` if there are more; a cut list still ends with end-of-sequence."""
    return list(ids) if len(ids) <= limit else [*ids[: limit - 1], eos_id]


def most_characters(limit: int) -> int:
    """Return how many characters of a text are read for ``limit`` tokens; a longer text counts as over the limit.

    The longest piece of T5's vocabulary has 16 characters, so ordinary text reaches the token limit long before.
    """
    return max(64 * limit, 16384)


def read_whole(limit: int) -> int:
    """Return up to how many characters a text is read whole for ``limit`` tokens; of a longer one maybe less is read."""
    return max(4 * limit, 1024)


def first_tokens(label_ids: Sequence[Sequence[int]]) -> list[int] | None:
    """Return the first token of each label if they all differ, so that one decoder step decides; otherwise None."""
    heads = [ids[0] for ids in label_ids]
    return heads if len(set(heads)) == len(heads) else None


def start_token_id(config: Any) -> int:
    """Return the token that decoding starts with: the config's, or else padding, as in T5.

    Args:
        config: a transformers config, or the content of ``config.json``.
    """
    read = config.get if isinstance(config, Mapping) else lambda name: getattr(config, name, None)
    for name in ("decoder_start_token_id", "pad_token_id"):
        found = read(name)
        if found is not None:
            return int(found)
    return 0


class TextTokenizer:
    """A tokenizer that never reads a user's text as control tokens.

    Control tokens are the special added tokens (``</s>``, ``<pad>``, ``<extra_id_0>``, a student's own
    ``[label]``) and the tokens that the template adds. The tokenizers library finds them in any text. Here only a
    prefix may contain them; in a text the same characters are spelled like others. Ids of other texts are
    exactly the library's.

    It is safe to share between threads.

    Attributes:
        tokenizer: the library's tokenizer.
        control: ids that no text can produce.
        unknown_id: the token for characters that the vocabulary cannot spell, or None.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Wrap ``tokenizer`` and switch its truncation and padding off."""
        self.tokenizer = without_limits(tokenizer)
        probe = tokenizer.encode("a")
        mask = probe.special_tokens_mask
        n_before = mask.index(0) if 0 in mask else 0
        n_after = mask[::-1].index(0) if 0 in mask else len(mask)
        self._before = probe.ids[:n_before]
        self._after = probe.ids[len(mask) - n_after :]
        self._added = tokenizer.get_added_tokens_decoder()
        special = {index for index, token in self._added.items() if token.special}
        self.unknown_id = self._find_unknown()
        self.control = frozenset({*special, *self._before, *self._after} - {self.unknown_id})
        self._heads: dict[str, tuple[list[int], str]] = {}

    def _find_unknown(self) -> int | None:
        named = getattr(self.tokenizer.model, "unk_token", None)  # the library does not expose Unigram's
        ids = (self.tokenizer.token_to_id(name) for name in (named, "<unk>", "[UNK]") if name)
        return next((index for index in ids if index is not None), None)

    @classmethod
    def of(cls, tokenizer: Tokenizer | TextTokenizer) -> TextTokenizer:
        """Return ``tokenizer``, wrapped if it is the library's."""
        return tokenizer if isinstance(tokenizer, cls) else cls(tokenizer)

    # -- encoding -------------------------------------------------------------------------------------

    def encode(self, text: str, prefix: str = "") -> list[int]:
        """Return the ids of ``prefix`` and ``text``, with the tokens that the template adds."""
        (ids,) = self.encode_batch([text], prefix)  # unlike the library's encode(), it lets other threads run
        return ids

    def encode_batch(self, texts: Sequence[str], prefix: str = "") -> list[list[int]]:
        """Return :meth:`encode` of every text."""
        found = self.tokenizer.encode_batch([prefix + text for text in texts])
        return [self._checked(one.ids, text, prefix) for one, text in zip(found, texts, strict=True)]

    def encode_beginnings(self, texts: Sequence[str], limit: int, prefix: str = "") -> list[list[int]]:
        """Return :meth:`encode` of each text, but of a text over ``limit`` tokens only a beginning.

        The beginning has more than ``limit`` ids, of which the first ``limit`` are those of the whole text. A text
        longer than :func:`most_characters` is cut there, however few tokens that gives. So the cost does not grow
        with the text.
        """
        short = read_whole(limit)
        if all(len(text) <= short for text in texts):
            return self.encode_batch(texts, prefix)
        return [self._beginning(text, limit, (short, 2 * short), prefix) for text in texts]

    def encode_within(self, text: str, limit: int, eos_id: int, prefix: str = "") -> tuple[list[int], bool]:
        """Return at most ``limit`` ids of prefix and text, ending with end-of-sequence, and whether the text was cut."""
        (ids,) = self.encode_beginnings([text], limit, prefix)
        return within_limit(ids, limit, eos_id), len(ids) > limit or len(text) > most_characters(limit)

    def encode_target(self, text: str, eos_id: int) -> list[int]:
        """Return the ids of a target text: :meth:`encode`, always ending with end-of-sequence."""
        ids = self.encode(text)
        return ids if ids[-1:] == [eos_id] else [*ids, eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` without special tokens and surrounding spaces."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def respelled(self, text: str) -> str:
        """Return ``text`` after encoding and decoding: the form in which a student can write it."""
        return self.decode(self.encode(text))

    # -- long texts -----------------------------------------------------------------------------------

    def _beginning(self, text: str, limit: int, lengths: Sequence[int], prefix: str) -> list[int]:
        for length in lengths:  # the first is enough where a token has few characters
            if len(text) > length and (place := self._boundary(text, length)):
                ids = self.encode(text[:place], prefix)
                if len(ids) > limit:
                    return ids
        most = most_characters(limit)
        if len(text) > most:
            text = text[: self._boundary(text, most) or most]
        return self.encode(text, prefix)

    def _boundary(self, text: str, most: int) -> int:
        """Return a position up to ``most`` where a cut does not change the ids before it; 0 if none is certain.

        That is a single space between two ASCII letters or digits, if the tokenizer splits at spaces: normalisation
        does not reach across it, and each word is tokenised by itself.
        """
        if not self._splits_at_spaces:
            return 0
        place = most
        while (place := text.rfind(" ", most // 2, place)) > 0:
            around = text[place - 1] + text[place + 1 : place + 2]
            if len(around) == 2 and around.isascii() and around.isalnum():
                return place
        return 0

    @cached_property
    def _normalizes_locally(self) -> bool:
        return all(
            part["type"] in _LOCAL_NORMALIZERS
            or (part["type"] == "Replace" and part["pattern"].get("Regex") in _LOCAL_PATTERNS)
            for part in _parts(self.tokenizer.normalizer, "normalizers")
        )

    @cached_property
    def _splits_at_spaces(self) -> bool:
        splitters = _parts(self.tokenizer.pre_tokenizer, "pretokenizers")
        first = splitters[0] if splitters else {"type": None}
        splits = first["type"] in ("WhitespaceSplit", "Whitespace") or (
            first["type"] == "Metaspace" and first.get("split", True) is not False
        )
        return (
            self._normalizes_locally
            and splits
            and not any(" " in token.content for token in self._added.values())
        )

    # -- control tokens -------------------------------------------------------------------------------

    def _checked(self, ids: list[int], text: str, prefix: str) -> list[int]:
        """Return the library's ``ids``, or encode again by spelling if it found a control token in the text."""
        head = self._heads.get(prefix) or self._head(prefix)
        body = ids[len(head[0]) : len(ids) - len(self._after)]
        if self.control.isdisjoint(body) and (self._fallbacks.isdisjoint(body) or not self._names(text)):
            return ids
        return self._spelled(text, prefix)

    def _head(self, prefix: str) -> tuple[list[int], str]:
        """Return the ids of a prefix's control tokens, with the template's, and the rest of the prefix."""
        if prefix not in self._heads:
            body = self.tokenizer.encode(prefix, add_special_tokens=False)
            n = max((place + 1 for place, index in enumerate(body.ids) if index in self.control), default=0)
            rest = prefix[body.offsets[n - 1][1] :] if n else prefix
            self._heads[prefix] = ([*self._before, *body.ids[:n]], rest)
        return self._heads[prefix]

    def _spelled(self, text: str, prefix: str) -> list[int]:
        head, rest = self._head(prefix)
        body = self._speller.encode(rest + text, add_special_tokens=False).ids
        unknown = [] if self.unknown_id is None else [self.unknown_id]
        safe: list[int] = []
        for index in body:  # a control token of one character cannot be split
            safe += unknown if index in self.control else [index]
        return [*head, *safe, *self._after]

    @cached_property
    def _byte_pieces(self) -> dict[str, int]:
        if not getattr(self.tokenizer.model, "byte_fallback", False):
            return {}
        return {piece: index for piece, index in self.tokenizer.get_vocab().items() if _BYTE.fullmatch(piece)}

    @cached_property
    def _fallbacks(self) -> frozenset[int]:
        """Return ids that a text may produce, but not by containing their names: the unknown token and single bytes."""
        unknown = () if self.unknown_id is None else (self.unknown_id,)
        return frozenset((*unknown, *self._byte_pieces.values()))

    @cached_property
    def _reserved(self) -> list[str]:
        """Return the names of control tokens, the unknown token and bytes, as they would appear in a text."""
        ids = self.control if self.unknown_id is None else {*self.control, self.unknown_id}
        names = {self.tokenizer.id_to_token(index) for index in ids} | {*self._byte_pieces}
        return sorted(name for name in names if name)

    @cached_property
    def _fallback_names(self) -> re.Pattern[str]:
        names = [*self._byte_pieces]
        if self.unknown_id is not None:
            names.append(self.tokenizer.id_to_token(self.unknown_id))
        return re.compile("|".join(map(re.escape, names)))

    @cached_property
    def _fallback_marks(self) -> frozenset[str]:
        """Return characters of which every fallback's name has one, and that no other printable ASCII becomes.

        They are punctuation, such as the ``<`` of ``<unk>``. Where a name has none, or a normalizer may write one, no
        text is without them.
        """
        names = [*self._byte_pieces]
        if self.unknown_id is not None:
            names.append(str(self.tokenizer.id_to_token(self.unknown_id)))
        marks = frozenset(name[0] for name in names)
        return marks if self._normalizes_locally and marks <= frozenset(string.punctuation) else _PRINTABLE

    def _names(self, text: str) -> bool:
        """Return whether ``text`` contains the name of the unknown token or of a byte, normalised or not."""
        if self._fallback_marks.isdisjoint(text) and text.isascii() and text.isprintable():
            return False
        if self._fallback_names.search(text):
            return True
        normalizer = self.tokenizer.normalizer
        return bool(normalizer and self._fallback_names.search(normalizer.normalize_str(text)))

    @cached_property
    def _speller(self) -> Tokenizer:
        """Return a tokenizer that splits the names of control tokens, so that no vocabulary entry matches them.

        It is not enough to switch off the library's search for special tokens: T5's vocabulary contains ``</s>``.
        """
        from tokenizers import Regex, Tokenizer, pre_tokenizers

        speller = Tokenizer.from_str(self.tokenizer.to_str())
        speller.encode_special_tokens = True
        cuts = [f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in self._reserved if len(name) > 1]
        if cuts:
            split = pre_tokenizers.Split(Regex("|".join(cuts)), "merged_with_previous")
            old = speller.pre_tokenizer
            speller.pre_tokenizer = split if old is None else pre_tokenizers.Sequence([old, split])
        return speller


def _parts(component: Any, name: str) -> list[dict[str, Any]]:
    """Return the content of a normalizer or pre-tokenizer as a flat list."""
    if component is None:
        return []

    def flat(content: dict[str, Any]) -> Iterable[dict[str, Any]]:
        if content["type"] != "Sequence":
            return [content]
        return [part for item in content[name] for part in flat(item)]

    return list(flat(json.loads(component.__getstate__())))


def text_fault(text: object) -> str | None:
    """Return why ``text`` cannot be answered, as the end of a sentence about it, or None.

    A text must be valid Unicode and contain something to read: with only white space, control and format
    characters, the answer would come from the prefix.
    """
    if not isinstance(text, str):
        return f"is a {type(text).__name__}, not a string"
    if not text[:1].isalnum() and not any(
        not c.isspace() and unicodedata.category(c) not in ("Cc", "Cf") for c in text
    ):
        return "is empty or blank"
    return unicode_fault(text)


def unicode_fault(text: str) -> str | None:
    """Return why ``text`` cannot be encoded, as the end of a sentence about it, or None."""
    if text.isascii():
        return None
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        return f"is not valid Unicode: character {error.start + 1} is {half}, half of a pair"
    return None
