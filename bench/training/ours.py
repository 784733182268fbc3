"""This project's training step, as its trainer runs it: one encoder pass, one fused loss over both tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sbs_edge.training.batches import Collator, Encoded
from sbs_edge.training.model import TwoTaskModel

if TYPE_CHECKING:
    from sbs_edge.bench.training.steps import Pair, Step

__all__ = ["make"]


def make(model: Any, rationale_weight: float, device: torch.device) -> Step:
    """Return the step for a T5 model."""
    from sbs_edge.bench.training.steps import Step

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
