"""The engine for CPUs and for everything without Triton: plain torch over slices of rows.

Gradients are made in the forward pass, slice by slice, while the slice's logits are still there, so
that 6NDV multiply-adds suffice (recomputing them would take 8NDV). Within a slice, the pointwise work
goes over a few rows at a time, which then stay in the second-level cache: at V = 32128 a row is 128 KB.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sbs_edge.kernels.plan import Gradients, Inputs, Need, Options, Result, RowPlan, dead_rows, wide_sum
from sbs_edge.kernels.products import weighted_column_sums

__all__ = ["forward", "plan_slice_rows"]

DEFAULT_WORKSPACE = 64 << 20
CACHE_BYTES = 1 << 20
PIECE_CLASSES = 8192
LOG2E = 1.4426950408889634


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


def forward(inputs: Inputs, plan: RowPlan, options: Options, need: Need) -> Result:
    """Compute the rows' losses and the gradients of the total that are needed.

    Low-precision inputs are computed and accumulated in float32, because CPUs emulate low-precision
    matrix products; gradients stay in the accumulator's precision so that a loss scale applied later
    is exact.
    """
    hidden, weight, bias = inputs
    device, on_cpu = hidden.device, hidden.device.type == "cpu"
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    n_rows, (n_classes, width) = plan.indices.shape[0], weight.shape
    wide = weight.to(dtype)
    offset = bias.to(dtype) if bias is not None else None
    losses = torch.empty(n_rows, dtype=dtype, device=device)
    correct = torch.empty(n_rows, dtype=torch.bool, device=device)
    grad_hidden = torch.zeros(hidden.shape, dtype=dtype, device=device) if need.hidden else None
    make = torch.empty if n_rows else torch.zeros  # the first slice writes it, the others add
    grad_weight = make((n_classes, width), dtype=dtype, device=device) if need.weight else None
    grad_bias = torch.zeros(n_classes, dtype=wide_sum(device, dtype), device=device) if need.bias else None
    capped = options.softcap > 0
    step = plan_slice_rows(
        n_rows, n_classes, width, dtype.itemsize, options.workspace_mb, 2 if capped else 1
    )  # fmt: skip
    buffer = torch.empty((min(step, n_rows), n_classes), dtype=dtype, device=device)
    slope_buffer = torch.empty_like(buffer) if capped and any(need) else None
    # On a CPU a few rows at a time stay in cache; elsewhere launches cost more than cache misses.
    inner = max(1, CACHE_BYTES // (n_classes * dtype.itemsize)) if on_cpu else step
    pieces = PIECE_CLASSES if on_cpu else n_classes
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        index, factor = plan.indices[start:stop], plan.grad_factor[start:stop]
        rows = hidden.index_select(0, index).to(dtype)
        if options.logit_scale != 1.0:
            rows = rows * options.logit_scale
        logits = buffer[: stop - start]
        torch.mm(rows, wide.t(), out=logits)
        losses[start:stop], correct[start:stop], coefficient = _pointwise(
            logits, offset, plan.targets[start:stop], factor,
            None if slope_buffer is None else slope_buffer[: stop - start], inner, options, any(need),
        )  # fmt: skip
        if not any(need):
            continue
        _clear_dead_rows(dead_rows(factor), logits, rows, coefficient)
        # dL/dlogits = coefficient * logits, row by row; the coefficient goes into the thin operand.
        if grad_weight is not None:
            scaled = rows.mul(coefficient.unsqueeze(1))
            # By pieces on a CPU: the tall product of a transposed buffer is faster so.
            for base in range(0, n_classes, pieces):
                columns = slice(base, base + pieces)
                if start:
                    grad_weight[columns].addmm_(logits[:, columns].t(), scaled)
                else:
                    torch.mm(logits[:, columns].t(), scaled, out=grad_weight[columns])
        if grad_bias is not None:
            grad_bias += weighted_column_sums(logits, coefficient)
        if grad_hidden is not None:
            product = torch.mm(logits, wide).mul_((coefficient * options.logit_scale).unsqueeze(1))
            grad_hidden.index_copy_(0, index, product)
    narrow = None if grad_bias is None else grad_bias.to(dtype)
    return Result(losses, correct, Gradients(grad_hidden, grad_weight, narrow))


def _clear_dead_rows(dead: Tensor, logits: Tensor, rows: Tensor, coefficient: Tensor) -> None:
    """Set the factors of rows without weight to zero in the products, because 0 * NaN is NaN."""
    if dead.device.type == "cpu":
        if dead.any():
            logits[dead] = 0.0
            rows[dead] = 0.0
            coefficient[dead] = 0.0
    else:  # asking a device whether there are any would wait for it
        logits.masked_fill_(dead.unsqueeze(1), 0.0)
        rows.masked_fill_(dead.unsqueeze(1), 0.0)
        coefficient.masked_fill_(dead, 0.0)


class _RowSums(NamedTuple):
    """The sums of every row of a slice, each (R,), from which the loss and the factor of its gradient follow.

    Attributes:
        largest: the largest logit z.
        gap: ``largest - z[target]``.
        rest: the sum of ``exp(z - largest)`` over all classes but the target.
        depth: ``mean(largest - z)``; filled only if labels are smoothed.
        hit: whether the target is the largest, the first of equal ones.
    """

    largest: Tensor
    gap: Tensor
    rest: Tensor
    depth: Tensor
    hit: Tensor


class _RowFactors(NamedTuple):
    """Values derived from a row's sums, each (R,); its gradient is ``spread / total`` times :func:`_to_gradient`'s.

    Attributes:
        total: the sum of ``exp(z - largest)``.
        log_total: its logarithm.
        lse: ``largest + log_total``.
        spread: ``dlse'/dlse``, where ``lse' = lse + z_loss * lse^2``.
        at_target: the target's own entry, before smoothing is subtracted from every class.
    """

    total: Tensor
    log_total: Tensor
    lse: Tensor
    spread: Tensor
    at_target: Tensor


def _row_factors(sums: _RowSums, label_smoothing: float, z_loss: float) -> _RowFactors:
    """Return the values derived from ``sums``, without a difference of nearly equal numbers.

    A confident row's sum is almost entirely its target's. Its loss and its gradient depend on the others, which a
    common sum would round away.
    """
    own = torch.exp(-sums.gap)
    total = own + sums.rest
    log_total = torch.log1p(sums.rest + (own - 1.0))
    lse = sums.largest + log_total
    # dloss/dz = p spread - (1 - eps) onehot - eps / V, and p = exp(z - largest) / total
    excess = 2.0 * z_loss * lse
    spread = 1.0 + excess
    # It divides here what the row's factor multiplies: kept as far from 0 as its rounding may be off.
    least = torch.finfo(spread.dtype).eps
    spread = spread.masked_fill(spread.abs() < least, least)
    at_target = (own * excess - sums.rest + label_smoothing * total) / spread
    return _RowFactors(total, log_total, lse, spread, at_target)


def _to_gradient(
    powers: Tensor, column: Tensor, slope: Tensor | None, factors: _RowFactors, label_smoothing: float
) -> None:
    """Turn ``exp(z - largest)`` of all but the target in place into the gradient, up to a factor per row."""
    powers.scatter_(1, column, factors.at_target.unsqueeze(1))
    if label_smoothing:
        share = factors.total / factors.spread * (label_smoothing / powers.shape[1])
        powers.sub_(share.unsqueeze(1))
    if slope is not None:
        powers.mul_(slope)


def _pointwise(
    logits: Tensor,
    offset: Tensor | None,
    targets: Tensor,
    factor: Tensor,
    slope: Tensor | None,
    inner: int,
    options: Options,
    any_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn ``logits`` in place into the gradient, up to a factor per row; return (loss, hit, factor).

    The wide buffer is processed ``inner`` rows at a time, but the values per row all at once: there
    are hundreds of pieces, and a dozen small operators on each would cost as much as the exponential.
    """
    label_smoothing, z_loss, _, softcap, _, count = options
    n_rows, n_classes = logits.shape
    bad = (targets < 0) | (targets >= n_classes)
    column = targets.clamp(0, n_classes - 1).unsqueeze(1)
    largest, gap, rest, depth = (logits.new_empty(n_rows) for _ in range(4))
    sums = _RowSums(largest, gap, rest, depth, torch.empty_like(bad))
    # With smoothing or a cap the gradient takes more passes, made while the piece is in the cache.
    at_once = label_smoothing == 0.0 and slope is None
    for low in range(0, n_rows, inner):
        here = slice(low, low + inner)
        piece, place = logits[here], column[here]
        steep = None if slope is None else slope[here]
        known = _RowSums(*(x[here] for x in sums))
        _exponentials(piece, offset, place, steep, softcap, label_smoothing > 0, count, known)
        if any_grad and not at_once:
            _to_gradient(piece, place, steep, _row_factors(known, label_smoothing, z_loss), label_smoothing)
    factors = _row_factors(sums, label_smoothing, z_loss)
    loss = factors.log_total + (1.0 - label_smoothing) * sums.gap.masked_fill(bad, torch.nan)
    if z_loss:  # separate: the square of a large lse is infinite, and 0 * inf would be NaN
        loss = loss + z_loss * factors.lse.square()
    if label_smoothing:
        loss = loss + label_smoothing * sums.depth
    if any_grad and at_once:
        _to_gradient(logits, column, None, factors, label_smoothing)
    coefficient = (factor * factors.spread / factors.total).masked_fill(bad & (factor != 0), torch.nan)
    return loss, sums.hit & ~bad, coefficient


