"""The engine for CPUs and for everything without Triton: plain torch over slices of rows.

Gradients are made in the forward pass, slice by slice, while the slice's logits are still there, so
that 6NDV multiply-adds suffice (recomputing them would take 8NDV). Within a slice, the pointwise work
goes over a few rows at a time, which then stay in the second-level cache: at V = 32128 a row is 128 KB.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sbs_edge.kernels.rows import RowPlan

__all__ = ["SliceResult", "plan_slice_rows", "run"]

DEFAULT_WORKSPACE = 64 << 20
CACHE_BYTES = 1 << 20


class SliceResult(NamedTuple):
    """(M,) losses, (M,) whether the target's logit is the largest, and gradients for a unit total."""

    losses: Tensor
    correct: Tensor
    grad_hidden: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None


def plan_slice_rows(
    n_rows: int, n_classes: int, width: int, itemsize: int, workspace_mb: float, buffers: int = 1
) -> int:
    """Return how many rows of logits to hold at once.

    Each slice reads the weight and reads and writes its gradient once, so the default grows with the
    weight: half its bytes, at least 64 MiB.
    """
    budget = (
        workspace_mb * 2**20
        if workspace_mb > 0
        else max(DEFAULT_WORKSPACE, n_classes * width * itemsize // 2)
    )
    fitting = int(budget // (n_classes * itemsize * buffers))
    return max(1, min(max(n_rows, 1), fitting))


def run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: RowPlan,
    *,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    softcap: float,
    workspace_mb: float,
    need: tuple[bool, bool, bool],
) -> SliceResult:
    """Compute losses and, where ``need`` (hidden, weight, bias) says so, gradients of the total.

    Low-precision inputs are computed and accumulated in float32, because CPUs emulate low-precision
    matrix products; gradients stay in the accumulator's precision so that a loss scale applied later
    is exact.
    """
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    n_rows, (n_classes, width) = plan.indices.shape[0], weight.shape
    wide = weight.to(dtype)
    offset = bias.to(dtype) if bias is not None else None
    need_hidden, need_weight, need_bias = need
    any_grad = any(need)
    losses = torch.empty(n_rows, dtype=dtype, device=hidden.device)
    correct = torch.empty(n_rows, dtype=torch.bool, device=hidden.device)
    grad_hidden = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device) if need_hidden else None
    grad_weight = torch.zeros((n_classes, width), dtype=dtype, device=hidden.device) if need_weight else None
    grad_bias = torch.zeros(n_classes, dtype=dtype, device=hidden.device) if need_bias else None
    step = plan_slice_rows(n_rows, n_classes, width, wide.element_size(), workspace_mb, 2 if softcap else 1)
    buffer = torch.empty((min(step, n_rows), n_classes), dtype=dtype, device=hidden.device)
    slope_buffer = torch.empty_like(buffer) if softcap and any_grad else None
    # On a CPU a few rows at a time stay in cache; elsewhere launches cost more than cache misses.
    inner = max(1, CACHE_BYTES // (n_classes * wide.element_size())) if hidden.device.type == "cpu" else step

    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        index = plan.indices[start:stop]
        rows = hidden.index_select(0, index).to(dtype)
        if logit_scale != 1.0:
            rows = rows * logit_scale
        logits = buffer[: stop - start]
        torch.mm(rows, wide.t(), out=logits)
        coefficient = torch.empty(stop - start, dtype=dtype, device=hidden.device)
        for low in range(0, stop - start, inner):
            high = min(low + inner, stop - start)
            here = slice(start + low, start + high)
            losses[here], correct[here], coefficient[low:high] = _pointwise(
                logits[low:high], offset, plan.targets[here], plan.grad_factor[here],
                None if slope_buffer is None else slope_buffer[low:high],
                label_smoothing, z_loss, softcap, any_grad,
            )  # fmt: skip
        if not any_grad:
            continue
        # dL/dlogits = coefficient * logits, row by row; the coefficient goes into the thin operand.
        if grad_weight is not None:
            grad_weight.addmm_(logits.t(), rows * coefficient.unsqueeze(1))
        if grad_bias is not None:
            grad_bias.addmv_(logits.t(), coefficient)
        if grad_hidden is not None:
            product = torch.mm(logits, wide).mul_((coefficient * logit_scale).unsqueeze(1))
            grad_hidden.index_copy_(0, index, product)
    return SliceResult(losses, correct, grad_hidden, grad_weight, grad_bias)


def _pointwise(
    logits: Tensor,
    offset: Tensor | None,
    targets: Tensor,
    factor: Tensor,
    slope: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    any_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn ``logits`` in place into the gradient up to a factor a row; return (loss, hit, factor)."""
    n_classes = logits.shape[1]
    if offset is not None:
        logits.add_(offset)
    if softcap:
        logits.div_(softcap).tanh_()
        if slope is not None:
            torch.square(logits, out=slope).neg_().add_(1.0)  # d softcap(u) / d u = 1 - tanh(u / c)^2
        logits.mul_(softcap)
    bad = (targets < 0) | (targets >= n_classes)
    column = targets.clamp(0, n_classes - 1).unsqueeze(1)
    largest, winner = logits.max(dim=1)
    at_target = logits.gather(1, column).squeeze(1).masked_fill(bad, torch.nan)
    mean_logit = logits.mean(dim=1) if label_smoothing else at_target
    logits.sub_(largest.unsqueeze(1)).exp_()
    total = logits.sum(dim=1)
    lse = largest + total.log()
    loss = lse - (1.0 - label_smoothing) * at_target - label_smoothing * mean_logit + z_loss * lse.square()
    # dloss/dz = p (1 + 2 z_loss lse) - (1 - eps) onehot - eps / V, and p = logits / total
    spread = 1.0 + 2.0 * z_loss * lse
    coefficient = factor * spread / total
    coefficient = coefficient.masked_fill(bad & (factor != 0), torch.nan)
    if any_grad:
        unit = (total / spread).unsqueeze(1)
        logits.scatter_add_(1, column, (label_smoothing - 1.0) * unit)
        if label_smoothing:
            logits.sub_(unit * (label_smoothing / n_classes))
        if slope is not None:
            logits.mul_(slope)
    return loss, (winner == column.squeeze(1)) & ~bad, coefficient
