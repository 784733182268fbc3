"""The engine for NVIDIA GPUs from sm_80: logits live in registers, gradients go over slices of the vocabulary.

Forward: one pass of tiles over the valid rows and the whole vocabulary (2 N D V operations) leaves two
numbers a row, the maximum and the sum of exponentials. Without gradients that is all. Backward, an
operator of its own (6 N D V): for each slice of the vocabulary a kernel computes the scores again and
writes ``P = gain * dloss/dlogits``, an M x columns buffer in the inputs' type; the library multiplies it
into ``dW[slice]``, which is thus written once and summed in float32 without a float32 copy of dW, and
adds ``P W[slice]`` to dX in float32. Slicing the vocabulary moves N / V of the accumulator traffic that
slices of rows move; it was asked for in PyTorch's pull request 175039.

Where the factors of the rows go: bfloat16 and float32 have the range for them, so P carries them and
nothing is scaled afterwards. float16 has not, so P holds the bare slope times 256 (its smallest normal
number is 6e-5, a flat softmax over 250112 classes is 4e-6), the factors, divided by the largest, go into
the rows, and what is common is multiplied in float32: no loss scale can underflow or overflow on the way.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sbs_edge.kernels import configs
from sbs_edge.kernels.orders import plan_columns
from sbs_edge.kernels.products import add_product, product, whole_sums
from sbs_edge.kernels.rows import RowPlan
from sbs_edge.kernels.tiles import settle_kernel, slope_kernel, strip_kernel

__all__ = [
    "Launch", "Options", "TileResult", "backward", "forward", "launch_of", "on_device", "settle", "split_factors"
]  # fmt: skip

CAST_BYTES = 16 << 20
FLOAT16_GAIN = 256.0
SETTLE_ROWS, SETTLE_DEPTH = 16, 256


class Options(NamedTuple):
    """The scalar options of the loss."""

    label_smoothing: float
    z_loss: float
    logit_scale: float
    softcap: float
    workspace_mb: float


class TileResult(NamedTuple):
    """(M,) losses, (M,) bool hits, and (2, N) float32 of which ``[:, :M]`` is maximum and sum, base 2."""

    losses: Tensor
    correct: Tensor
    stats: Tensor


class Launch(NamedTuple):
    """What every launch over scores needs: the tile, (N, D) states, (V,) bias or None, rows, options."""

    tile: configs.Tile
    hidden: Tensor
    bias: Tensor | None
    plan: RowPlan
    options: Options

    @property
    def flags(self) -> dict[str, Any]:
        """Compile-time arguments and sizes of the launch."""
        return {
            "HAS_BIAS": self.bias is not None, "HAS_CAP": self.options.softcap > 0,
            "EVEN_D": self.hidden.shape[1] % self.tile.depth == 0, "PRECISION": "ieee",
            "BLOCK_N": self.tile.rows, "BLOCK_V": self.tile.columns, "BLOCK_D": self.tile.depth,
            "num_warps": self.tile.warps, "num_stages": self.tile.stages,
        }  # fmt: skip

    def offset(self, base: int) -> Tensor:
        """The bias from ``base`` on, or any tensor where there is none."""
        return self.hidden if self.bias is None else self.bias[base:]


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Launch on ``device``, which need not be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def launch_of(kernel: str, hidden: Tensor, bias: Tensor | None, plan: RowPlan, options: Options) -> Launch:
    """Choose the tile for a launch of ``kernel``.

    Raises:
        RuntimeError: the inputs are float64, which this engine would round.
    """
    if hidden.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise RuntimeError(f"The triton engine computes in float32; use engine='torch' for {hidden.dtype}.")
    arch = 90
    if hidden.is_cuda:
        arch = configs.architecture(torch.cuda.get_device_capability(hidden.device))
    tile = configs.pick(arch, hidden.element_size(), plan.indices.shape[0], kernel)
    return Launch(tile, hidden, bias if bias is None else bias.contiguous(), plan, options)


def _strips(n_row_blocks: int, n_tiles: int, device: torch.device) -> int:
    """How many strips to cut the vocabulary into: eight blocks a multiprocessor, four tiles a strip."""
    processors = (
        torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    )
    wanted: int = triton.cdiv(8 * processors, max(n_row_blocks, 1))
    return max(1, min(wanted, n_tiles // 4 if device.type == "cuda" else n_tiles, 64))


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: RowPlan, options: Options
) -> TileResult:
    """Return the rows' losses and hits, and what the backward pass needs of the softmax.

    Raises:
        RuntimeError: the inputs are float64, which this engine would round.
    """
    launch = launch_of("strip", hidden, bias, plan, options)
    device, (n_classes, width) = hidden.device, weight.shape
    n_rows = plan.indices.shape[0]
    losses = torch.empty(n_rows, device=device)
    hits = torch.empty(n_rows, dtype=torch.int8, device=device)
    stats = torch.zeros((2, hidden.shape[0]), device=device)
    if n_rows == 0:
        return TileResult(losses, hits.bool(), stats)
    tile = launch.tile
    span = n_classes
    if weight.dtype != hidden.dtype:  # only a slice of the weight is ever cast
        fitting = CAST_BYTES // (width * hidden.element_size()) // tile.columns * tile.columns
        span = min(max(fitting, tile.columns), n_classes)
    blocks, tiles = triton.cdiv(n_rows, tile.rows), triton.cdiv(span, tile.columns)
    tiles_a_strip = triton.cdiv(tiles, _strips(blocks, tiles, device))
    n_strips = triton.cdiv(tiles, tiles_a_strip)
    partials = torch.empty((4, n_rows, n_strips), device=device)
    scores: Any = strip_kernel
    with on_device(device):
        for base in range(0, n_classes, span):
            columns = min(span, n_classes - base)
            part = weight[base : base + columns].to(hidden.dtype)
            scores[(blocks, n_strips)](
                hidden, part, launch.offset(base), plan.indices, partials, partials,
                n_rows, base, columns, width, *hidden.stride(), *part.stride(), 0,
                options.logit_scale, options.softcap, tiles_a_strip, n_strips,
                SUM=options.label_smoothing > 0, CARRY=base > 0, KEEP=False, EVEN_V=columns % tile.columns == 0,
                **launch.flags,
            )  # fmt: skip
        settle(launch, weight, 0, partials, losses, hits, stats)
    return TileResult(losses, hits.bool(), stats)


def settle(
    launch: Launch, weight: Tensor, start: int, partials: Tensor, losses: Tensor, hits: Tensor, stats: Tensor
) -> None:
    """Join the strips of the valid rows from ``start`` on: ``partials`` is (4, rows, strips).

    ``losses`` and ``hits`` are (rows,), ``stats`` is (2, rows or more); all begin at row ``start``.
    """
    kernel: Any = settle_kernel
    plan, options = launch.plan, launch.options
    n_rows, n_strips = partials.shape[1:]
    n_classes, width = weight.shape
    kernel[(n_rows,)](
        launch.hidden, weight, launch.offset(0), plan.indices[start:], plan.targets[start:], partials,
        losses, hits, stats, n_rows, n_strips, n_classes, width,
        *launch.hidden.stride(), *weight.stride(), stats.stride(0),
        options.logit_scale, options.softcap, options.label_smoothing, options.z_loss,
        HAS_BIAS=launch.bias is not None, HAS_CAP=options.softcap > 0,
        BLOCK_S=triton.next_power_of_2(n_strips), BLOCK_V=launch.tile.columns,
        BLOCK_D=min(SETTLE_DEPTH, triton.next_power_of_2(width)), CHUNK=SETTLE_ROWS,
    )  # fmt: skip


def split_factors(
    factors: Tensor, bad: Tensor, logit_scale: float, low: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return what of the rows' ``factors`` goes into P (gains), into the rows, and what is common to all.

    The last is None where the gains carry everything, the logit scale included; see the module's text.
    """
    if low != torch.float16:
        return factors * logit_scale, torch.ones_like(factors), None
    largest = factors.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    gains = torch.full_like(factors, FLOAT16_GAIN).masked_fill(bad, torch.nan)
    return gains, factors / largest, largest / FLOAT16_GAIN


