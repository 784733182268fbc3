"""Read SentencePiece's model file as a fast tokenizer, without sentencepiece and protobuf.

T5 v1.1, mT5 and UMT5 are published with only ``spiece.model``. Its format is a protocol buffer of a few fields
(sentencepiece_model.proto of google/sentencepiece); the tokenizers library has every part that it describes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbs_edge.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["SpieceModel", "read_spiece", "spiece_tokenizer"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
UNIGRAM = 1
SPACE = "▁"


@dataclass(frozen=True, slots=True)
class SpieceModel:
    """The parts of a SentencePiece model that decide how a text is tokenised.

    Attributes:
        pieces: each piece's text, score (log probability) and type, in the order of ids.
        algorithm: 1 for Unigram, 2 for BPE.
        unknown: id of the unknown piece.
        byte_fallback: whether unknown characters are spelled in byte pieces.
        charsmap: the compiled normalisation rules; empty: none.
        prefix: whether a space is put before the text.
        squeeze: whether spaces at both ends are removed and runs of them are merged.
    """

    pieces: tuple[tuple[str, float, int], ...]
    algorithm: int
    unknown: int
    byte_fallback: bool
    charsmap: bytes
    prefix: bool
    squeeze: bool


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at += 1
        if not byte & 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than ten bytes")


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of a message's fields; a value is an int, or bytes of the file."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        if kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of wire type {kind}")
        if at + size > len(data):
            raise ValueError("the file ends inside a field")
        yield key >> 3, data[at : at + size]
        at += size


def read_spiece(path: str | Path) -> SpieceModel:
    """Read a SentencePiece model file.

    Raises:
        DataError: it cannot be read, or is not one.
    """
    try:
        data = Path(path).read_bytes()
        pieces: list[tuple[str, float, int]] = []
        trainer: dict[int, Any] = {}
        normalizer: dict[int, Any] = {}
        for number, value in _fields(data):
            if number == 1:
                piece: dict[int, Any] = {1: b"", 2: b"\0\0\0\0", 3: NORMAL} | dict(_fields(value))
                pieces.append((piece[1].decode("utf-8"), struct.unpack("<f", piece[2])[0], piece[3]))
            elif number == 2:
                trainer.update(_fields(value))
            elif number == 3:
                normalizer.update(_fields(value))
        if not pieces:
            raise ValueError("no pieces in it")
    except (OSError, ValueError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise DataError(
            f"{path} is not a SentencePiece model that can be read ({error}). Copy it again from where the checkpoint "
            "was saved."
        ) from error
    # Defaults are those of sentencepiece_model.proto.
    return SpieceModel(
        tuple(pieces), trainer.get(3, UNIGRAM), trainer.get(40, 0), bool(trainer.get(35, 0)),
        bytes(normalizer.get(2, b"")), bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1)),
    )  # fmt: skip


def spiece_tokenizer(path: str | Path, extra: Sequence[str] = ()) -> Tokenizer:
    """Return the fast tokenizer of a Unigram SentencePiece model; ``</s>`` ends every text, as in T5.

    Args:
        path: the model file.
        extra: special tokens that follow the model's pieces, such as T5's ``<extra_id_99>`` to ``<extra_id_0>``.

    Raises:
        DataError: it is not a Unigram model, or has no end-of-sequence piece.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )

    model = read_spiece(path)
    ids = {piece: index for index, (piece, _, _) in enumerate(model.pieces)}
    if model.algorithm != UNIGRAM or "</s>" not in ids:
        raise DataError(
            f"{path} is not a Unigram model with an end-of-sequence piece </s>, as the T5 family's are. Save the "
            "checkpoint's fast tokenizer as tokenizer.json beside it."
        )
    scored = [(piece, score) for piece, score, _ in model.pieces]
    tokenizer = Tokenizer(models.Unigram(scored, model.unknown, model.byte_fallback))
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.squeeze:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    scheme = "always" if model.prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme)
    spelled = decoders.Metaspace(replacement=SPACE, prepend_scheme=scheme)
    tokenizer.decoder = (
        decoders.Sequence([decoders.ByteFallback(), spelled]) if model.byte_fallback else spelled
    )
    tokenizer.add_special_tokens(
        [AddedToken(piece, normalized=False) for piece, _, kind in model.pieces if kind in (UNKNOWN, CONTROL)]
    )
    tokenizer.add_tokens(
        [AddedToken(piece, normalized=False) for piece, _, kind in model.pieces if kind == USER_DEFINED]
    )
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False) for piece in extra])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", ids["</s>"])]
    )
    return tokenizer
