"""The fast tokenizer of a student: the checkpoint's own, or one built from the training rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sbs_edge import files
from sbs_edge.data.builtin import NAME as BUILTIN
from sbs_edge.data.example import Example, TaskSpec
from sbs_edge.data.targets import label_for, rationale_for
from sbs_edge.data.tokenizer import build_tokenizer, byte_tokenizer
from sbs_edge.errors import UsageError
from sbs_edge.tokens import without_limits
from sbs_edge.training.config import TrainConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["checkpoint_tokenizer", "scratch_tokenizer", "write_tokenizer"]


def scratch_tokenizer(examples: Sequence[Example], task: TaskSpec, config: TrainConfig) -> Tokenizer:
    """Build a tokenizer from what the mode sees of the training rows, and the closed labels."""
    kind = config.tokenizer or ("word" if task.name == BUILTIN else "unigram")
    texts: list[str] = []
    for example in examples:
        targets = (label_for(example, config.mode), rationale_for(example, config.mode))
        texts += [example.input, *(target for target in targets if target), *(example.choices or ())]
    return build_tokenizer([*texts, *task.labels], config.prefix_pair, kind, config.vocabulary)


def checkpoint_tokenizer(name: str) -> Tokenizer:
    """Load the fast tokenizer of a checkpoint, without padding or truncation.

    Raises:
        UsageError: there is none that can be carried as ``tokenizer.json``.

    """
    from transformers import AutoTokenizer

    try:
        loaded: Any = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise UsageError(
            f"The tokenizer of {name!r} cannot be loaded: {str(error).splitlines()[0]} A student needs "
            "tokenizer.json beside its weights, or spiece.model and the sentencepiece package to make it."
        ) from error
    if type(loaded).__name__ == "ByT5Tokenizer":
        return byte_tokenizer()
    fast: Any = getattr(loaded, "backend_tokenizer", None)
    if fast is None:
        raise UsageError(f"The tokenizer of {name!r} ({type(loaded).__name__}) has no fast form.")
    tokenizer = without_limits(fast)
    _check_against_pieces(name, tokenizer)
    return tokenizer


# Ordinary text, which every true conversion reads alike; they differ legitimately at edges and runs of spaces.
SAMPLES = (
    "Where is my order?", "It costs 3.50, not $4!", "UPPER and lower", "don't; won't - (maybe) [yes]",
    "1234567890 and 10,000", "a/b_c@d.org", "Is this sentence read as the model was trained to read it?",
)  # fmt: skip


def _check_against_pieces(name: str, tokenizer: Tokenizer) -> None:
    """Refuse a ``tokenizer.json`` that reads texts otherwise than the ``spiece.model`` beside it.

    The model was trained with the SentencePiece file; versions of transformers have written others from it.

    Raises:
        UsageError: they differ on a sample.

    """
    pieces = Path(name) / "spiece.model"
    if not (pieces.is_file() and (Path(name) / "tokenizer.json").is_file()):
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
                f"The tokenizer.json of {name!r} reads {text!r} as {ours}, and the spiece.model beside it as "
                f"{theirs}. The model was trained with the latter: take tokenizer.json away, or save it again from "
                "spiece.model with another version of transformers."
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
