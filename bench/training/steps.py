"""The training steps that are compared: one function each, from rows to a loss with a gradient.

``two-forward`` is the authors' step, written from the paper's description: every example is fed twice, once
under each task prefix, each task's rows padded to the longest of the batch, full logits, the mean
cross-entropy of each task, ``L = L_label + lambda * L_rationale``. ``linear-cross-entropy`` is the same with
``torch.nn.functional.linear_cross_entropy`` in place of logits and loss. ``sbs-edge`` is this project's step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["STEPS", "Pair", "Step", "make_step"]

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of one example's two rows, each ending in EOS."""

    label_source: list[int]
    label_target: list[int]
    rationale_source: list[int]
    rationale_target: list[int]


@dataclass(slots=True)
class Step:
    """One way to take the loss of a batch.

    Attributes:
        loss: from a batch of pairs to ``L_label + lambda * L_rationale``, () with gradient.
        padding: share of encoder and of target positions that hold no token, for a batch.
    """

    loss: Callable[[Sequence[Pair]], Tensor]
    padding: Callable[[Sequence[Pair]], dict[str, tuple[int, int]]]


def _padded(rows: Sequence[list[int]], value: int, device: torch.device) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], device=device)


def _padding_by_task(batch: Sequence[Pair]) -> dict[str, tuple[int, int]]:
    """Positions held and positions used when each task is padded to its longest row."""
    used = {"source": 0, "target": 0}
    held = {"source": 0, "target": 0}
    for sources, targets in _tasks(batch):
        for name, rows in (("source", sources), ("target", targets)):
            used[name] += sum(map(len, rows))
            held[name] += len(rows) * max(map(len, rows))
    return {name: (held[name], used[name]) for name in used}


def _tasks(batch: Sequence[Pair]) -> list[tuple[list[list[int]], list[list[int]]]]:
    return [
        ([pair.label_source for pair in batch], [pair.label_target for pair in batch]),
        ([pair.rationale_source for pair in batch], [pair.rationale_target for pair in batch]),
    ]


def _two_forward(model: Any, rationale_weight: float, device: torch.device) -> Step:
    pad = int(model.config.pad_token_id)

    def loss(batch: Sequence[Pair]) -> Tensor:
        losses = []
        for sources, targets in _tasks(batch):
            ids = _padded(sources, pad, device)
            labels = _padded(targets, IGNORED, device)
            losses.append(model(input_ids=ids, attention_mask=ids.ne(pad).long(), labels=labels).loss)
        total: Tensor = losses[0] + rationale_weight * losses[1]
        return total

    return Step(loss, _padding_by_task)


def _head_scale(model: Any) -> float:
    """T5 scales the decoder's output before a tied head; later releases say so in the configuration."""
    config = model.config
    scaled = getattr(config, "scale_decoder_outputs", None)
    tied = config.tie_word_embeddings if scaled is None else scaled
    return float(config.d_model**-0.5) if tied else 1.0


def _linear_cross_entropy(model: Any, rationale_weight: float, device: torch.device) -> Step:
    if not hasattr(nn.functional, "linear_cross_entropy"):
        raise RuntimeError(f"torch {torch.__version__} has no nn.functional.linear_cross_entropy")
    pad, scale = int(model.config.pad_token_id), _head_scale(model)

    def loss(batch: Sequence[Pair]) -> Tensor:
        losses = []
        for sources, targets in _tasks(batch):
            ids = _padded(sources, pad, device)
            mask = ids.ne(pad).long()
            labels = _padded(targets, IGNORED, device)
            encoded = model.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            hidden = model.decoder(
                input_ids=model._shift_right(labels),
                encoder_hidden_states=encoded,
                encoder_attention_mask=mask,
                use_cache=False,
            ).last_hidden_state
            weight = model.lm_head.weight
            losses.append(
                nn.functional.linear_cross_entropy(
                    (hidden * scale).flatten(0, 1).to(weight.dtype),
                    weight,
                    labels.flatten(),
                    ignore_index=IGNORED,
                )
            )
        total: Tensor = losses[0] + rationale_weight * losses[1]
        return total

    return Step(loss, _padding_by_task)


def _ours(model: Any, rationale_weight: float, device: torch.device) -> Step:
    """The trainer's own step: one encoder pass, one fused loss over both tasks."""
    # Imported here: the other steps' peak memory is measured without it.
    from sbs_edge.training.batches import Collator, Encoded
    from sbs_edge.training.model import TwoTaskModel

    config = model.config
    both = TwoTaskModel(model, rationale_weight).train()
    collate = Collator(
        pad_id=int(config.pad_token_id),
        eos_id=int(config.eos_token_id),
        start_id=int(config.decoder_start_token_id),
    )

    def batch_of(pairs: Sequence[Pair]) -> dict[str, Any]:
        return collate(
            [
                Encoded(((p.label_source, p.label_target), (p.rationale_source, p.rationale_target)))
                for p in pairs
            ]
        )

    def loss(pairs: Sequence[Pair]) -> Tensor:
        def moved(value: Any) -> Any:
            return [item.to(device) for item in value] if isinstance(value, list) else value.to(device)

        total: Tensor = both(**{name: moved(value) for name, value in batch_of(pairs).items()})["loss"]
        return total

    def padding(pairs: Sequence[Pair]) -> dict[str, tuple[int, int]]:
        batch = batch_of(pairs)
        mask = batch["attention_mask"]
        return {
            "source": (mask.numel(), int(mask.sum())),
            "target": (len(batch["targets"]), len(batch["valid_indices"])),
        }

    return Step(loss, padding)


STEPS: dict[str, Callable[[Any, float, torch.device], Step]] = {
    "sbs-edge": _ours,
    "two-forward": _two_forward,
    "linear-cross-entropy": _linear_cross_entropy,
}


def make_step(name: str, model: Any, rationale_weight: float, device: torch.device) -> Step:
    """Return the step of that name for a T5 model."""
    return STEPS[name](model, rationale_weight, device)
