"""Configuration of a training run, validated before anything is read or built. Imports no torch."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from sbs_edge.data.targets import Mode
from sbs_edge.errors import UsageError
from sbs_edge.training.depth import Layers, parse_layers
from sbs_edge.windows import LongSettings

__all__ = ["PREFIXES", "Mode", "TrainConfig", "make_config"]

PREFIXES: dict[str, tuple[str, str]] = {
    "seed": ("[label] ", "[rationale] "),
    "authors": ("predict: ", "explain: "),
}
"""Presets of the two task prefixes, each ``(label, rationale)``."""


class TrainConfig(BaseModel):
    """Settings of a training run, which minimises ``L = L_label + rationale_weight * L_rationale``.

    ``alpha`` is another way to give the weight. The loss ``alpha * L_label + (1 - alpha) * L_rationale``
    equals ``alpha * (L_label + lambda * L_rationale)`` with ``lambda = (1 - alpha) / alpha``. The leading
    factor ``alpha`` is dropped, so gradients are ``1 / alpha`` times as large. AdamW does not depend on such a
    factor, except through its epsilon and gradient clipping. With plain SGD, multiply a learning rate that was
    tuned for the alpha form by ``alpha``.

    A field that is None is decided from the others. Each field's description is also its help text in
    ``sbs-edge train``, which has an option for each field.

    Example:
        >>> TrainConfig(mode="distill", max_steps=2000, batch_size=16).lambda_
        0.0

    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    mode: Mode = Field("stepwise", description="Learn gold or teacher labels, with or without rationales.")
    rationale_weight: float | None = Field(
        None,
        ge=0,
        description="lambda in L_label + lambda * L_rationale. Default: 3 from scratch (templates dilute the "
        "informative tokens there), 1 from a checkpoint.",
    )
    alpha: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Another way to give lambda, for alpha * L_label + (1 - alpha) * L_rationale: (1 - alpha) / alpha.",
    )
    head_start: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Share of the steps, at the start, that learn only rationales. Default: 0.4 for a student "
        "from scratch in mode stepwise-teacher, otherwise 0.",
    )
    drop_doubtful: bool | None = Field(
        None,
        description="After the head start, or 0.4 of the steps, leave out rows whose rationales have much larger losses "
        "than the others. Default: on if head_start has a default above 0.",
    )
    prefixes: Literal["seed", "authors"] = Field(
        "seed", description="'[label] ' and '[rationale] ' (seed), or 'predict: ' and 'explain: ' (authors)."
    )
    label_prefix: str | None = Field(None, description="Label prefix, instead of the preset's.")
    rationale_prefix: str | None = Field(None, description="Rationale prefix, instead of the preset's.")
    row_weight: Literal["none", "confidence"] = Field(
        "none", description="Weight each row's tokens by its confidence, or all rows equally."
    )
    soft_labels: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the label's target that is the teacher's distribution (teacher_probs); the rest is its "
        "label.",
    )
    soft_temperature: float = Field(
        1.0, gt=0, description="Temperature of the teacher's distribution; above 1 flattens it."
    )
    rationales: Literal["sample", "all", "best"] = Field(
        "sample",
        description="Where rows have several rationales: draw one in each epoch, learn all with equal weights, or the best.",
    )

    model: str | None = Field(
        None,
        description="T5-family checkpoint: a hub name or a directory. Default: a small one from scratch.",
    )
    encoder_layers: str | int | tuple[int, ...] | None = Field(
        None,
        description="Encoder layers to keep of the checkpoint: a number, evenly spaced, or indices such as 0,3,5.",
    )
    decoder_layers: str | int | tuple[int, ...] | None = Field(
        None,
        description="Decoder layers to keep of the checkpoint: a number, evenly spaced, or indices such as 0,5.",
    )
    d_model: int = Field(64, ge=8, multiple_of=8, description="Model width from scratch, a multiple of 8.")
    d_ff: int = Field(512, ge=8, description="Feed-forward width from scratch.")
    n_heads: int = Field(4, ge=1, description="Attention heads from scratch.")
    n_layers: int = Field(2, ge=1, description="Encoder layers from scratch.")
    n_decoder_layers: int = Field(2, ge=1, description="Decoder layers from scratch.")
    gated: bool = Field(False, description="Gated feed-forward layers from scratch, as in T5 v1.1.")
    tied: bool = Field(True, description="Share embedding and output weights from scratch.")
    dropout: float | None = Field(
        None, ge=0, lt=1, description="Dropout from scratch; overrides a checkpoint's when given."
    )
    tokenizer: Literal["word", "unigram"] | None = Field(
        None, description="Tokenizer from scratch. Default: word for the built-in task, otherwise unigram."
    )
    vocabulary: int = Field(
        4000, ge=64, description="Largest vocabulary of a unigram tokenizer from scratch."
    )
    lora_rank: int = Field(
        0, ge=0, description="Train LoRA adapters of this rank, merged at the end; 0 trains all weights."
    )
    lora_alpha: float | None = Field(None, gt=0, description="Scale of the LoRA adapters.")

    learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate. Default: 3e-3 from scratch, 1e-4 from a checkpoint."
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW's weight decay.")
    clip_norm: float = Field(1.0, ge=0, description="Largest gradient norm; 0 does not clip.")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Label smoothing of both losses.")
    z_loss: float = Field(0.0, ge=0, description="Weight of the squared log-normaliser.")
    batch_size: int = Field(
        32, ge=1, description="Examples per forward pass and process; each gives up to two rows."
    )
    gradient_accumulation: int = Field(
        1, ge=1, description="Forward passes per step; token means are taken over all of them."
    )
    max_steps: int | None = Field(
        None, ge=1, description="Optimiser steps. Default: 600, or as many as epochs need."
    )
    epochs: float | None = Field(
        None, gt=0, description="Passes over the rows, instead of max_steps; the last batch may be smaller."
    )
    warmup: int | None = Field(
        None, ge=0, description="Steps of linear warm-up. Default: 50, or a tenth of a run under 500 steps."
    )
    schedule: Literal["hold", "linear", "constant"] = Field(
        "hold",
        description="hold: keep the peak, then fall linearly; linear: fall from the start; constant: never fall.",
    )
    hold: float = Field(0.6, ge=0, lt=1, description="Share of the steps at the peak, for the hold schedule.")
    final: float = Field(0.05, ge=0, le=1, description="Learning rate at the end, as a share of the peak.")
    max_source_tokens: int = Field(
        512, ge=2, description="Longest input in tokens; longer inputs are cut and counted."
    )
    long: Literal["off", "full", "random"] = Field(
        "off",
        description="Read inputs over max_source_tokens in chunks of that length: with all states of the encoder "
        "(full), or with as many as a chunk has, drawn at random in each step (random).",
    )
    max_long_tokens: int = Field(
        4096, ge=8, description="Longest input with long; longer inputs are cut and counted."
    )
    chunk_overlap: float = Field(
        0.25, ge=0, lt=1, description="Share that neighbouring chunks have in common."
    )
    chunk_header: str = Field("", description="Repeat the text up to this string in every chunk.")
    chunk_marker: bool = Field(False, description="Tell each chunk its place: 'part 3 of 9'.")
    max_target_tokens: int = Field(
        256, ge=2, description="Longest target in tokens; longer targets are cut and counted."
    )
    shuffle_buffer: int = Field(
        1000, ge=1, description="Rows in the shuffle buffer when the rows are a stream."
    )
    seed: int = Field(0, ge=0, description="Seed of splits, initial weights and row order.")

    eval_steps: int | None = Field(
        None, ge=1, description="Steps between evaluations. Default: six evaluations per run."
    )
    eval_batch_size: int = Field(100, ge=1, description="Validation rows per forward pass.")
    validation_rows: int = Field(
        1000, ge=0, description="Number of validation rows used while training, at most."
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Stop after this many evaluations without a better validation score."
    )
    select: Literal["best", "last"] = Field(
        "best", description="Keep the weights of the best validation score, or the last ones."
    )
    save_steps: int | None = Field(
        None, ge=0, description="Steps between checkpoints; 0 saves none. Default: the same as eval_steps."
    )
    keep_checkpoints: int = Field(2, ge=1, description="Checkpoints kept on disk.")
    resume: bool = Field(
        False, description="Continue from the newest checkpoint, if there is one, instead of starting over."
    )

    bf16: bool = Field(False, description="Compute in bfloat16.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations: less memory, about a third slower."
    )
    fsdp: bool = Field(False, description="Shard parameters over the processes of torchrun.")
    threads: int | None = Field(
        None, ge=1, description="CPU threads. Default: as many as the CPU quota and affinity allow."
    )
    workspace_mb: float | None = Field(
        None, gt=0, description="Scratch memory of the fused loss in MB. Default: chosen by its engine."
    )
    loss_engine: Literal["auto", "triton", "cublas", "torch", "reference"] = Field(
        "auto", description="Engine of the fused loss."
    )
    trackers: tuple[Literal["tensorboard", "wandb"], ...] | None = Field(
        None,
        description="Trackers that log the figures; none disables them. Default: TensorBoard if installed.",
    )
    progress: bool | None = Field(
        None, description="Report progress on stderr. Default: a bar on a terminal, otherwise plain lines."
    )

    @field_validator("trackers", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """Accept ``"none"`` for no tracker, and names separated by commas."""
        names = value.split(",") if isinstance(value, str) else value
        if not isinstance(names, list | tuple):
            return names
        return tuple(name.strip() for name in names if name.strip() != "none")

    @field_validator("encoder_layers", "decoder_layers")
    @classmethod
    def _layers(cls, value: Layers | None) -> int | tuple[int, ...] | None:
        return None if value is None else parse_layers(value)

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.alpha is not None and self.rationale_weight is not None:
            raise ValueError("give alpha or rationale_weight, not both: lambda = (1 - alpha) / alpha")
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError("give max_steps or epochs, not both")
        if not self.model and self.d_model % self.n_heads:
            raise ValueError(f"d_model {self.d_model} must be a multiple of n_heads {self.n_heads}")
        if not self.model and (self.encoder_layers or self.decoder_layers) is not None:
            raise ValueError(
                "encoder_layers and decoder_layers keep some of a checkpoint's layers: give model too. From scratch, "
                "n_layers and n_decoder_layers set the depth"
            )
        label, rationale = self.prefix_pair
        if self.uses_rationales and label == rationale:
            raise ValueError(
                f"label_prefix and rationale_prefix are both {label!r}: they tell the tasks apart"
            )
        if self.soft_labels and self.mode in ("finetune", "stepwise"):
            raise ValueError(
                f"soft_labels are the teacher's, and mode {self.mode} learns gold labels: use mode distill or "
                "stepwise-teacher"
            )
        if self.long != "off" and self.max_long_tokens <= self.max_source_tokens:
            raise ValueError(
                f"max_long_tokens {self.max_long_tokens} must be over max_source_tokens {self.max_source_tokens}: "
                "chunks are that long, and only longer inputs are read in several"
            )
        if self.early_stopping_patience is not None and self.validation_rows == 0:
            raise ValueError("early_stopping_patience needs validation rows; validation_rows is 0")
        return self

    @property
    def uses_rationales(self) -> bool:
        """Return whether the mode has the rationale task."""
        return self.mode in ("stepwise", "stepwise-teacher")

    @property
    def from_scratch(self) -> bool:
        """Return whether the student starts from random weights."""
        return self.model is None

    @property
    def prefix_pair(self) -> tuple[str, str]:
        """Return the prefixes ``(label, rationale)`` that are used."""
        label, rationale = PREFIXES[self.prefixes]
        return (
            label if self.label_prefix is None else self.label_prefix,
            rationale if self.rationale_prefix is None else self.rationale_prefix,
        )

    @property
    def long_settings(self) -> LongSettings | None:
        """The settings with which inputs over ``max_source_tokens`` are read; None: they are cut."""
        if self.long == "off":
            return None
        return LongSettings(
            chunk=self.max_source_tokens, max_tokens=self.max_long_tokens, overlap=self.chunk_overlap,
            header=self.chunk_header, marker=self.chunk_marker, trained=self.long,
        )  # fmt: skip

    @property
    def lambda_(self) -> float:
        """Return the weight of the rationale loss; 0 in modes without rationales."""
        if not self.uses_rationales:
            return 0.0
        if self.alpha is not None:
            return (1 - self.alpha) / self.alpha
        if self.rationale_weight is not None:
            return self.rationale_weight
        return 3.0 if self.from_scratch else 1.0

    @property
    def head_start_(self) -> float:
        """Share of the steps that learn rationales alone."""
        if not self.uses_rationales:
            return 0.0
        if self.head_start is not None:
            return self.head_start
        return 0.4 if self.mode == "stepwise-teacher" and self.from_scratch else 0.0

    @property
    def drop_doubtful_(self) -> bool:
        """Return whether rows are left out after the head start."""
        if self.drop_doubtful is not None:
            return self.drop_doubtful and self.uses_rationales
        return self.head_start is None and self.head_start_ > 0

    def score_steps(self, steps: int, steps_per_epoch: float) -> list[int]:
        """Return the steps before which all rows are scored, to drop doubtful ones; the first decides at once.

        From the head start (or 0.4 of the steps) to 0.8 of them, a tenth apart. A pass over all rows costs about a
        fifth of an epoch of training, so there is one for every four epochs of the run, and one at least.
        """
        if not self.drop_doubtful_:
            return []
        first, apart = int((self.head_start_ or 0.4) * steps), max(1, steps // 10)
        most = max(1, int(steps / max(steps_per_epoch, 1.0) / 4))
        return [*range(first, int(0.8 * steps) + 1, apart)][:most] or [first]

    @property
    def peak_learning_rate(self) -> float:
        """Return the learning rate after warm-up."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 3e-3 if self.from_scratch else 1e-4

    def steps_for(self, n_rows: int | None, global_batch: int) -> int:
        """Return the number of optimiser steps.

        Args:
            n_rows: training examples, or None for a stream of unknown length.
            global_batch: examples per optimiser step, over all processes and accumulated passes.

        Raises:
            UsageError: when ``epochs`` is given for a stream.

        """
        if self.epochs is None:
            return self.max_steps or 600
        if n_rows is None:
            raise UsageError(
                "The length of a stream is unknown, so epochs cannot be counted: give max_steps instead."
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
                near = get_close_matches(where, TrainConfig.model_fields, n=3, cutoff=0.5)
                known = near or sorted(TrainConfig.model_fields)
                parts.append(
                    f"{where} is not a field; {'similar fields are' if near else 'the fields are'} {', '.join(known)}"
                )
            elif where:
                parts.append(f"{where} = {item['input']!r}: {item['msg'][:1].lower()}{item['msg'][1:]}")
            else:
                parts.append(item["msg"].removeprefix("Value error, "))
        raise UsageError(f"The training configuration is not valid: {'; '.join(parts)}.") from error