def _exponentials(
    logits: Tensor,
    offset: Tensor | None,
    column: Tensor,
    slope: Tensor | None,
    softcap: float,
    mean: bool,
    count: bool,
    sums: _RowSums,
) -> None:
    """Turn a few rows of ``logits`` in place into ``exp(z - max)``, 0 at the target, and fill their ``sums``.

    There are five passes: the maximum, the difference, its factor, the power of two, the sum. Powers of two and the
    factor's pass together take half the time of powers of e. The target's own logit is kept apart: the
    maximum of the others tells whether it is the largest (on a CPU torch's maximum with its position takes many
    times as long as the maximum alone), and their sum gives a confident row's loss.
    """
    if offset is not None:
        logits.add_(offset)
    if softcap:
        logits.div_(softcap).tanh_()
        if slope is not None:
            torch.square(logits, out=slope).neg_().add_(1.0)  # d softcap(u) / d u = 1 - tanh(u / c)^2
        logits.mul_(softcap)
    own = logits.gather(1, column)
    logits.scatter_(1, column, -torch.inf)
    others = logits.amax(dim=1, keepdim=True)
    largest = torch.maximum(own, others)
    sums.largest.copy_(largest.squeeze(1))
    torch.sub(largest, own, out=sums.gap.unsqueeze(1))
    torch.gt(own, others, out=sums.hit.unsqueeze(1))
    # The first of several largest logits wins, and only a search finds it; equal logits are rare, but
    # asking a device whether there are any would wait for it.
    tied = own == others
    if not count:
        sums.hit.zero_()
    elif logits.device.type != "cpu" or tied.any():
        first = logits.scatter_(1, column, own).argmax(dim=1, keepdim=True)
        sums.hit.logical_or_((tied & (first == column)).squeeze(1))
        logits.scatter_(1, column, -torch.inf)
    logits.sub_(largest)
    if mean:
        torch.sum(logits.scatter_(1, column, 0.0), dim=1, out=sums.depth)
        sums.depth.sub_(sums.gap).div_(-logits.shape[1])
        logits.scatter_(1, column, -torch.inf)
    torch.sum(logits.mul_(LOG2E).exp2_(), dim=1, out=sums.rest)
