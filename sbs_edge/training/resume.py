"""The working directory of a run, beside its student directory: its settings, and the checkpoint to resume from."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

from sbs_edge import files
from sbs_edge.data.example import Splits
from sbs_edge.errors import UsageError
from sbs_edge.training.config import TrainConfig

__all__ = ["fingerprint", "prepare_work"]


def fingerprint(config: TrainConfig, splits: Splits, streamed: bool) -> dict[str, str]:
    """Return the settings that must be the same to resume a run; world size and batch size may differ."""
    may_change = {
        "resume", "batch_size", "gradient_accumulation", "progress", "trackers", "threads", "workspace_mb",
        "loss_engine", "save_steps", "keep_checkpoints", "eval_batch_size", "gradient_checkpointing", "max_steps",
        "epochs", "fsdp",
    }  # fmt: skip
    print_ = {k: json.dumps(v) for k, v in config.model_dump(mode="json").items() if k not in may_change}
    if not streamed:
        digest = hashlib.sha256()
        for example in splits.train:
            digest.update(
                repr((example.input, example.label, example.teacher_label, example.rationale)).encode()
            )
            if example.rationales or example.teacher_probs:
                digest.update(repr((example.rationales, example.teacher_probs)).encode())
        print_["training rows"] = digest.hexdigest()[:16]
    return print_


def prepare_work(work: Path, config: TrainConfig, asked: dict[str, str], first: bool) -> Path | None:
    """Return the checkpoint to resume from; remove the files of an earlier, different run."""
    from sbs_edge.training.trainer import find_checkpoint

    record = work / "run.json"
    checkpoint = find_checkpoint(work) if config.resume else None
    if checkpoint is not None:
        before = json.loads(record.read_text(encoding="utf-8"))
        for name in sorted(set(before) | set(asked)):
            if before.get(name) != asked.get(name):
                raise UsageError(
                    f"The run in {work} cannot be continued: {name} was {before.get(name)} and is now "
                    f"{asked.get(name)}. Use the settings that it was started with, or train without resume to start over."
                )
        return checkpoint
    if first:
        shutil.rmtree(work, ignore_errors=True)
        files.write_json(record, asked)
    return None
