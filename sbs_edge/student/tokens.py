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
from sbs_edge.data.tokenizer import build_tokenizer
from sbs_edge.errors import UsageError
from sbs_edge.student.config import TrainConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["byte_tokenizer", "checkpoint_tokenizer", "scratch_tokenizer", "write_tokenizer"]


def scratch_tokenizer(examples: Sequence[Example], task: TaskSpec, config: TrainConfig) -> Tokenizer:
    """Build a tokenizer from what the mode sees of the training rows, and the closed labels."""
    kind = config.tokenizer or ("word" if task.name == BUILTIN else "unigram")
    texts: list[str] = []
    for example in examples:
        targets = (label_for(example, config.mode), rationale_for(example, config.mode))
        texts += [example.input, *(target for target in targets if target), *(example.choices or ())]
    return build_tokenizer([*texts, *task.labels], config.prefix_pair, kind, config.vocabulary)


def byte_tokenizer(n_extra: int = 125) -> Tokenizer:
    """Make ByT5's tokenizer as a fast one: byte ``b`` is token ``b + 3``, then ``</s>``.

    transformers has ByT5's only in Python, which a bundle cannot carry.
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
    fast = getattr(loaded, "backend_tokenizer", None)
    if fast is None:
        raise UsageError(f"The tokenizer of {name!r} ({type(loaded).__name__}) has no fast form.")
    fast.no_padding()
    fast.no_truncation()
    return fast


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
