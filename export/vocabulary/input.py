"""Choose the tokens that a student needs to read: those of its texts, tokens that spell other texts, and a margin.

The embedding is a quarter of a small label bundle, and most of its rows are never used.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sbs_edge.data.example import Example
from sbs_edge.errors import UsageError
from sbs_edge.export.graphs.weights import T5Weights
from sbs_edge.export.vocabulary.output import MULTIPLE
from sbs_edge.export.vocabulary.tokenizer import shrink_tokenizer, vocabulary_of
from sbs_edge.tokens import TextTokenizer
from sbs_edge.training.student_dir import StudentDir

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["SmallVocabulary", "copy_tokenizer_and_config", "small_vocabulary"]

MARGIN = 8192  # or a quarter of the vocabulary, if that is less; filled up with the most frequent tokens
COMPANIONS = ("tokenizer.json", "config.json", "generation_config.json")
_IDS = ("pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id", "unk_token_id")


@dataclass(frozen=True, slots=True)
class SmallVocabulary:
    """A smaller vocabulary, and its mapping of ids.

    Attributes:
        kept: (n,) int64, the old id of every new one.
        saved: content of the new ``tokenizer.json``.
        figures: its entry in the manifest.
    """

    kept: np.ndarray
    saved: dict[str, Any]
    figures: dict[str, Any]

    def tokenizer(self) -> Tokenizer:
        """Return the smaller tokenizer."""
        return _loaded(self.saved)

    def moved(self, ids: np.ndarray) -> np.ndarray:
        """Return the new ids of old ones, all of them kept."""
        return np.searchsorted(self.kept, ids).astype(np.int64)

    def weights(self, weights: T5Weights) -> T5Weights:
        """Return the checkpoint with the rows of the kept tokens alone."""
        table = np.ascontiguousarray(weights.embedding[self.kept])
        head = table if weights.tied else np.ascontiguousarray(weights.head[self.kept])
        arrays = {
            name: table
            if name == "shared.weight" or name.endswith("embed_tokens.weight")
            else head
            if name == "lm_head.weight"
            else array
            for name, array in weights.arrays.items()
        }
        start, eos, pad = self.moved(np.array([weights.start_id, weights.eos_id, weights.pad_id])).tolist()
        return dataclasses.replace(
            weights, arrays=arrays, head=head, vocab_size=len(table), start_id=start, eos_id=eos, pad_id=pad
        )

    def config(self, content: dict[str, Any]) -> dict[str, Any]:
        """Return ``config.json`` or ``generation_config.json`` with the new size and ids."""
        place = {int(old): new for new, old in enumerate(self.kept)}
        found = dict(content)
        if "vocab_size" in found:
            found["vocab_size"] = len(place)
        for name in _IDS:
            value = found.get(name)
            if isinstance(value, list):
                found[name] = [place.get(item, item) for item in value]
            elif isinstance(value, int):
                found[name] = place.get(value, value)
        return found


def small_vocabulary(
    opened: StudentDir, rows: Sequence[Example], weights: T5Weights, also: Iterable[int] = ()
) -> SmallVocabulary:
    """Choose the tokens to keep and make the smaller tokenizer.

    Kept: every token of an input (with its prefix), label, choice or rationale of ``rows``, of the student's
    training sample and of its validation rows; what it takes to spell any text (see
    :func:`sbs_edge.export.vocabulary.tokenizer.always_kept`); the student's special tokens; then the vocabulary's
    first, most frequent tokens: up to a quarter more than those of the rows, or up to ``MARGIN``
    (a quarter of a small vocabulary) where that is more.

    Args:
        opened: the student.
        rows: more rows, e.g. those of the accuracy check.
        weights: the checkpoint.
        also: token ids that must stay.

    Raises:
        UsageError: there is no row to learn from, or the tokenizer is of an unknown kind.
    """
    training, validation = opened.calibration(), opened.validation()
    if not (training or validation or rows):
        raise UsageError(
            "Pruning the vocabulary needs rows that show which tokens are read, but this student has none stored. Pass "
            "labelled rows as guard_data, or leave out prune_input_vocabulary."
        )
    saved = json.loads((opened.companion("tokenizer.json")).read_text(encoding="utf-8"))
    whole = _loaded(saved)
    texts = TextTokenizer(whole)
    size = min(len(vocabulary_of(saved)), weights.vocab_size)
    own = {weights.start_id, weights.eos_id, weights.pad_id, *also}

    def smaller(seen: Sequence[Example]) -> tuple[dict[str, Any], list[int]]:
        kept = own | {index for ids in _ids(opened, seen, texts) for index in ids}
        wanted = max(-(-len(kept) * 5 // 4), min(size // 4, MARGIN))
        wanted = min(size, -(-wanted // MULTIPLE) * MULTIPLE)
        more = (index for index in range(size) if index not in kept)
        return shrink_tokenizer(
            saved, kept | {index for index, _ in zip(more, range(wanted - len(kept)), strict=False)}
        )

    found, kept = smaller([*training, *validation, *rows])
    if kept[-1] >= weights.vocab_size:
        raise UsageError(
            f"The tokenizer has tokens beyond the checkpoint's {weights.vocab_size} rows; leave "
            "out prune_input_vocabulary."
        )
    judged = [opened.prefixes["label"] + row.input for row in validation or rows]
    figures: dict[str, Any] = {
        "tokens": len(kept),
        "tokens_of_the_student": weights.vocab_size,
        "texts_seen": len({row.input for row in (*training, *validation, *rows)}),
        "validation_tokens": sum(len(whole.encode(text).ids) for text in judged),
        "validation_tokens_unchanged": _unchanged(judged, whole, _loaded(found)),
        # The same, had the validation rows not been seen: what to expect of new texts.
        "unseen_tokens_unchanged": _unchanged(judged, whole, _loaded(smaller(training)[0]))
        if training
        else None,
    }
    return SmallVocabulary(np.array(kept, np.int64), found, figures)


def _ids(opened: StudentDir, rows: Sequence[Example], texts: TextTokenizer) -> Iterable[list[int]]:
    for label in opened.task.labels:
        yield texts.encode(label)
    for prefix in opened.prefixes.values():
        yield texts.encode("", prefix)
        yield from texts.encode_batch([row.input for row in rows], prefix)
    for row in rows:
        for text in (row.label, row.teacher_label, row.rationale, *row.rationales, *(row.choices or ())):
            if text:
                yield texts.encode(text)


def _loaded(saved: dict[str, Any]) -> Tokenizer:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(saved, ensure_ascii=False))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _unchanged(texts: Sequence[str], whole: Tokenizer, small: Tokenizer) -> float | None:
    """Return the share of the whole tokenizer's tokens that the small one finds at the same place."""
    same = total = 0
    for text in texts:
        first, second = whole.encode(text), small.encode(text)
        places = set(zip(second.tokens, second.offsets, strict=True))
        same += sum(pair in places for pair in zip(first.tokens, first.offsets, strict=True))
        total += len(first.tokens)
    return same / total if total else None


def copy_tokenizer_and_config(opened: StudentDir, small: SmallVocabulary | None, folder: Path) -> None:
    """Write the tokenizer and the student's configuration beside the graphs, in the exported vocabulary."""
    for name in COMPANIONS:
        source = opened.companion(name)
        if not source.is_file():
            continue
        if small is None:
            shutil.copyfile(source, folder / name)
            continue
        content = (
            small.saved if name == "tokenizer.json" else small.config(json.loads(source.read_text("utf-8")))
        )
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
