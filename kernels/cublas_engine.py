"""The ``cublas`` engine: the library's matrix products over slices of rows, and the rest in one Triton kernel.

It is for GPUs before sm_80, on which Triton multiplies outside the tensor cores. Each program handles a row: a first
pass over its logits finds the maximum, the sum of exponentials, the winner and the mean; a second pass writes
the gradient of the logits. There are no atomics and no locks, so a repeated run gives the same bits.

If the library multiplies 16-bit operands into float32 (sm_80), logits are float32. On older GPUs,
float16 logits from the tensor cores are rounded to float16, as in plain torch; bfloat16 has
no tensor cores there and is multiplied in float32, with a slice of the weight at a time. The gradient of the
logits is in about [-1, 1]. It is stored in the inputs' 16-bit type without the row factors, so that no loss scale
can underflow it. In float16 it is multiplied by a power of two, because a flat softmax
over 250112 classes is 4e-6 and the smallest normal number 6e-5.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sbs_edge.kernels.launches import FLOAT16_GAIN, sum_rows
from sbs_edge.kernels.plan import Gradients, Inputs, Need, Options, Result, RowPlan, dead_rows
from sbs_edge.kernels.products import add_product, mixed_products, product
from sbs_edge.kernels.tiles import log_one_more, tanh
from sbs_edge.kernels.torch_engine import plan_slice_rows

__all__ = ["forward"]

BLOCK = 4096
CAST_BYTES = 16 << 20  # bytes of a slice of the weight in another type, or of dW in float32


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def softmax_rows(  # type: ignore[no-untyped-def]
    logits, bias, targets, factors, losses, hits, grads, gains,  # noqa: ANN001
    n_classes, scale, smoothing, z_loss, softcap,  # noqa: ANN001
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, WRITE: tl.constexpr, BLOCK_V: tl.constexpr,
) -> None:  # fmt: skip
    """Losses and hits of (R, V) logits; with WRITE, ``gains[0] * dloss/dlogits`` into ``grads`` (R, V).

    A row whose factor is 0 writes zeros, even if it has a NaN. The target's exponential is left out of the sum of
    the others: it is nearly all of a confident row's sum, and the row's loss and gradient depend on the others.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets + row)
    lane = tl.arange(0, BLOCK_V)
    largest = -float("inf")
    rest = 0.0
    summed = 0.0
    at_target = 0.0
    winner = n_classes + 0
    for start in range(0, n_classes, BLOCK_V):
        column = start + lane
        inside = column < n_classes
        z = tl.load(logits + row * n_classes + column, mask=inside, other=0.0) * scale
        if HAS_BIAS:
            z += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_CAP:
            z = softcap * tanh(z / softcap)
        summed += tl.sum(tl.where(inside, z, 0.0), axis=0)
        at_target += tl.sum(tl.where(column == target, z, 0.0), axis=0)
        z = tl.where(inside, z, -float("inf"))
        here = tl.max(z, axis=0)
        place = tl.min(tl.where(z == here, column, n_classes), axis=0)
        winner = tl.where(here > largest, place, winner)
        higher = tl.maximum(largest, here)
        # -inf only while every logit so far is -inf (a bias may ban classes): no -inf - -inf.
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        powers = tl.where(column == target, 0.0, tl.exp(z - shift))
        rest = rest * tl.exp(largest - shift) + tl.sum(powers, axis=0)
        largest = higher
    own = tl.exp(at_target - largest)
    total = own + rest
    natural = log_one_more(rest + (own - 1.0))
    lse = largest + natural
    loss = natural + (1.0 - smoothing) * (largest - at_target)
    if z_loss > 0.0:  # separate: the square of a large lse is infinite, and 0 * inf is NaN
        loss += z_loss * lse * lse
    if smoothing > 0.0:  # apart: a class banned by a bias of -inf must not make 0 * -inf
        loss += smoothing * (largest - summed / n_classes)
    bad = (target < 0) | (target >= n_classes)
    tl.store(losses + row, tl.where(bad, float("nan"), loss))
    tl.store(hits + row, (winner == target).to(tl.int8))
    if WRITE:
        excess = 2.0 * z_loss * lse
        share = (1.0 + excess) / total
        # (1 + excess) own / total - (1 - smoothing), without the difference
        goal = (own * excess - rest + smoothing * total) / total
        gain = tl.load(gains)
        dead = tl.load(factors + row) == 0.0
        for start in range(0, n_classes, BLOCK_V):
            column = start + lane
            inside = column < n_classes
            z = tl.load(logits + row * n_classes + column, mask=inside, other=0.0) * scale
            if HAS_BIAS:
                z += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
            t = z
            if HAS_CAP:
                t = tanh(z / softcap)
                z = softcap * t
            slope = tl.where(column == target, goal, share * tl.exp(z - largest)) - smoothing / n_classes
            if HAS_CAP:
                slope *= 1.0 - t * t
            slope = tl.where(dead, 0.0, tl.where(bad, float("nan"), slope * gain))
            place = grads + row * n_classes + column
            tl.store(place, slope.to(grads.dtype.element_ty), mask=inside)


