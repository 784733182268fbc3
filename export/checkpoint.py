"""Open the student to export: a student directory, or any T5-family checkpoint whose labels are given."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sbs_edge import files
from sbs_edge.data.example import TaskSpec
from sbs_edge.errors import UsageError
from sbs_edge.training.checkpoint import CARD, Checkpoint, open_checkpoint, weight_files
from sbs_edge.training.student_dir import MadeFiles, StudentDir
from sbs_edge.training.tokens import checkpoint_tokenizer, write_tokenizer

__all__ = ["CHECKPOINT_MODE", "open_student"]

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
        path: a checkpoint: a directory that training or ``save_pretrained`` wrote, or a name on a hub.
        labels: the closed label set of a checkpoint without ``sbs_edge.json``; None: its answer is the text
            that it generates.
        label_prefix: the checkpoint's prefix of the label task; None: no prefix.
        rationale_prefix: the same for rationales.
        max_source_tokens: longest input in tokens; None: the student's own limit, a checkpoint's ``n_positions``, or
            512. T5's position biases work at any distance, so more is allowed, but the student has not seen longer
            inputs in training. ByT5 counts bytes.

    Raises:
        UsageError: it is not a T5-family checkpoint, has no tokenizer, or is a student directory with its own labels.
    """
    if max_source_tokens is not None and max_source_tokens < 2:
        raise UsageError(f"max_source_tokens must be at least 2, not {max_source_tokens}.")
    checkpoint = open_checkpoint(str(path))
    root = checkpoint.folder
    weight_files(root)  # missing ones are refused before any work
    if checkpoint.adapter is None and (root / CARD).is_file():
        if labels or label_prefix is not None or rationale_prefix is not None:
            raise UsageError(
                f"{root / CARD} already gives the labels and prefixes; leave out labels, label_prefix and "
                "rationale_prefix."
            )
        opened = StudentDir.load(root)
        if max_source_tokens is None:
            return opened
        return replace(opened, limits={**opened.limits, "max_source_tokens": max_source_tokens})
    made = _companions(checkpoint)
    kind: Any = "closed" if labels else "open"
    limit = max_source_tokens or checkpoint.config.get("n_positions") or DEFAULT_SOURCE_TOKENS
    return StudentDir(
        root,
        TaskSpec(Path(checkpoint.adapter or path).expanduser().resolve().name, kind, tuple(labels or ())),
        {"label": label_prefix or "", "rationale": rationale_prefix or ""},
        {"max_source_tokens": int(limit), "max_target_tokens": 256, "max_label_tokens": 64},
        CHECKPOINT_MODE,
        {},
        checkpoint,
        made,
    )


def _companions(checkpoint: Checkpoint) -> MadeFiles:
    """Write the small files of a bundle: the fast tokenizer, and the configuration with its start token."""
    made = MadeFiles()
    folder, config = made.folder, dict(checkpoint.config)
    pad, eos = (config.get(name) for name in ("pad_token_id", "eos_token_id"))
    tokenizer = checkpoint_tokenizer(checkpoint.tokenizer_folder, config["model_type"])
    if not (checkpoint.tokenizer_folder / "tokenizer.json").is_file():
        write_tokenizer(tokenizer, folder, pad_id=0 if pad is None else pad, eos_id=1 if eos is None else eos)
    elif checkpoint.tokenizer_folder != checkpoint.folder:
        shutil.copyfile(checkpoint.tokenizer_folder / "tokenizer.json", folder / "tokenizer.json")
    if config.get("decoder_start_token_id") is None:
        files.write_json(folder / "config.json", {**config, "decoder_start_token_id": checkpoint.start_id})
    return made
