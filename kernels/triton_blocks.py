"""The ``triton`` engine's other order, for more rows than classes: blocks of rows, gradients in the forward pass.

For a block of rows the tiles' exponentials over the whole vocabulary are kept, each tile's relative to
its own maximum (rows x V in the inputs' type: a rounded exponential is off by 2^-9 of itself, a rounded
bfloat16 logit z by 2^-9 |z|). When the rows' sums are known one pass turns them into ``P = gain *
dloss/dlogits`` in place, and the library multiplies ``dW += P^T X`` in float32 and ``dX = P W``, written
once. 6 N D V operations, where slices of the vocabulary take 8; dW is read and written once a block, so
blocks must be few. The idea of keeping exponentials instead of logits is QuACK's.

Factors of the rows are handled as in :mod:`sbs_edge.kernels.triton_engine`. The gradients are those of a
unit total: dW in float32, dX in the inputs' type, or in float32 for float16, whose range is short.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from sbs_edge.kernels import orders
from sbs_edge.kernels.products import add_product, product, whole_sums
from sbs_edge.kernels.rows import RowPlan
from sbs_edge.kernels.tiles import spread_kernel, strip_kernel
from sbs_edge.kernels.torch_engine import SliceResult
from sbs_edge.kernels.triton_engine import (
    FLOAT16_GAIN,
    Launch,
    Options,
    launch_of,
    on_device,
    settle,
    split_factors,
)

__all__ = ["hidden_dtype", "run"]

SPREAD_COLUMNS = 4096


def hidden_dtype(low: torch.dtype) -> torch.dtype:
    """Return the type in which dX waits for its backward pass, for states of type ``low``."""
    return torch.float32 if low == torch.float16 else low


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
    """Return losses, hits and the gradients of a unit total that ``need`` (hidden, weight, bias) names.

    Raises:
        RuntimeError: the inputs are float64, which this engine would round, or the logits are capped.
    """
    options = Options(label_smoothing, z_loss, logit_scale, softcap, workspace_mb)
    if softcap:
        raise RuntimeError(
            "Blocks of rows keep exponentials, which do not tell a soft cap's slope: take slices of the vocabulary."
        )
    launch = launch_of("kept", hidden, bias, plan, options)
    n_rows, n_classes, device = plan.indices.shape[0], weight.shape[0], hidden.device
    losses = torch.empty(n_rows, device=device)
    hits = torch.empty(n_rows, dtype=torch.int8, device=device)
    kinds = (hidden_dtype(hidden.dtype), torch.float32, torch.float32)
    shapes = (hidden.shape, weight.shape, (n_classes,))
    made = (torch.zeros, torch.zeros if n_rows == 0 else torch.empty, torch.zeros)
    grads = [
        make(shape, dtype=kind, device=device) if needed else None
        for make, needed, shape, kind in zip(made, need, shapes, kinds, strict=True)
    ]
    if n_rows:
        with on_device(device), whole_sums():
            _blocks(launch, weight, losses, hits, grads)
    return SliceResult(losses, hits.bool(), *grads)


def _blocks(launch: Launch, weight: Tensor, losses: Tensor, hits: Tensor, grads: list[Tensor | None]) -> None:
    _, hidden, _, plan, options = launch
    grad_hidden, grad_weight, grad_bias = grads
    low, device = hidden.dtype, hidden.device
    n_rows, (n_classes, width) = plan.indices.shape[0], weight.shape
    need = orders.Need(n_classes, width, low.itemsize, weight.dtype.itemsize)
    budget = orders.budget_of(hidden.shape[0], need, options.workspace_mb)
    step = orders.plan_rows_at_once(n_rows, need, budget)

    bad = ((plan.targets < 0) | (plan.targets >= n_classes)) & (plan.grad_factor != 0)
    factors = plan.grad_factor.masked_fill(bad, torch.nan)
    gains, relative, common = split_factors(factors, bad, options.logit_scale, low)
    whole = weight.to(low)
    kept = torch.empty((step, n_classes), dtype=low, device=device)
    n_tiles = triton.cdiv(n_classes, launch.tile.columns)
    partials = torch.empty(4 * step * n_tiles, device=device)
    stats = torch.empty((2, step), device=device)
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        here = slice(start, stop)
        slopes = kept[: stop - start]
        sums = partials[: 4 * (stop - start) * n_tiles].view(4, stop - start, n_tiles)
        _scores(launch, whole, start, sums, slopes)
        settle(launch, whole, start, sums, losses[here], hits[here], stats)
        _spread(launch, start, sums, stats, gains[here], slopes)
        rows = hidden.index_select(0, plan.indices[here])
        if common is not None:
            rows.mul_(relative[here].unsqueeze(1))
        add = add_product if start else product
        if grad_weight is not None:
            add(grad_weight, slopes.t(), rows)
        if grad_bias is not None:
            add(grad_bias.unsqueeze(1), slopes.t(), relative[here].to(low).unsqueeze(1))
        if grad_hidden is not None:
            piece = torch.empty(rows.shape, dtype=grad_hidden.dtype, device=device)
            product(piece, slopes, whole)
            if common is not None:
                piece.mul_((factors[here] * (options.logit_scale / FLOAT16_GAIN)).unsqueeze(1))
            grad_hidden.index_copy_(0, plan.indices[here], piece)
    if grad_weight is not None and common is not None:
        grad_weight.mul_(common * options.logit_scale)
    if grad_bias is not None:
        grad_bias.mul_(1.0 / options.logit_scale if common is None else common)


def _scores(launch: Launch, weight: Tensor, start: int, sums: Tensor, kept: Tensor) -> None:
    """Every tile's exponentials of a block of rows into ``kept``, and its statistics into ``sums``."""
    tile, hidden, _, plan, options = launch
    kernel: Any = strip_kernel
    n_rows, (n_classes, width) = kept.shape[0], weight.shape
    kernel[(triton.cdiv(n_rows, tile.rows), sums.shape[2])](
        hidden, weight, launch.offset(0), plan.indices[start:], sums, kept,
        n_rows, 0, n_classes, width, *hidden.stride(), *weight.stride(), kept.stride(0),
        options.logit_scale, options.softcap, 1, sums.shape[2],
        SUM=options.label_smoothing > 0, CARRY=False, KEEP=True, EVEN_V=n_classes % tile.columns == 0,
        **launch.flags,
    )  # fmt: skip


def _spread(launch: Launch, start: int, sums: Tensor, stats: Tensor, gains: Tensor, kept: Tensor) -> None:
    """The exponentials of a block become the gradient of its logits."""
    kernel: Any = spread_kernel
    options = launch.options
    n_rows, n_classes = kept.shape
    block = min(SPREAD_COLUMNS, triton.next_power_of_2(n_classes))
    kernel[(n_rows, triton.cdiv(n_classes, block))](
        kept, launch.plan.targets[start:], sums, stats[0], stats[1], gains.contiguous(),
        n_rows, n_classes, sums.shape[2], kept.stride(0),
        1.0 - options.label_smoothing, options.label_smoothing / n_classes, options.z_loss,
        TILE_V=launch.tile.columns, BLOCK_V=block,
    )  # fmt: skip
