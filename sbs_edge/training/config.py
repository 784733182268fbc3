"""What a training run needs to know, checked before anything is read or built. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sbs_edge.data.targets import Mode
from sbs_edge.errors import UsageError

__all__ = ["PREFIXES", "Mode", "TrainConfig", "make_config"]

PREFIXES: dict[str, tuple[str, str]] = {
    "seed": ("[label] ", "[rationale] "),
    "authors": ("predict: ", "explain: "),
}
"""Presets of the two task prefixes, each ``(label, rationale)``."""


class TrainConfig(BaseModel):
    """One training run: ``L = L_label + rationale_weight * L_rationale``.

    ``alpha`` is the other way to say the weight: the loss ``alpha * L_label + (1 - alpha) *
    L_rationale`` equals ``alpha * (L_label + lambda * L_rationale)`` with ``lambda = (1 - alpha) /
    alpha``. The leading factor ``alpha`` scales every gradient, so a plain-SGD learning rate tuned
    for the alpha form is to be multiplied by ``alpha`` here; AdamW divides it out (up to its epsilon
    and up to gradient clipping, which here acts on gradients ``1 / alpha`` times as large).

    None in a field means: decided from the rest (see :meth:`resolve`).

    Attributes:
        mode: see :data:`Mode`.
        rationale_weight: lambda, at least 0; None: 3 from scratch (rationale templates dilute the
            informative tokens there), 1 from a checkpoint.
        alpha: in (0, 1]; excludes ``rationale_weight``.
        prefixes: a preset of :data:`PREFIXES`; ``label_prefix`` and ``rationale_prefix`` win over it.
        model: T5-family checkpoint, by hub name or directory; None: a small one from scratch.
        d_model, d_ff, n_heads, n_layers, n_decoder_layers, gated, tied, dropout: size of the model
            from scratch; ``dropout`` also overrides a checkpoint's when given.
        tokenizer: kind of tokenizer to build from scratch; None: words for the built-in task and
            pieces (unigram) otherwise. ``vocabulary`` bounds the pieces.
        learning_rate: peak; None: 3e-3 from scratch, 1e-4 from a checkpoint.
        batch_size: examples a process sees in one forward pass. One example gives up to two rows.
        gradient_accumulation: forward passes an optimiser step; token means are taken over all of them.
        max_steps, epochs: length, one of them; neither: 600 steps. With ``epochs`` the last batch may
            be smaller; with ``max_steps`` batches run across the ends of epochs.
        warmup: steps of linear warm-up; None: 50, or a tenth of a run shorter than 500 steps.
        schedule: ``hold`` keeps the peak for ``hold`` of the steps, then falls linearly to
            ``final`` of the peak; ``linear`` falls from the start; ``constant`` does not fall.
        eval_steps: steps between evaluations on validation rows; None: six evaluations a run.
        save_steps: steps between checkpoints; None: as ``eval_steps``; 0: none.
        keep_checkpoints: how many checkpoints stay on disk.
        early_stopping_patience: evaluations without a better validation score before the run stops.
        select: keep the weights of the best validation score, or the last ones.
        validation_rows: at most this many validation rows are used while training.
        row_weight: ``confidence`` weights a row's tokens with its ``confidence``.
        lora_rank: rank of LoRA adapters (peft) on the attention projections and feed-forward
            layers, merged before the student is written; 0: train everything.
        fsdp: shard parameters over the processes of ``torchrun`` (see docs/training.md).
        resume: continue from the newest checkpoint of ``out`` if there is one.
        workspace_mb: scratch memory of the fused loss; None: its own choice.
        loss_engine: engine of the fused loss.
        shuffle_buffer: rows held for shuffling when the training rows are a stream.
        trackers: ``tensorboard`` and ``wandb``; None: TensorBoard if it is installed.

    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Mode = "stepwise"
    rationale_weight: float | None = Field(None, ge=0, allow_inf_nan=False)
    alpha: float | None = Field(None, gt=0, le=1)
    prefixes: Literal["seed", "authors"] = "seed"
    label_prefix: str | None = None
    rationale_prefix: str | None = None

    model: str | None = None
    d_model: int = Field(64, ge=8, multiple_of=8)
    d_ff: int = Field(512, ge=8)
    n_heads: int = Field(4, ge=1)
    n_layers: int = Field(2, ge=1)
    n_decoder_layers: int = Field(2, ge=1)
    gated: bool = False
    tied: bool = True
    dropout: float | None = Field(None, ge=0, lt=1)
    tokenizer: Literal["word", "unigram"] | None = None
    vocabulary: int = Field(4000, ge=64)

    learning_rate: float | None = Field(None, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, ge=0)
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    z_loss: float = Field(0.0, ge=0)
    batch_size: int = Field(32, ge=1)
    gradient_accumulation: int = Field(1, ge=1)
    gradient_checkpointing: bool = False
    max_steps: int | None = Field(None, ge=1)
    epochs: float | None = Field(None, gt=0)
    warmup: int | None = Field(None, ge=0)
    schedule: Literal["hold", "linear", "constant"] = "hold"
    hold: float = Field(0.6, ge=0, lt=1)
    final: float = Field(0.05, ge=0, le=1)
    bf16: bool = False
    seed: int = Field(0, ge=0)

    max_source_tokens: int = Field(512, ge=2)
    max_target_tokens: int = Field(256, ge=2)
    row_weight: Literal["none", "confidence"] = "none"

    eval_steps: int | None = Field(None, ge=1)
    eval_batch_size: int = Field(100, ge=1)
    validation_rows: int = Field(1000, ge=0)
    early_stopping_patience: int | None = Field(None, ge=1)
    select: Literal["best", "last"] = "best"
    save_steps: int | None = Field(None, ge=0)
    keep_checkpoints: int = Field(2, ge=1)
    resume: bool = False

    lora_rank: int = Field(0, ge=0)
    lora_alpha: float | None = Field(None, gt=0)
    fsdp: bool = False
    workspace_mb: float | None = Field(None, gt=0)
    loss_engine: str = "auto"
    shuffle_buffer: int = Field(1000, ge=1)
    trackers: tuple[Literal["tensorboard", "wandb"], ...] | None = None
    progress: bool | None = None
    threads: int | None = Field(None, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.alpha is not None and self.rationale_weight is not None:
            raise ValueError("give alpha or rationale_weight, not both: lambda = (1 - alpha) / alpha")
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError("give max_steps or epochs, not both")
        if not self.model and self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} must be a multiple of n_heads {self.n_heads}")
        label, rationale = self.prefix_pair
        if self.uses_rationales and label == rationale:
            raise ValueError(
                f"label_prefix and rationale_prefix are both {label!r}: they tell the tasks apart"
            )
        if self.early_stopping_patience is not None and self.validation_rows == 0:
            raise ValueError("early_stopping_patience needs validation rows; validation_rows is 0")
        return self

    @property
    def uses_rationales(self) -> bool:
        """Whether the mode has the rationale task."""
        return self.mode in ("stepwise", "stepwise-teacher")

    @property
    def from_scratch(self) -> bool:
        """Whether the student starts from random weights."""
        return self.model is None

    @property
    def prefix_pair(self) -> tuple[str, str]:
        """The prefixes in force, ``(label, rationale)``."""
        label, rationale = PREFIXES[self.prefixes]
        return (
            label if self.label_prefix is None else self.label_prefix,
            rationale if self.rationale_prefix is None else self.rationale_prefix,
        )

    @property
    def lambda_(self) -> float:
        """Weight of the rationale loss; 0 in the modes without rationales."""
        if not self.uses_rationales:
            return 0.0
        if self.alpha is not None:
            return (1 - self.alpha) / self.alpha
        if self.rationale_weight is not None:
            return self.rationale_weight
        return 3.0 if self.from_scratch else 1.0

    @property
    def peak_learning_rate(self) -> float:
        """Learning rate after warm-up."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 3e-3 if self.from_scratch else 1e-4

    def steps_for(self, n_rows: int | None, global_batch: int) -> int:
        """Return the number of optimiser steps.

        Args:
            n_rows: training examples, or None for a stream of unknown length.
            global_batch: examples an optimiser step sees over all processes and accumulated passes.

        Raises:
            UsageError: when ``epochs`` is given for a stream.

        """
        if self.epochs is None:
            return self.max_steps or 600
        if n_rows is None:
            raise UsageError(
                "A stream has no known end, so epochs cannot be counted: give max_steps instead."
            )
        return max(1, -(-int(self.epochs * n_rows) // global_batch))

    def factor_at(self, step: int, steps: int) -> float:
        """Return the learning rate at ``step`` (from 0) of ``steps`` as a share of the peak."""
        warmup = self.warmup if self.warmup is not None else min(50, steps // 10)
        rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
        if self.schedule == "constant":
            return rise
        hold = self.hold if self.schedule == "hold" else 0.0
        return rise * max(self.final, min(1.0, (1 - step / steps) / (1 - hold)))


def make_config(config: TrainConfig | None, overrides: dict[str, Any]) -> TrainConfig:
    """Return ``config`` (or the defaults) with ``overrides`` in place, validated again.

    Raises:
        UsageError: one paragraph naming each wrong field, the value and the reason.

    """
    base = config.model_dump(exclude_unset=True) if config is not None else {}
    # A weight given one way replaces a weight given the other way in the base configuration.
    for given, replaced in (
        ("alpha", "rationale_weight"),
        ("rationale_weight", "alpha"),
        ("max_steps", "epochs"),
        ("epochs", "max_steps"),
    ):
        if overrides.get(given) is not None and overrides.get(replaced) is None:
            base.pop(replaced, None)
    try:
        return TrainConfig(**{**base, **overrides})
    except ValidationError as error:
        parts = []
        for item in error.errors():
            where = ".".join(map(str, item["loc"]))
            if item["type"] == "extra_forbidden":
                parts.append(
                    f"{where} is not a field; known are {', '.join(sorted(TrainConfig.model_fields))}"
                )
            elif where:
                parts.append(f"{where} = {item['input']!r}: {item['msg'][:1].lower()}{item['msg'][1:]}")
            else:
                parts.append(item["msg"].removeprefix("Value error, "))
        raise UsageError(f"The training configuration is not valid: {'; '.join(parts)}.") from error
