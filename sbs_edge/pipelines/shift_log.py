"""``run shift-log``: a student that is trained on short logs and answers long ones, beside cheaper ways to do so."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from sbs_edge.data.shift_log import HEADER, ShiftLogSize, shift_log_rows, shift_log_splits

__all__ = ["TRAINING", "ShiftLogConfig", "run_shift_log"]

TRAINING: dict[str, Any] = {
    "max_source_tokens": 64, "long": "full", "max_long_tokens": 512, "chunk_header": HEADER,
}  # fmt: skip
"""Fields of the training configuration, unless others are given."""

_TEST_SEED = 44_004


class ShiftLogConfig(BaseModel):
    """Configuration of ``sbs-edge run shift-log``.

    Attributes:
        latest: the variant in which facts change and the last one holds.
        steps: optimiser steps.
        seed: of training rows, initial weights and row order.
        targets: what to export for; the first is measured.
        lengths: tokens of the test logs.
        rows: test logs of each length.
        top_k: encoder states each attention head reads in the way ``top-k``.
        max_drop: see :func:`sbs_edge.export.api.export`.
        min_rationale_agreement: the same.
        training: further fields of the training configuration.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    latest: bool = False
    steps: int = Field(900, ge=1)
    seed: int = Field(0, ge=0)
    targets: tuple[str, ...] = ("cpu-int8", "cpu-fp32")
    lengths: tuple[int, ...] = (64, 512, 2048, 8192)
    rows: int = Field(100, ge=1)
    top_k: int = Field(64, ge=1)
    max_drop: float = Field(1.0, ge=0)
    min_rationale_agreement: float = Field(0.9, ge=0, le=1)
    training: dict[str, Any] = Field(default_factory=dict)


def run_shift_log(
    out: Path,
    config: ShiftLogConfig,
    size: ShiftLogSize | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Train on short logs, export, and answer long ones in every way; return the report as plain values.

    Args:
        out: directory for ``student/`` and ``bundle/``.
        config: see :class:`ShiftLogConfig`.
        size: how many rows, and how long the training logs are; None: the defaults.
        say: receives one line a stage.
    """
    from sbs_edge.export.api import export
    from sbs_edge.pipelines.lengths import WAYS, Reader, measure
    from sbs_edge.training.train import train

    started, size = time.perf_counter(), size or ShiftLogSize()
    splits = shift_log_splits(config.seed, latest=config.latest, size=size)
    say(f"training on logs of {' to '.join(map(str, (min(size.tokens), max(size.tokens))))} tokens")
    trained = train(
        splits, out / "student", max_steps=config.steps, seed=config.seed, **{**TRAINING, **config.training}
    )
    say(f"exporting for {', '.join(config.targets)}")
    exported = export(
        trained.student_dir, out / "bundle", targets=config.targets, max_drop=config.max_drop,
        min_rationale_agreement=config.min_rationale_agreement,
    )  # fmt: skip
    table: list[dict[str, Any]] = []
    for tokens in config.lengths:
        say(f"answering {config.rows} logs of {tokens:,} tokens")
        rows = shift_log_rows(
            "test",
            config.rows,
            (tokens,),
            _TEST_SEED + tokens,
            latest=config.latest,
            n_phrases=size.n_phrases,
        )
        for way in WAYS:
            with Reader(exported.path, way, config.targets[0], top_k=config.top_k) as reader:
                table.append({"tokens": tokens, "way": way, **measure(reader, rows)})
    return {
        "task": splits.task.name,
        "latest": config.latest,
        "student": {"metrics": trained.metrics, "seconds": round(trained.seconds, 1)},
        "bundle": {"path": str(exported.path), "long": exported.manifest["long"]},
        "top_k": config.top_k,
        "lengths": table,
        "seconds": round(time.perf_counter() - started, 1),
    }