def forward(inputs: Inputs, plan: RowPlan, options: Options, need: Need) -> Result:
    """Compute what :func:`sbs_edge.kernels.torch_engine.forward` does, with one launch for a slice's softmax.

    Raises:
        RuntimeError: the inputs are float64, which this engine would round.
    """
    hidden, weight, bias = inputs
    if hidden.dtype == torch.float64:
        raise RuntimeError("The cublas engine computes in float32; use engine='torch' for float64.")
    low, device = hidden.dtype, hidden.device
    n_rows, (n_classes, width) = plan.indices.shape[0], weight.shape
    losses = torch.empty(n_rows, device=device)
    hits = torch.empty(n_rows, dtype=torch.int8, device=device)
    grads = Gradients(
        torch.zeros(hidden.shape, device=device) if need.hidden else None,
        torch.zeros(weight.shape, device=device) if need.weight else None,
        torch.zeros(n_classes, dtype=torch.float64, device=device) if need.bias else None,
    )
    step = plan_slice_rows(n_rows, n_classes, width, 4, options.workspace_mb, 2)
    buffer = torch.empty((min(step, n_rows), n_classes), device=device)
    wide_grads = buffer if low == torch.float32 else torch.empty_like(buffer, dtype=low)
    # A power of two near the scale is exact and keeps T5's float16 logits (scale D ** -0.5) in range.
    early = 1.0
    if low == torch.float16 and not mixed_products(device):
        early = 2.0 ** min(0, round(math.log2(abs(options.logit_scale))))
    bias = bias if bias is None else bias.contiguous()
    gain = torch.full((1,), FLOAT16_GAIN if low == torch.float16 else 1.0, device=device)
    kernel: Any = softmax_rows
    for start in range(0, n_rows, step):
        here = slice(start, min(start + step, n_rows))
        index, factor = plan.indices[here], plan.grad_factor[here]
        rows = hidden.index_select(0, index)
        logits, logits_grad = buffer[: len(index)], wide_grads[: len(index)]
        for columns, part in _parts(weight, low):
            _score(logits[:, columns], rows * early if early != 1.0 else rows, part)
        rows.masked_fill_(dead_rows(factor).unsqueeze(1), 0.0)  # 0 * NaN is NaN
        if any(need) and low == torch.float16 and hidden.is_cuda and not mixed_products(device):
            gain = _bounded_gain(rows, weight)
        kernel[(len(index),)](
            logits, logits if bias is None else bias, plan.targets[here], factor, losses[here],
            hits[here], logits_grad, gain, n_classes, options.logit_scale / early, options.label_smoothing,
            options.z_loss, options.softcap,
            HAS_BIAS=bias is not None, HAS_CAP=options.softcap > 0, WRITE=any(need),
            BLOCK_V=min(BLOCK, triton.next_power_of_2(n_classes)),
        )  # fmt: skip
        if any(need):
            _accumulate(rows, logits_grad, weight, index, factor, options.logit_scale, gain, grads)
    narrow = None if grads.bias is None else grads.bias.float()
    return Result(losses, hits.bool(), grads._replace(bias=narrow))


def _parts(weight: Tensor, low: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of the weight in the type of the rows, so that there is never a whole copy."""
    n_classes, width = weight.shape
    span = max(1, CAST_BYTES // max(1, width * 4))
    for base in range(0, n_classes, span):
        columns = slice(base, min(base + span, n_classes))
        yield columns, weight[columns].to(low)


def _score(out: Tensor, rows: Tensor, part: Tensor) -> None:
    if rows.dtype == torch.bfloat16 and not mixed_products(rows.device):
        # A bfloat16 logit would be off by up to 2^-9 of its size, and old GPUs emulate the product.
        torch.mm(rows.float(), part.t().float(), out=out)
    elif rows.dtype == torch.float16 and not mixed_products(rows.device):
        out.copy_(torch.mm(rows, part.t()))
    else:
        product(out, rows, part.t())


def _bounded_gain(rows: Tensor, weight: Tensor) -> Tensor:
    """Return the gain, (1,) float32, with which no product that is rounded to float16 overflows.

    The magnitudes of a row's gradients by its logits add up to less than 4. So do a class's times the rows' factors,
    which add up to 1.
    """
    sizes = torch.stack([side.abs().float() for x in (rows, weight) for side in torch.aminmax(x)])
    room = torch.finfo(torch.float16).max / (4.0 * sizes.amax())
    return torch.exp2(torch.log2(room).floor()).clamp(1.0, FLOAT16_GAIN).reshape(1)


def _accumulate(
    rows: Tensor,
    logits_grad: Tensor,
    weight: Tensor,
    index: Tensor,
    factor: Tensor,
    logit_scale: float,
    gain: Tensor,
    grads: Gradients,
) -> None:
    """Add a slice of rows to the gradients: those of hidden and weight in float32, that of the bias in float64.

    ``logits_grad`` is (R, V), ``gain`` (1,) times the gradient of the rows' losses by their logits.
    """
    # With factors that add up to 1, the product is at most the largest state, so float16 does not overflow.
    size = factor.abs().sum().clamp(min=torch.finfo(torch.float32).tiny)
    scaled = (rows * (factor / size).unsqueeze(1)).to(rows.dtype)
    wide = torch.zeros(rows.shape, device=rows.device) if grads.hidden is not None else None
    for columns, part in _parts(weight, rows.dtype):
        here = logits_grad[:, columns]
        if grads.weight is not None:
            piece = torch.empty(part.shape, device=rows.device)
            product(piece, here.t(), scaled)
            grads.weight[columns].add_(piece.mul_(size * logit_scale / gain))
        if wide is not None:
            add_product(wide, here, part)
    if grads.bias is not None:
        grads.bias.add_(sum_rows(logits_grad, factor / gain))
    if grads.hidden is not None and wide is not None:
        grads.hidden.index_copy_(0, index, wide.mul_((factor * logit_scale / gain).unsqueeze(1)))
