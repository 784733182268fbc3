"""The largest magnitude after every RMSNorm, measured on calibration rows with the PyTorch model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["norm_ranges"]


def norm_ranges(
    model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 16
) -> dict[str, float]:
    """Run teacher-forced (source ids, target ids) pairs and return norm name -> largest |value|.

    Padding is left out of the measurement: its values never reach an answer.
    """
    import torch

    if not pairs:
        return {}
    largest: dict[str, float] = {}
    current: dict[str, Any] = {}

    def record(name: str) -> Any:
        kind = "target" if name.startswith("decoder.") else "source"

        def hook(_: Any, __: Any, output: Any) -> None:
            kept = output.detach()[current[kind]]
            largest[name] = max(largest.get(name, 0.0), float(kept.abs().max()))

        return hook

    hooks = [
        module.register_forward_hook(record(name))
        for name, module in model.named_modules()
        if name.endswith("layer_norm")
    ]
    start = model.config.decoder_start_token_id or 0
    try:
        for low in range(0, len(pairs), batch_size):
            part = pairs[low : low + batch_size]
            source, source_mask = _padded([list(ids) for ids, _ in part])
            target, target_mask = _padded([[start, *ids[:-1]] for _, ids in part])
            current["source"], current["target"] = source_mask.bool(), target_mask.bool()
            with torch.no_grad():
                model(
                    input_ids=source,
                    attention_mask=source_mask,
                    decoder_input_ids=target,
                    decoder_attention_mask=target_mask,
                )
    finally:
        for hook in hooks:
            hook.remove()
    return largest


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    import torch

    length = max(len(row) for row in rows)
    ids = torch.zeros((len(rows), length), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[index, : len(row)] = 1
    return ids, mask
