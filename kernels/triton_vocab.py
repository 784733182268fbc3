"""The ``triton`` engine over chunks of the vocabulary: logits stay in registers, the backward pass computes gradients.

Forward: one pass of tiles over the valid rows and the whole vocabulary (2 N D V operations) gives two
numbers per row, the maximum and the sum of exponentials. Without gradients that is all. Backward (6 N D V):
for each slice of the vocabulary a kernel computes the scores again and writes ``P = gain * dloss/dlogits``,
an M x columns buffer in the inputs' type. The library multiplies it into ``dW[slice]``, which is
written once and summed in float32 without a float32 copy of dW, and adds ``P W[slice]`` to dX in float32.
Slices of the vocabulary have N / V of the accumulator traffic of slices of rows. They were requested in
PyTorch's pull request 175039.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sbs_edge.kernels import launches, tile_table
from sbs_edge.kernels.chunks import plan_columns, whole_waves
from sbs_edge.kernels.plan import Gradients, Inputs, Need, Options, Result, RowPlan
from sbs_edge.kernels.products import add_product, product
from sbs_edge.kernels.tiles import logits_grad

__all__ = ["SavedRows", "backward", "forward", "plan_strips"]

# A strip's start and end cost about as much as this many tiles: the first loads, and its four numbers per row.
STRIP_TILES = 0.25
MOST_STRIPS = 64


class SavedRows(NamedTuple):
    """The values of the M valid rows that the backward pass needs.

    Attributes:
        indices: (M,) int64 positions in the input.
        targets: (M,) int64.
        peaks: (M,) float32 largest score, base 2.
        sums: (M,) float32 sum of exponentials relative to it.
        factors: (M,) float32 share of the total.
    """

    indices: Tensor
    targets: Tensor
    peaks: Tensor
    sums: Tensor
    factors: Tensor


def plan_strips(n_row_blocks: int, n_tiles: int, slots: int) -> int:
    """Return the number of strips into which ``n_tiles`` tiles of the vocabulary are cut.

    Every row block and strip is a program, and ``slots`` programs run at once. The number is the one with
    which the waves of programs, each as long as its strip, take least time.

    Example:
        >>> plan_strips(n_row_blocks=32, n_tiles=251, slots=264)  # 8 strips: 256 programs, one wave
        8
    """

    def cost(strips: int) -> float:
        waves = -(-max(n_row_blocks, 1) * strips // slots)
        return waves * (-(-n_tiles // strips) + STRIP_TILES)

    return min(range(1, min(n_tiles, MOST_STRIPS) + 1), key=cost)


def forward(inputs: Inputs, plan: RowPlan, options: Options, need: Need) -> Result:
    """Return the rows' losses and hits, and the values of the softmax that the backward pass needs.

    Raises:
        RuntimeError: the inputs are float64, which this engine would round.
    """
    hidden, weight, _ = inputs
    n_rows = plan.indices.shape[0]
    launch = launches.launch_of("softmax", inputs, n_rows, options)
    device, (n_classes, width) = hidden.device, weight.shape
    losses = torch.empty(n_rows, device=device)
    hits = torch.empty(n_rows, dtype=torch.int8, device=device)
    stats = torch.zeros((2, n_rows), device=device)
    if n_rows == 0:
        return Result(losses, hits.bool(), stats=stats)
    tile, span = launch.tile, n_classes
    if weight.dtype != hidden.dtype:  # only a slice of the weight is ever cast
        cast_bytes = tile_table.tuning().cast_bytes
        fitting = cast_bytes // (width * hidden.element_size()) // tile.columns * tile.columns
        span = min(max(fitting, tile.columns), n_classes)
    blocks, tiles = triton.cdiv(n_rows, tile.rows), triton.cdiv(span, tile.columns)
    slots = tile_table.BLOCKS_A_PROCESSOR * launches.processors(device) if hidden.is_cuda else 8
    tiles_a_strip = triton.cdiv(tiles, plan_strips(blocks, tiles, slots))
    n_strips = triton.cdiv(tiles, tiles_a_strip)
    partials = torch.empty((4, n_rows, n_strips), device=device)
    with launches.on_device(device):
        for base in range(0, n_classes, span):
            part = weight[base : base + span].to(hidden.dtype)
            launches.softmax_partials(launch, part, base, plan.indices, partials, tiles_a_strip)
        launches.combine(launch, plan.indices, plan.targets, partials, losses, hits, stats)
    return Result(losses, hits.bool(), stats=stats)


def backward(grad_total: Tensor, inputs: Inputs, rows: SavedRows, options: Options, need: Need) -> Gradients:
    """Return the gradients that ``need`` names, in their inputs' types.

    ``grad_total`` () is the gradient of the total. It is multiplied into every row's factor in
    float32 before anything is rounded.
    """
    hidden, weight, bias = inputs
    make = torch.empty if rows.indices.shape[0] else torch.zeros
    grads = Gradients(
        torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need.hidden else None,
        make(weight.shape, dtype=weight.dtype, device=weight.device) if need.weight else None,
        make(weight.shape[0], device=weight.device) if need.bias else None,
    )
    if rows.indices.shape[0]:
        with launches.on_device(hidden.device):
            _chunks(grad_total, inputs, rows, options, grads)
    if grads.bias is not None and bias is not None:
        grads = grads._replace(bias=grads.bias.to(bias.dtype))
    return grads


def _chunks(grad_total: Tensor, inputs: Inputs, saved: SavedRows, options: Options, grads: Gradients) -> None:
    hidden, weight, _ = inputs
    low, device = hidden.dtype, hidden.device
    n_rows, (n_classes, width) = saved.indices.shape[0], weight.shape
    launch = launches.launch_of("grad", inputs, n_rows, options)
    tile = launch.tile
    natural = torch.log(saved.sums) + saved.peaks * 0.6931471805599453
    shares = (1.0 + 2.0 * options.z_loss * natural) / saved.sums
    factors = launches.split_factors(
        saved.factors * grad_total, saved.targets, n_classes, options.logit_scale, low
    )
    common = factors.common
    rows = factors.rows(hidden, saved.indices) if grads.weight is not None else None

    # The product goes directly into dW if it is rounded to dW's type and no float32 factor remains;
    # otherwise through a float32 piece.
    straight = weight.dtype == torch.float32 or (weight.dtype == low and common is None)
    through_piece = grads.weight is not None and not straight
    beside = width * ((low.itemsize if weight.dtype != low else 0) + (4 if through_piece else 0))
    span = plan_columns(n_rows, n_classes, width, low.itemsize, options.workspace_mb, beside)
    if tile_table.tuning().whole_waves and hidden.is_cuda:
        span = whole_waves(span, width, launches.processors(device))
    buffer = torch.empty((n_rows, span), dtype=low, device=device)
    wide = torch.empty((n_rows, width), device=device) if grads.hidden is not None else None
    piece = torch.empty((span, width), device=device) if through_piece else None
    kernel: Any = logits_grad
    for base in range(0, n_classes, span):
        columns = min(span, n_classes - base)
        part = weight[base : base + columns].to(low)
        here = buffer[:, :columns]
        kernel[launch.grid(n_rows, triton.cdiv(columns, tile.columns))](
            hidden, part, launch.offset(base), saved.indices, saved.targets, saved.peaks, shares,
            factors.gains, here, n_rows, base, columns, width,
            *hidden.stride(), *part.stride(), here.stride(0), options.logit_scale, options.softcap,
            1.0 - options.label_smoothing, options.label_smoothing / n_classes, **launch.flags,
        )  # fmt: skip
        if grads.weight is not None and rows is not None:
            target = grads.weight[base : base + columns]
            made = target if piece is None else piece[:columns]
            product(made, here.t(), rows)
            if common is not None:
                torch.mul(made, common * options.logit_scale, out=target)
            elif piece is not None:
                target.copy_(made)
        if grads.bias is not None:
            grads.bias[base : base + columns] = launches.sum_rows(here, factors.relative)
        if wide is not None:
            (add_product if base else product)(wide, here, part)
    if grads.bias is not None:
        grads.bias.mul_(1.0 / options.logit_scale if common is None else common)
    if grads.hidden is not None and wide is not None:
        del buffer, here, rows, piece  # before the rounded copy: the peak is in the loop
        if common is not None:
            wide.mul_((factors.whole * (options.logit_scale / launches.FLOAT16_GAIN)).unsqueeze(1))
        grads.hidden.index_copy_(0, saved.indices, wide.to(low))
