"""Measure calibration rows: the largest magnitudes where numbers are rounded, and the second moments of inputs.

The PyTorch model runs with teacher forcing. Padding is left out, because its values never reach an answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sbs_edge.tokens import start_token_id

__all__ = ["CalibrationStats", "collect_calibration", "norm_ranges"]

_UPDATES = ("Attention.o", ".wo")


@dataclass(frozen=True, slots=True)
class CalibrationStats:
    """Figures of a checkpoint on its calibration rows.

    Attributes:
        norms: norm name -> largest output magnitude.
        inputs: linear weight's name -> largest input magnitude.
        moments: linear weight's name -> (in, in) float32 sum of x x^T over rows; decoder and head only.
        largest_residual: largest magnitude in the residual stream or in its updates.
        largest_hidden: largest magnitude of a feed-forward's hidden layer.
        rows: pairs measured.
    """

    norms: Mapping[str, float] = field(default_factory=dict)
    inputs: Mapping[str, float] = field(default_factory=dict)
    moments: Mapping[str, np.ndarray] = field(default_factory=dict)
    largest_residual: float = 0.0
    largest_hidden: float = 0.0
    rows: int = 0


class _Recorder:
    """Hooks that keep maxima and second moments of unpadded positions."""

    def __init__(self, *, moments: bool) -> None:
        self.wants_moments = moments
        self.masks: dict[str, Any] = {}
        self.norms: dict[str, float] = {}
        self.inputs: dict[str, float] = {}
        self.moments: dict[str, Any] = {}
        self.residual = 0.0
        self.hidden = 0.0

    def attach(self, model: Any) -> list[Any]:
        import torch

        hooks = []
        for name, module in model.named_modules():
            if name.endswith("layer_norm"):
                hooks.append(module.register_forward_hook(self._norm(name)))
            elif isinstance(module, torch.nn.Linear):
                hooks.append(module.register_forward_hook(self._linear(name)))
        return hooks

    def _kept(self, name: str, tensor: Any) -> Any:
        source = name.startswith("encoder.") or name.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        return tensor.detach()[self.masks["source" if source else "target"]]

    def _norm(self, name: str) -> Any:
        def hook(_: Any, inputs: Any, output: Any) -> None:
            largest = float(self._kept(name, output).abs().max())
            self.norms[name] = max(self.norms.get(name, 0.0), largest)
            self.residual = max(self.residual, float(self._kept(name, inputs[0]).abs().max()))

        return hook

    def _linear(self, name: str) -> Any:
        def hook(_: Any, inputs: Any, output: Any) -> None:
            x = self._kept(name, inputs[0]).float()
            largest = float(x.abs().max())
            self.inputs[name] = max(self.inputs.get(name, 0.0), largest)
            if name.endswith(_UPDATES):
                self.residual = max(self.residual, float(self._kept(name, output).abs().max()))
            if name.endswith(".wo"):
                self.hidden = max(self.hidden, largest)
            if self.wants_moments and name.startswith(("decoder.", "lm_head")):
                moment = x.T @ x
                self.moments[name] = self.moments[name] + moment if name in self.moments else moment

        return hook


def collect_calibration(
    model: Any,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int = 16,
    *,
    moments: bool = False,
) -> CalibrationStats:
    """Run teacher-forced (source ids, target ids) pairs and return their figures.

    Args:
        model: a transformers model of the T5 family.
        pairs: token ids; without any, the figures are empty.
        batch_size: pairs per forward pass.
        moments: also collect second moments of decoder inputs, which int4 needs.
    """
    import torch

    if not pairs:
        return CalibrationStats()
    recorder = _Recorder(moments=moments)
    hooks = recorder.attach(model)
    start = start_token_id(model.config)
    try:
        for low in range(0, len(pairs), batch_size):
            part = pairs[low : low + batch_size]
            source, source_mask = _padded([list(ids) for ids, _ in part])
            target, target_mask = _padded([[start, *ids[:-1]] for _, ids in part])
            recorder.masks = {"source": source_mask.bool(), "target": target_mask.bool()}
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
    return CalibrationStats(
        recorder.norms, recorder.inputs, {name: m.numpy() for name, m in recorder.moments.items()},
        recorder.residual, recorder.hidden, len(pairs),
    )  # fmt: skip


def norm_ranges(
    model: Any, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 16
) -> dict[str, float]:
    """Return norm name -> largest |value| over ``pairs``."""
    return dict(collect_calibration(model, pairs, batch_size).norms)


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Any, Any]:
    import torch

    length = max(len(row) for row in rows)
    ids = torch.zeros((len(rows), length), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[index, : len(row)] = 1
    return ids, mask
