"""The valid rows of a call, their factors, and the named tuples that the operator and its engines exchange.

Only this module knows segments: an engine sees rows, each with a factor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Gradients", "Inputs", "Need", "Options", "Result", "RowPlan", "dead_rows", "plan_rows", "segment_means", "wide_sum"
]  # fmt: skip

# Up to this many segments are summed by a one-hot product, which takes as many numbers per row.
ONE_HOT_SEGMENTS = 8


class Inputs(NamedTuple):
    """(N, D) states, (V, D) weight and (V,) bias or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class Options(NamedTuple):
    """The scalar options of the loss; with ``workspace_mb`` 0 the engine chooses the size of its buffers."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    logit_scale: float = 1.0
    softcap: float = 0.0
    workspace_mb: float = 0.0
    count_correct: bool = True


class Need(NamedTuple):
    """The inputs that need a gradient."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


class Gradients(NamedTuple):
    """Gradients of the inputs, each in its input's shape; None if it is not needed."""

    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None


class Result(NamedTuple):
    """The result of an engine's ``forward``.

    Attributes:
        losses: (M,) loss of every valid row in nats.
        correct: (M,) bool, whether the target's logit is the largest; all False if it is not counted.
        gradients: those of the total, in the accumulator's precision, for an engine that computes them here.
        stats: (2, M) float32 maximum and sum of exponentials (base 2), for an engine that recomputes.
    """

    losses: Tensor
    correct: Tensor
    gradients: Gradients = Gradients()
    stats: Tensor | None = None


class RowPlan(NamedTuple):
    """The valid rows of a call, M of N.

    Attributes:
        indices: (M,) int64 positions in the input.
        targets: (M,) int64.
        segments: (M,) int64.
        mean_factor: (M,) r_i / d_k, the row's share of its segment's mean.
        grad_factor: (M,) lambda_k r_i / d_k, the row's share of the total.
        counts: (K,) int64 valid rows of every segment.
    """

    indices: Tensor
    targets: Tensor
    segments: Tensor
    mean_factor: Tensor
    grad_factor: Tensor
    counts: Tensor


def wide_sum(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Return the type for long sums of ``dtype``: float64 if the device has it."""
    return dtype if device.type == "mps" else torch.float64


def dead_rows(factor: Tensor) -> Tensor:
    """Return the mask of rows that contribute nothing: not even their NaN reaches the loss or a gradient."""
    return factor == 0


def plan_rows(
    targets: Tensor,
    valid_indices: Tensor | None,
    segment_ids: Tensor | None,
    row_weights: Tensor | None,
    lambdas: Tensor,
    denominators: Tensor | None,
    ignore_index: int,
) -> RowPlan:
    """Gather the valid rows' targets and factors in O(N + K), without synchronisation if indices are given.

    A segment whose divisor is 0 has factors of 0; if the divisor is negative or not finite, they are NaN.
    """
    if valid_indices is None:
        valid_indices = (targets != ignore_index).nonzero().squeeze(1)
    valid_indices = valid_indices.long().contiguous()  # kernels read it as such
    n_segments, dtype = lambdas.shape[0], lambdas.dtype
    kept = targets.index_select(0, valid_indices).long()
    if segment_ids is None:
        segments = torch.zeros_like(kept)
    else:
        segments = segment_ids.index_select(0, valid_indices).long()
    if row_weights is None:
        weights = torch.ones(kept.shape, dtype=dtype, device=kept.device)
    else:
        weights = row_weights.index_select(0, valid_indices).to(dtype)
    counts = _segment_sums(torch.ones_like(segments), segments, n_segments)
    divisor = (
        _segment_sums(weights, segments, n_segments)
        if denominators is None
        else denominators.to(device=kept.device, dtype=dtype)
    )
    share = torch.where((divisor > 0) & torch.isfinite(divisor), 1.0 / divisor, torch.nan)
    share = share.masked_fill(divisor == 0, 0.0)
    mean_factor = weights * share.index_select(0, segments)
    grad_factor = mean_factor * lambdas.index_select(0, segments)
    return RowPlan(valid_indices, kept, segments, mean_factor, grad_factor, counts)


def segment_means(plan: RowPlan, losses: Tensor, correct: Tensor, n_segments: int) -> tuple[Tensor, Tensor]:
    """Reduce (M,) losses and hits to ((K,) means, (K,) int64 counts of hits), in a fixed order."""
    # A bad target gives NaN here if the row counts, but not if it is dead.
    share = (losses * plan.mean_factor).masked_fill(dead_rows(plan.mean_factor), 0.0)
    means = _segment_sums(share, plan.segments, n_segments)
    return means, _segment_sums(correct.long(), plan.segments, n_segments)


def _segment_sums(values: Tensor, segments: Tensor, n_segments: int) -> Tensor:
    """Sum (M,) ``values`` by segment into (K,), in a fixed order, which CUDA's scatter of floats does not have.

    Few segments are summed at once; many are sorted, because a buffer of K x M would be larger than the logits.
    """
    if n_segments <= ONE_HOT_SEGMENTS:
        member = segments.unsqueeze(0) == torch.arange(n_segments, device=values.device).unsqueeze(1)
        return torch.where(member, values.unsqueeze(0), values.new_zeros(())).sum(dim=1)
    if not values.is_floating_point():  # integers add up to the same in any order
        return values.new_zeros(n_segments).index_add_(0, segments, values)
    lengths = torch.zeros(n_segments, dtype=torch.int64, device=values.device)
    lengths.index_add_(0, segments, torch.ones_like(segments))
    ordered = values.index_select(0, segments.sort(stable=True).indices)
    wide = ordered.to(wide_sum(values.device, values.dtype))
    return torch.segment_reduce(wide, "sum", lengths=lengths, unsafe=True).to(values.dtype)
