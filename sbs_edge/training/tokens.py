"""The fast tokenizer of a student: the checkpoint's own, or one built from the training rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbs_edge import files
from sbs_edge.data.builtin import NAME as BUILTIN
from sbs_edge.data.example import Example, TaskSpec
from sbs_edge.data.shift_log import LATEST_NAME
from sbs_edge.data.shift_log import NAME as SHIFT_LOG
from sbs_edge.data.spiece import spiece_tokenizer
from sbs_edge.data.targets import label_for, rationales_for
from sbs_edge.data.tokenizer import build_tokenizer, byte_tokenizer, load_tokenizer
from sbs_edge.errors import DataError, UsageError
from sbs_edge.tokens import without_limits
from sbs_edge.training.config import TrainConfig
from sbs_edge.windows import MARKER

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["checkpoint_tokenizer", "scratch_tokenizer", "write_tokenizer"]

MARKED_PARTS = 99
"""Numbers of chunks that a word tokenizer from scratch can spell."""


def scratch_tokenizer(examples: Sequence[Example], task: TaskSpec, config: TrainConfig) -> Tokenizer:
    """Build a tokenizer from the texts of the training rows that the mode uses, and the closed labels."""
    kind = config.tokenizer or ("word" if task.name in (BUILTIN, SHIFT_LOG, LATEST_NAME) else "unigram")
    texts: list[str] = []
    for example in examples:
        targets = (label_for(example, config.mode), *rationales_for(example, config.mode))
        texts += [example.input, *(target for target in targets if target), *(example.choices or ())]
    if config.long != "off" and config.chunk_marker:
        texts += [MARKER.format(part, MARKED_PARTS) for part in range(1, MARKED_PARTS + 1)]
    return build_tokenizer([*texts, *task.labels], config.prefix_pair, kind, config.vocabulary)


def checkpoint_tokenizer(folder: Path, family: str = "t5") -> Tokenizer:
    """Load the fast tokenizer of the checkpoint in ``folder``, without padding or truncation.

    It is read from the first of these that exists, in the same way under every version of transformers:
    ``tokenizer.json``, ByT5's few rules, a SentencePiece model, any other form that transformers can convert.

    Args:
        folder: the checkpoint's directory.
        family: its model type, which says how many ``<extra_id_N>`` follow T5's pieces.

    Raises:
        UsageError: there is none that can be written as ``tokenizer.json``.
        DataError: its file is damaged.

    """
    if (folder / "tokenizer.json").is_file():
        fast = load_tokenizer(folder)
        _check_against_pieces(folder, without_limits(fast))
    else:
        settings = _settings(folder / "tokenizer_config.json")
        named = settings.get("tokenizer_class") or _settings(folder / "config.json").get("tokenizer_class")
        if named == "ByT5Tokenizer":
            size = _settings(folder / "config.json").get("vocab_size") or 384
            return byte_tokenizer(
                max(0, min(125, size - 259))
            )  # a small embedding has no rows for all the extra ids
        spiece = folder / "spiece.model"
        if spiece.is_file():
            fast = spiece_tokenizer(spiece, _extra_ids(settings, family))
            _add_later(fast, folder / "added_tokens.json")
        else:
            fast = _converted(folder)
    return without_limits(fast)


def _settings(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON file; empty if there is no file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read: {error}. Copy it again from where the checkpoint was saved."
        ) from error
    return content if isinstance(content, dict) else {}


def _extra_ids(settings: dict[str, Any], family: str) -> list[str]:
    """Return T5's sentinel tokens in the order of their ids, the highest number first."""
    count = settings.get("extra_ids")
    if not isinstance(count, int):
        named = [str(token) for token in settings.get("additional_special_tokens") or ()]
        count = sum(token.startswith("<extra_id_") for token in named) or (100 if family == "t5" else 0)
    return [f"<extra_id_{number}>" for number in range(count - 1, -1, -1)]


def _add_later(tokenizer: Tokenizer, path: Path) -> None:
    """Add the tokens that were added to a slow tokenizer, each under its own id."""
    later = _settings(path)
    for token, index in sorted(later.items(), key=lambda item: int(item[1])):
        known = tokenizer.token_to_id(token)
        if known is None:
            tokenizer.add_tokens([token])
            known = tokenizer.token_to_id(token)
        if known != index:
            raise DataError(
                f"{path} gives the token {token!r} the number {index}, but beside spiece.model it would get {known}. Save "
                "the checkpoint's fast tokenizer as tokenizer.json there."
            )


def _converted(folder: Path) -> Tokenizer:
    """Let transformers convert a tokenizer of another kind."""
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # its converters raise what the formats' libraries raise
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise UsageError(
            f"The tokenizer in {folder} cannot be loaded ({type(error).__name__}: {reason}). A student needs the "
            "checkpoint's tokenizer.json or its spiece.model beside the weights; copy one of them there."
        ) from error
    fast: Any = getattr(loaded, "backend_tokenizer", None)
    if fast is None:
        raise UsageError(
            f"The tokenizer in {folder} ({type(loaded).__name__}) has no fast form, so a bundle cannot contain it. Use a "
            "checkpoint with a tokenizer.json."
        )
    return fast


# Ordinary text, which every correct conversion reads alike; they may differ at edges and in runs of spaces.
SAMPLES = (
    "Where is my order?", "It costs 3.50, not $4!", "UPPER and lower", "don't; won't - (maybe) [yes]",
    "1234567890 and 10,000", "a/b_c@d.org", "Is this sentence read as the model was trained to read it?",
)  # fmt: skip


def _check_against_pieces(folder: Path, tokenizer: Tokenizer) -> None:
    """Refuse a ``tokenizer.json`` that reads texts differently from the ``spiece.model`` beside it.

    The model was trained with the SentencePiece file, and some versions of transformers converted it differently.

    Raises:
        UsageError: they differ on a sample.

    """
    pieces = folder / "spiece.model"
    if not pieces.is_file():
        return
    try:
        import sentencepiece
    except ImportError:
        return
    judge = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    for text in SAMPLES:
        ours, theirs = tokenizer.encode(text, add_special_tokens=False).ids, judge.encode(text)
        if ours != theirs:
            raise UsageError(
                f"The tokenizer.json in {folder} reads {text!r} as {ours}, and the spiece.model beside it as "
                f"{theirs}. The model was trained with the latter: remove tokenizer.json, and spiece.model is read."
            )


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, pad_id: int, eos_id: int) -> None:
    """Write ``tokenizer.json`` and the small file with which transformers loads it."""
    files.write_text(
        folder / "tokenizer.json", json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False)
    )
    names = {"pad_token": tokenizer.id_to_token(pad_id), "eos_token": tokenizer.id_to_token(eos_id)}
    if tokenizer.token_to_id("<unk>") is not None:
        names["unk_token"] = "<unk>"
    files.write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names},
    )