def backward(
    grad_total: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: RowPlan,
    stats: Tensor,
    options: Options,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of (hidden, weight, bias) that ``need`` names, in their types.

    ``grad_total`` is the gradient of the total, () of any value: it enters every row's factor in
    float32 before anything is rounded.
    """
    need_hidden, need_weight, need_bias = need
    grad_hidden = torch.zeros(hidden.shape, dtype=hidden.dtype, device=hidden.device) if need_hidden else None
    make = torch.empty if plan.indices.shape[0] else torch.zeros
    grad_weight = make(weight.shape, dtype=weight.dtype, device=weight.device) if need_weight else None
    grad_bias = make(weight.shape[0], device=weight.device) if need_bias else None
    if plan.indices.shape[0]:
        with on_device(hidden.device), whole_sums():
            _slices(
                grad_total, hidden, weight, bias, plan, stats, options, grad_hidden, grad_weight, grad_bias
            )
    if grad_bias is not None and bias is not None:
        grad_bias = grad_bias.to(bias.dtype)
    return grad_hidden, grad_weight, grad_bias


def _slices(
    grad_total: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: RowPlan,
    stats: Tensor,
    options: Options,
    grad_hidden: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    launch = launch_of("slope", hidden, bias, plan, options)
    tile, low, device = launch.tile, hidden.dtype, hidden.device
    n_rows, (n_classes, width) = plan.indices.shape[0], weight.shape
    peaks, sums = stats[0, :n_rows], stats[1, :n_rows]
    natural = torch.log(sums) + peaks * 0.6931471805599453
    shares = (1.0 + 2.0 * options.z_loss * natural) / sums
    # A bad target of a counted row makes NaN of what it touches, never a silent number.
    bad = ((plan.targets < 0) | (plan.targets >= n_classes)) & (plan.grad_factor != 0)
    factors = (plan.grad_factor * grad_total).masked_fill(bad, torch.nan)

    rows = hidden.index_select(0, plan.indices) if grad_weight is not None else None
    gains, relative, common = split_factors(factors, bad, options.logit_scale, low)
    if common is not None and rows is not None:
        rows.mul_(relative.unsqueeze(1))

    # The product goes straight into dW where it rounds to dW's type and no factor is left that it needs
    # in float32; else through a float32 piece.
    straight = weight.dtype == torch.float32 or (weight.dtype == low and common is None)
    through_piece = grad_weight is not None and not straight
    beside = width * ((low.itemsize if weight.dtype != low else 0) + (4 if through_piece else 0))
    span = plan_columns(n_rows, n_classes, width, low.itemsize, options.workspace_mb, beside)
    slopes = torch.empty((n_rows, span), dtype=low, device=device)
    wide = torch.empty((n_rows, width), device=device) if grad_hidden is not None else None
    piece = torch.empty((span, width), device=device) if through_piece else None
    kernel: Any = slope_kernel
    for base in range(0, n_classes, span):
        columns = min(span, n_classes - base)
        part = weight[base : base + columns].to(low)
        slope = slopes[:, :columns]
        kernel[(triton.cdiv(n_rows, tile.rows), triton.cdiv(columns, tile.columns))](
            hidden, part, launch.offset(base), plan.indices, plan.targets, peaks, shares, gains, slope,
            n_rows, base, columns, width, *hidden.stride(), *part.stride(), slope.stride(0),
            options.logit_scale, options.softcap,
            1.0 - options.label_smoothing, options.label_smoothing / n_classes,
            **launch.flags,
        )  # fmt: skip
        if grad_weight is not None and rows is not None:
            target = grad_weight[base : base + columns]
            made = target if piece is None else piece[:columns]
            product(made, slope.t(), rows)
            if common is not None:
                torch.mul(made, common * options.logit_scale, out=target)
            elif piece is not None:
                target.copy_(made)
        if grad_bias is not None:
            product(grad_bias[base : base + columns].unsqueeze(1), slope.t(), relative.to(low).unsqueeze(1))
        if wide is not None:
            (add_product if base else product)(wide, slope, part)
    if grad_bias is not None:
        grad_bias.mul_(1.0 / options.logit_scale if common is None else common)
    if grad_hidden is not None and wide is not None:
        del slopes, slope, rows, piece  # before the rounded copy: the peak is in the loop
        if common is not None:
            wide.mul_((factors * (options.logit_scale / FLOAT16_GAIN)).unsqueeze(1))
        grad_hidden.index_copy_(0, plan.indices, wide.to(low))
