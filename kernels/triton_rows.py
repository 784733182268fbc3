"""The ``triton`` engine over chunks of rows, for more rows than classes: the forward pass computes gradients.

For a chunk of rows the tiles' exponentials over the whole vocabulary are stored, each tile's relative to
its own maximum (rows x V in the inputs' type: a rounded exponential is off by 2^-9 of itself, a rounded
bfloat16 logit z by 2^-9 |z|). When the rows' sums are known, a pass turns them into ``P = gain *
dloss/dlogits`` in place, and the library computes ``dW += P^T X`` in float32 and ``dX = P W``, written
once. This takes 6 N D V operations, against 8 with chunks of the vocabulary. dW is read and written once per chunk, so
there must be few chunks. The idea of storing exponentials instead of logits is QuACK's.

The gradients are those of the total: dW in float32, and dX in the inputs' type, or in float32 for float16,
which has a small range.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from sbs_edge.kernels import chunks, launches
from sbs_edge.kernels.plan import Gradients, Inputs, Need, Options, Result, RowPlan
from sbs_edge.kernels.products import add_product, product
from sbs_edge.kernels.tiles import probs_to_grad

__all__ = ["forward", "hidden_dtype"]

GRAD_COLUMNS = 4096


def hidden_dtype(low: torch.dtype) -> torch.dtype:
    """Return the type in which dX is stored until the backward pass, for states of type ``low``."""
    return torch.float32 if low == torch.float16 else low


def forward(inputs: Inputs, plan: RowPlan, options: Options, need: Need) -> Result:
    """Return losses, hits and the gradients of the total that ``need`` names.

    Raises:
        RuntimeError: the inputs are float64, which this engine would round, or the logits are capped.
    """
    if options.softcap:
        raise RuntimeError(
            "Chunks of rows keep exponentials, from which a soft cap's derivative cannot be recovered: use chunks of the "
            "vocabulary."
        )
    hidden, weight, _ = inputs
    n_rows, n_classes, device = plan.indices.shape[0], weight.shape[0], hidden.device
    launch = launches.launch_of("kept", inputs, n_rows, options)
    losses = torch.empty(n_rows, device=device)
    hits = torch.empty(n_rows, dtype=torch.int8, device=device)
    kind = hidden_dtype(hidden.dtype)
    make = torch.empty if n_rows else torch.zeros  # the first chunk writes it, the others add
    grads = Gradients(
        torch.zeros(hidden.shape, dtype=kind, device=device) if need.hidden else None,
        make(weight.shape, device=device) if need.weight else None,
        torch.zeros(n_classes, dtype=torch.float64, device=device) if need.bias else None,
    )
    if n_rows:
        with launches.on_device(device):
            _chunks(launch, plan, losses, hits, grads)
    narrow = None if grads.bias is None else grads.bias.float()
    return Result(losses, hits.bool(), grads._replace(bias=narrow))


def _chunks(launch: launches.Launch, plan: RowPlan, losses: Tensor, hits: Tensor, grads: Gradients) -> None:
    (hidden, weight, _), options = launch.inputs, launch.options
    low, device = hidden.dtype, hidden.device
    n_rows, (n_classes, width) = plan.indices.shape[0], weight.shape
    head = chunks.Head(n_classes, width, low.itemsize, weight.dtype.itemsize)
    budget = chunks.budget_of(hidden.shape[0], head, options.workspace_mb)
    step = chunks.plan_rows_at_once(n_rows, head, budget)

    factors = launches.split_factors(plan.grad_factor, plan.targets, n_classes, options.logit_scale, low)
    common = factors.common
    whole = weight.to(low)
    kept = torch.empty((step, n_classes), dtype=low, device=device)
    n_tiles = triton.cdiv(n_classes, launch.tile.columns)
    sums = torch.empty(4 * step * n_tiles, device=device)
    stats = torch.empty((2, step), device=device)
    for start in range(0, n_rows, step):
        here = slice(start, min(start + step, n_rows))
        indices, targets = plan.indices[here], plan.targets[here]
        probs = kept[: len(indices)]
        partials = sums[: 4 * len(indices) * n_tiles].view(4, len(indices), n_tiles)
        launches.softmax_partials(launch, whole, 0, indices, partials, 1, probs)
        launches.combine(launch, indices, targets, partials, losses[here], hits[here], stats)
        _probs_to_grad(launch, targets, partials, stats, factors.gains[here], probs)
        rows = factors.rows(hidden, indices, here)
        if grads.weight is not None:
            (add_product if start else product)(grads.weight, probs.t(), rows)
        if grads.bias is not None:
            grads.bias.add_(launches.sum_rows(probs, factors.relative[here]))
        if grads.hidden is not None:
            piece = torch.empty(rows.shape, dtype=grads.hidden.dtype, device=device)
            product(piece, probs, whole)
            if common is not None:
                scale = options.logit_scale / launches.FLOAT16_GAIN
                piece.mul_((factors.whole[here] * scale).unsqueeze(1))
            grads.hidden.index_copy_(0, indices, piece)
    if grads.weight is not None and common is not None:
        grads.weight.mul_(common * options.logit_scale)
    if grads.bias is not None:
        grads.bias.mul_(1.0 / options.logit_scale if common is None else common)


def _probs_to_grad(
    launch: launches.Launch, targets: Tensor, partials: Tensor, stats: Tensor, gains: Tensor, probs: Tensor
) -> None:
    """Turn the exponentials of a chunk into the gradient of its logits."""
    kernel: Any = probs_to_grad
    options = launch.options
    n_rows, n_classes = probs.shape
    block = min(GRAD_COLUMNS, triton.next_power_of_2(n_classes))
    kernel[(n_rows, triton.cdiv(n_classes, block))](
        probs, targets, partials, stats[0], stats[1], gains,
        n_rows, n_classes, partials.shape[2], probs.stride(0),
        1.0 - options.label_smoothing, options.label_smoothing / n_classes, options.z_loss,
        TILE_V=launch.tile.columns, BLOCK_V=block,
    )  # fmt: skip
