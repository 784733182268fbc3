"""Which rows count, and with what factor: everything about segments that no engine needs to know."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["RowPlan", "plan_rows", "segment_means"]


class RowPlan(NamedTuple):
    """The valid rows of one call, M of N.

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


def plan_rows(
    targets: Tensor,
    valid_indices: Tensor | None,
    segment_ids: Tensor | None,
    row_weights: Tensor | None,
    lambdas: Tensor,
    denominators: Tensor | None,
    ignore_index: int,
) -> RowPlan:
    """Gather the valid rows' targets and factors; O(N), no synchronisation when indices are given.

    A segment whose divisor is 0 has factors of 0; one whose divisor is negative or not finite, of NaN.
    """
    if valid_indices is None:
        valid_indices = (targets != ignore_index).nonzero().squeeze(1)
    valid_indices = valid_indices.long().contiguous()  # kernels read it as such
    n_segments = lambdas.shape[0]
    dtype = lambdas.dtype
    kept = targets.index_select(0, valid_indices).long()
    if segment_ids is None:
        segments = torch.zeros_like(kept)
    else:
        segments = segment_ids.index_select(0, valid_indices).long()
    if row_weights is None:
        weights = torch.ones(kept.shape, dtype=dtype, device=kept.device)
    else:
        weights = row_weights.index_select(0, valid_indices).to(dtype)
    # A one-hot product instead of a scatter: CUDA's scatter adds in no fixed order, and K is small.
    member = segments.unsqueeze(0) == torch.arange(n_segments, device=kept.device).unsqueeze(1)
    counts = member.sum(dim=1)
    sums = torch.where(member, weights.unsqueeze(0), weights.new_zeros(())).sum(dim=1)
    divisor = sums if denominators is None else denominators.to(device=kept.device, dtype=dtype)
    share = torch.where((divisor > 0) & torch.isfinite(divisor), 1.0 / divisor, torch.nan)
    share = share.masked_fill(divisor == 0, 0.0)
    mean_factor = weights * share.index_select(0, segments)
    grad_factor = mean_factor * lambdas.index_select(0, segments)
    return RowPlan(valid_indices, kept, segments, mean_factor, grad_factor, counts)


def segment_means(plan: RowPlan, losses: Tensor, correct: Tensor, n_segments: int) -> tuple[Tensor, Tensor]:
    """Reduce (M,) losses and hits to ((K,) means, (K,) int64 counts of hits), in a fixed order."""
    member = plan.segments.unsqueeze(0) == torch.arange(n_segments, device=losses.device).unsqueeze(1)
    # A row with factor 0 must not spread a NaN of its own; a bad target of a counted row must.
    share = (losses * plan.mean_factor).masked_fill(plan.mean_factor == 0, 0.0)
    means = torch.where(member, share.unsqueeze(0), share.new_zeros(())).sum(dim=1)
    return means, (member & correct.unsqueeze(0)).sum(dim=1)
