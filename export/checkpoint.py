"""What to export: a student directory, or any T5-family checkpoint once its labels are named."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sbs_edge.data.example import TaskSpec
from sbs_edge.data.tokenizer import byte_tokenizer, load_tokenizer
from sbs_edge.errors import UsageError
from sbs_edge.export.graphs.weights import FAMILIES
from sbs_edge.training.student_dir import CARD, StudentDir

__all__ = ["CHECKPOINT_MODE", "open_student", "write_byte_tokenizer"]

CHECKPOINT_MODE = "checkpoint"
DEFAULT_SOURCE_TOKENS = 512


def open_student(
    path: str | os.PathLike[str],
    labels: Sequence[str] | None = None,
    label_prefix: str | None = None,
    rationale_prefix: str | None = None,
    max_source_tokens: int | None = None,
) -> StudentDir:
    """Open ``path`` for export.

    Args:
        path: a directory that training wrote, or that ``save_pretrained`` wrote.
        labels: the closed label set of a checkpoint without ``sbs_edge.json``; None: it has no label
            task, and what it generates is its answer.
        label_prefix: the checkpoint's prefix of the label task; None: none.
        rationale_prefix: the same for rationales.
        max_source_tokens: most tokens of an input; None: the student's own limit, a checkpoint's ``n_positions``, or
            512. T5's position biases reach any distance, so more is allowed; a student has seen no more than it
            was trained with. ByT5 counts bytes.

    Raises:
        UsageError: it is no T5-family checkpoint, has no tokenizer, or says itself what its labels are.
    """
    if max_source_tokens is not None and max_source_tokens < 2:
        raise UsageError(f"max_source_tokens must be at least 2, not {max_source_tokens}.")
    root = Path(path)
    if not (root / "config.json").is_file():
        raise UsageError(
            f"{root} is no checkpoint directory: it has no config.json. Give the directory that training wrote, "
            "or one that save_pretrained wrote."
        )
    try:
        config = json.loads((root / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{root / 'config.json'} cannot be read: {error}.") from error
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in FAMILIES:
        raise UsageError(
            f"{root} holds a {family!r} model; only the T5 family can be exported (model types "
            f"{', '.join(FAMILIES)}; ByT5 and FLAN-T5 are t5)."
        )
    if not any(root.glob("*.safetensors")):
        raise UsageError(
            f"{root} has no .safetensors weights. Save it with save_pretrained(..., safe_serialization=True); "
            "pickled weights are not opened."
        )
    if (root / CARD).is_file():
        if labels or label_prefix is not None or rationale_prefix is not None:
            raise UsageError(
                f"{root / CARD} already says what the labels and prefixes are; leave --label, --label-prefix "
                "and --rationale-prefix out."
            )
        opened = StudentDir.load(root)
        if max_source_tokens is None:
            return opened
        return replace(opened, limits={**opened.limits, "max_source_tokens": max_source_tokens})
    if not (root / "tokenizer.json").is_file() and _is_byt5(root):
        raise UsageError(
            f"{root} holds ByT5 without a tokenizer.json; write one with "
            "sbs_edge.export.checkpoint.write_byte_tokenizer(directory) and export again."
        )
    load_tokenizer(root)  # a missing one is refused before any work
    kind: Any = "closed" if labels else "open"
    limit = max_source_tokens or config.get("n_positions") or DEFAULT_SOURCE_TOKENS
    return StudentDir(
        root,
        TaskSpec(root.resolve().name, kind, tuple(labels or ())),
        {"label": label_prefix or "", "rationale": rationale_prefix or ""},
        {"max_source_tokens": int(limit), "max_target_tokens": 256, "max_label_tokens": 64},
        CHECKPOINT_MODE,
        {},
    )


def _is_byt5(root: Path) -> bool:
    try:
        saved = json.loads((root / "tokenizer_config.json").read_text(encoding="utf-8"))
        return bool(saved.get("tokenizer_class") == "ByT5Tokenizer")
    except (OSError, ValueError, AttributeError):
        return False


def write_byte_tokenizer(folder: str | os.PathLike[str]) -> Path:
    """Write ByT5's tokenizer as ``tokenizer.json``: a byte b is the token b + 3, end-of-sequence is 1.

    ByT5 comes without one, because its tokenizer is a few lines of Python; the runtime reads only this form.
    """
    path, n_extra = Path(folder) / "tokenizer.json", 125
    config = Path(folder) / "config.json"
    if config.is_file():  # a smaller embedding has rows for fewer of the extra ids
        size = json.loads(config.read_text(encoding="utf-8")).get("vocab_size") or 384
        n_extra = max(0, min(n_extra, size - 259))
    byte_tokenizer(n_extra).save(str(path))
    return path
