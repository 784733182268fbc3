"""Tokenizers built at run time from the training texts, for students trained from scratch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sbs_edge.errors import DataError, UsageError
from sbs_edge.tokens import read_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = [
    "EOS_ID",
    "PAD_ID",
    "SPECIAL",
    "UNK_ID",
    "build_tokenizer",
    "byte_tokenizer",
    "check_covered",
    "load_tokenizer",
]

PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
SPECIAL = ("<pad>", "</s>", "<unk>")


def build_tokenizer(
    texts: Iterable[str],
    prefixes: Sequence[str] = (),
    kind: Literal["word", "unigram"] = "word",
    vocab_size: int = 4000,
) -> Tokenizer:
    """Build a tokenizer like T5's: pad 0, end-of-sequence 1 appended to every text, unknown 2.

    Args:
        texts: inputs, labels and rationales of the training rows.
        prefixes: task prefixes; each becomes one token.
        kind: ``word`` keeps whole lower-cased words, digits and signs (for small closed vocabularies);
            ``unigram`` learns sub-words and can spell any text whose characters it has.
        vocab_size: upper bound for ``unigram``.
    """
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    marks = [prefix.strip() for prefix in prefixes if prefix.strip()]
    if kind == "word":
        # White space in the inputs stands between every pair of tokens, so decoding may join by it.
        tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.WhitespaceSplit(),
                pre_tokenizers.Split(Regex(r"\d+|\p{L}+|[^\p{L}\d\s]"), "isolated"),
            ]
        )
        trainer = trainers.WordLevelTrainer(special_tokens=[*SPECIAL, *marks], show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")]
        )
        # Spaces become marks before digits are cut apart, so that decoding puts "10" together again.
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Metaspace(), pre_tokenizers.Digits(individual_digits=True)]
        )
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=vocab_size, special_tokens=[*SPECIAL, *marks], unk_token="<unk>", show_progress=False
        )
    tokenizer.train_from_iterator(texts, trainer)
    if kind == "unigram":
        tokenizer.model = _in_fixed_order(tokenizer, len(SPECIAL) + len(marks))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", EOS_ID)]
    )
    return tokenizer


def byte_tokenizer(n_extra: int = 125) -> Tokenizer:
    """Return ByT5's tokenizer as a fast one: byte ``b`` is token ``b + 3``, then ``</s>``.

    transformers has ByT5's tokenizer only in Python, which a bundle cannot contain.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    # The byte-level alphabet maps each byte to a printable character; its order is that of bytes.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = {byte: chr(byte) for byte in printable}
    for offset, byte in enumerate(byte for byte in range(256) if byte not in characters):
        characters[byte] = chr(256 + offset)
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, **{characters[b]: b + 3 for b in range(256)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(text, special=True) for text in ("<pad>", "</s>", "<unk>")]
        + [AddedToken(f"<extra_id_{index}>", special=True) for index in range(n_extra)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return tokenizer


def _in_fixed_order(tokenizer: Tokenizer, n_special: int) -> Any:
    """Return the learnt Unigram model with its pieces in an order that is the same in every run.

    The trainer appends the characters that no learnt piece covers in the order of a hash table, each
    0.0001 below the last, and its sums differ in the last bits. Here those characters get the same score, the
    other scores are rounded to six decimals, and pieces of equal score are sorted by their text.
    """
    from tokenizers import models

    pieces = json.loads(tokenizer.to_str())["model"]["vocab"]
    special, learnt = pieces[:n_special], pieces[n_special:]
    lowest = min((score for _, score in learnt), default=0.0)
    band = lowest + 0.0001 * sum(len(piece) == 1 for piece, _ in learnt) + 1e-6
    scored = [
        (piece, round(lowest if len(piece) == 1 and score < band else score, 6)) for piece, score in learnt
    ]
    ordered = sorted(scored, key=lambda item: (-item[1], item[0]))
    return models.Unigram([*map(tuple, special), *ordered], UNK_ID, False)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load ``tokenizer.json`` from ``folder``, with its truncation and padding switched off.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise DataError(
            f"{path} does not exist. Save the checkpoint's fast tokenizer there "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...)) and try again."
        )
    try:
        return read_tokenizer(path)
    except Exception as error:  # the library raises no narrower class
        raise DataError(
            f"{path} is not a tokenizer ({error}). Copy it again from where the checkpoint was saved, or train again."
        ) from error


def check_covered(tokenizer: Tokenizer, n_embeddings: int, where: object) -> None:
    """Raise :class:`UsageError` if the tokenizer gives ids for which the model's embedding has no row."""
    token, largest = max(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    if largest >= n_embeddings:
        raise UsageError(
            f"The tokenizer of {where} gives the token {token!r} the number {largest}, but the model's embedding has only "
            f"{n_embeddings} rows: they do not belong together. Put the checkpoint's own tokenizer.json beside it, or "
            "enlarge the model with resize_token_embeddings and train it."
        )
