"""The ``cublas`` engine: matrix products by the library over slices of rows, the rest in one Triton kernel.

One program owns one row: a first pass over its logits finds the maximum, the sum of exponentials, the
winner and the mean; a second writes the gradient of the logits. No atomics and no locks, so that a
repeated run gives the same bits. Computes in float32; the gradient of the logits, which lies in
about [-1, 1], is kept in the inputs' 16-bit type and the row factors stay out of it, so that no loss
scale can underflow it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbs_edge.kernels.rows import RowPlan
from sbs_edge.kernels.torch_engine import SliceResult, plan_slice_rows

__all__ = ["run_cublas"]

BLOCK = 4096


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def softmax_rows(  # type: ignore[no-untyped-def]
    logits, bias, targets, losses, hits, slopes,  # noqa: ANN001
    n_classes, smoothing, z_loss, softcap,  # noqa: ANN001
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, WRITE: tl.constexpr, BLOCK_V: tl.constexpr,
) -> None:  # fmt: skip
    """Losses and hits of (R, V) logits; with WRITE, dloss/dlogits into ``slopes`` (R, V)."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    lane = tl.arange(0, BLOCK_V)
    largest = -float("inf")
    total = 0.0
    summed = 0.0
    at_target = 0.0
    winner = n_classes + 0
    for start in range(0, n_classes, BLOCK_V):
        column = start + lane
        inside = column < n_classes
        z = tl.load(logits + row * n_classes + column, mask=inside, other=0.0)
        if HAS_BIAS:
            z += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_CAP:
            z = softcap * (1.0 - 2.0 / (tl.exp(2.0 * z / softcap) + 1.0))
        summed += tl.sum(tl.where(inside, z, 0.0), axis=0)
        at_target += tl.sum(tl.where(column == target, z, 0.0), axis=0)
        z = tl.where(inside, z, -float("inf"))
        here = tl.max(z, axis=0)
        place = tl.min(tl.where(z == here, column, n_classes), axis=0)
        winner = tl.where(here > largest, place, winner)
        higher = tl.maximum(largest, here)
        total = total * tl.exp(largest - higher) + tl.sum(tl.exp(z - higher), axis=0)
        largest = higher
    lse = largest + tl.log(total)
    loss = lse - (1.0 - smoothing) * at_target - smoothing * summed / n_classes + z_loss * lse * lse
    bad = (target < 0) | (target >= n_classes)
    tl.store(losses + row, tl.where(bad, float("nan"), loss))
    tl.store(hits + row, (winner == target).to(tl.int8))
    if WRITE:
        spread = 1.0 + 2.0 * z_loss * lse
        for start in range(0, n_classes, BLOCK_V):
            column = start + lane
            inside = column < n_classes
            z = tl.load(logits + row * n_classes + column, mask=inside, other=0.0)
            if HAS_BIAS:
                z += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
            t = z
            if HAS_CAP:
                t = 1.0 - 2.0 / (tl.exp(2.0 * z / softcap) + 1.0)
                z = softcap * t
            slope = spread * tl.exp(z - lse) - smoothing / n_classes
            slope -= tl.where(column == target, 1.0 - smoothing, 0.0)
            if HAS_CAP:
                slope *= 1.0 - t * t
            slope = tl.where(bad, float("nan"), slope)
            place = slopes + row * n_classes + column
            tl.store(place, slope.to(slopes.dtype.element_ty), mask=inside)


def run_cublas(
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
    """Compute what :func:`sbs_edge.kernels.torch_engine.run` does, with one launch for a slice's softmax.

    Raises:
        RuntimeError: the inputs are float64, which this engine would round.
    """
    if hidden.dtype == torch.float64:
        raise RuntimeError("The cublas engine computes in float32; use engine='torch' for float64.")
    low, device = hidden.dtype, hidden.device
    n_rows, (n_classes, width) = plan.indices.shape[0], weight.shape
    weight = weight.to(low)
    wide = weight.float()  # logits keep float32: a bfloat16 logit is off by up to 2^-9 of its size
    losses = torch.empty(n_rows, device=device)
    hits = torch.empty(n_rows, dtype=torch.int8, device=device)
    grads: list[Tensor | None] = [
        torch.zeros(shape, device=device) if needed else None
        for needed, shape in zip(need, (hidden.shape, (n_classes, width), (n_classes,)), strict=True)
    ]
    grad_hidden, grad_weight, grad_bias = grads
    step = plan_slice_rows(n_rows, n_classes, width, 4, workspace_mb, 2)
    buffer = torch.empty((min(step, n_rows), n_classes), device=device)
    slopes = buffer if low == torch.float32 else torch.empty_like(buffer, dtype=low)
    kernel: Any = softmax_rows
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        index = plan.indices[start:stop]
        rows = hidden.index_select(0, index)
        logits, slope = buffer[: stop - start], slopes[: stop - start]
        torch.mm(rows.float(), wide.t(), out=logits)
        logits.mul_(logit_scale)
        kernel[(stop - start,)](
            logits, logits if bias is None else bias, plan.targets[start:stop], losses[start:stop],
            hits[start:stop], slope, n_classes, label_smoothing, z_loss, softcap,
            HAS_BIAS=bias is not None, HAS_CAP=softcap > 0, WRITE=any(need),
            BLOCK_V=min(BLOCK, triton.next_power_of_2(n_classes)),
        )  # fmt: skip
        factor = plan.grad_factor[start:stop]
        if grad_weight is not None:
            # Factors that add up to one bound the product by the largest state: no float16 overflow.
            size = factor.abs().sum().clamp(min=torch.finfo(torch.float32).tiny)
            scaled = (rows * (factor / size).unsqueeze(1)).to(low)
            grad_weight.add_(torch.mm(slope.t(), scaled).float() * (size * logit_scale))
        if grad_bias is not None:
            grad_bias.addmv_(slope.t().float(), factor)
        if grad_hidden is not None:
            product = torch.mm(slope, weight).float() * (factor * logit_scale).unsqueeze(1)
            grad_hidden.index_copy_(0, index, product)
    return SliceResult(losses, hits.bool(), grad_hidden, grad_weight, grad_bias)
