"""The keyword arguments of ``train``, typed so that editors complete and check them."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypedDict

from sbs_edge.data.load import SourceOptions
from sbs_edge.training.config import Mode

__all__ = ["DataOptions", "TrainOptions"]


class TrainOptions(TypedDict, total=False):
    """Fields of :class:`~sbs_edge.training.config.TrainConfig`, which explains and checks them."""

    mode: Mode
    rationale_weight: float | None
    alpha: float | None
    head_start: float | None
    drop_doubtful: bool | None
    prefixes: Literal["seed", "authors"]
    label_prefix: str | None
    rationale_prefix: str | None

    model: str | None
    encoder_layers: str | int | tuple[int, ...] | None
    decoder_layers: str | int | tuple[int, ...] | None
    d_model: int
    d_ff: int
    n_heads: int
    n_layers: int
    n_decoder_layers: int
    gated: bool
    tied: bool
    dropout: float | None
    tokenizer: Literal["word", "unigram"] | None
    vocabulary: int

    learning_rate: float | None
    weight_decay: float
    clip_norm: float
    label_smoothing: float
    z_loss: float
    batch_size: int
    gradient_accumulation: int
    gradient_checkpointing: bool
    max_steps: int | None
    epochs: float | None
    warmup: int | None
    schedule: Literal["hold", "linear", "constant"]
    hold: float
    final: float
    bf16: bool
    seed: int

    max_source_tokens: int
    long: Literal["off", "full", "random"]
    max_long_tokens: int
    chunk_overlap: float
    chunk_header: str
    chunk_marker: bool
    max_target_tokens: int
    row_weight: Literal["none", "confidence"]
    soft_labels: float
    soft_temperature: float
    rationales: Literal["sample", "all", "best"]

    eval_steps: int | None
    eval_batch_size: int
    validation_rows: int
    early_stopping_patience: int | None
    select: Literal["best", "last"]
    save_steps: int | None
    keep_checkpoints: int
    resume: bool

    lora_rank: int
    lora_alpha: float | None
    fsdp: bool
    workspace_mb: float | None
    loss_engine: Literal["auto", "triton", "cublas", "torch", "reference"]
    shuffle_buffer: int
    trackers: tuple[Literal["tensorboard", "wandb"], ...] | None
    progress: bool | None
    threads: int | None


class DataOptions(SourceOptions, total=False):
    """Keyword arguments of :func:`~sbs_edge.data.load.load_splits`, which explains them."""

    skip_bad_rows: bool
    seed: int
    skipped_file: str | Path | None
