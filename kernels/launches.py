"""Launches of the tile kernels that both Triton engines share, and the handling of the rows' factors.

bfloat16 and float32 have enough range for the factors, so the gradient of the logits includes them and nothing
is scaled afterwards. float16 has not. There the gradient of the logits is stored without factors, times 256
(float16's smallest normal number is 6e-5, and a flat softmax over 250112 classes is 4e-6). The factors, divided by the
largest, are applied to the rows, and the common factor in float32. So no loss scale can underflow or overflow.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from sbs_edge.kernels import tile_table
from sbs_edge.kernels.plan import Inputs, Options, dead_rows
from sbs_edge.kernels.tiles import column_sums, combine_partials, partial_softmax

__all__ = [
    "FLOAT16_GAIN", "Factors", "Launch", "combine", "launch_of", "on_device", "processors", "softmax_partials",
    "split_factors", "sum_rows",
]  # fmt: skip

FLOAT16_GAIN = 256.0
COMBINE_CHUNK, COMBINE_DEPTH = 16, 256
SUM_ROWS, SUM_BLOCK, SUM_COLUMNS = 512, 32, 128


class Launch(NamedTuple):
    """The arguments of every launch over scores: the tile for an architecture, the inputs and the options."""

    tile: tile_table.Tile
    arch: int
    inputs: Inputs
    options: Options

    @property
    def flags(self) -> dict[str, Any]:
        """Compile-time arguments and sizes of the launch."""
        return {
            "HAS_BIAS": self.inputs.bias is not None, "HAS_CAP": self.options.softcap > 0,
            "EVEN_D": self.inputs.hidden.shape[1] % self.tile.depth == 0, "PRECISION": "ieee",
            "BLOCK_N": self.tile.rows, "BLOCK_V": self.tile.columns, "BLOCK_D": self.tile.depth,
            "num_warps": self.tile.warps, "num_stages": self.tile.stages,
        }  # fmt: skip

    def grid(self, n_rows: int, n_strips: int) -> tuple[int, int, int]:
        """Programs (row blocks of a group, strips, groups): the GPU starts a group's programs together.

        In the order of rows alone every strip would read all states again.
        """
        blocks = triton.cdiv(n_rows, self.tile.rows)
        groups = triton.cdiv(blocks, tile_table.tuning().row_blocks_a_group)
        return triton.cdiv(blocks, groups), n_strips, groups

    def offset(self, base: int) -> Tensor:
        """The bias from ``base`` on, or any tensor where there is none."""
        return self.inputs.hidden if self.inputs.bias is None else self.inputs.bias[base:]


class Factors(NamedTuple):
    """The factors of the rows, split by where they are applied.

    Attributes:
        gains: (M,) into the gradient of the logits; 0 for a dead row.
        relative: (M,) into the rows.
        common: () into the products, or None where the gains carry everything, the logit scale included.
        whole: (M,) the factors themselves.
    """

    gains: Tensor
    relative: Tensor
    common: Tensor | None
    whole: Tensor

    def rows(self, hidden: Tensor, indices: Tensor, here: slice = slice(None)) -> Tensor:
        """Gather the states of rows, times their factors; the state of a dead row is not read."""
        rows = hidden.index_select(0, indices)
        rows.masked_fill_((self.gains[here] == 0).unsqueeze(1), 0.0)  # 0 * NaN is NaN
        return rows if self.common is None else rows.mul_(self.relative[here].unsqueeze(1))


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Launch on ``device``, which need not be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def processors(device: torch.device) -> int:
    """Return the number of multiprocessors of ``device``; 1 in the interpreter."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def launch_of(kernel: str, inputs: Inputs, n_rows: int, options: Options) -> Launch:
    """Choose the tile for a launch of ``kernel`` over ``n_rows`` valid rows.

    Raises:
        RuntimeError: the inputs are float64, which this engine would round.
    """
    hidden, _, bias = inputs
    if hidden.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise RuntimeError(f"The triton engine computes in float32; use engine='torch' for {hidden.dtype}.")
    arch = 90
    if hidden.is_cuda:
        arch = tile_table.architecture(torch.cuda.get_device_capability(hidden.device))
    tile = tile_table.pick(arch, hidden.element_size(), n_rows, kernel)
    inputs = inputs._replace(bias=bias if bias is None else bias.contiguous())
    return Launch(tile, arch, inputs, options)


def softmax_partials(
    launch: Launch,
    part: Tensor,
    base: int,
    indices: Tensor,
    partials: Tensor,
    tiles_a_strip: int,
    kept: Tensor | None = None,
) -> None:
    """Launch ``partial_softmax`` over the weight's slice ``part``, which begins at class ``base``.

    ``partials`` is (4, rows, strips). With ``kept`` (rows, classes) the exponentials are kept there.
    """
    tile, arch, (hidden, _, _), options = launch
    kernel: Any = partial_softmax
    (n_columns, width), (_, n_rows, n_strips) = part.shape, partials.shape
    variant = {
        "SUM": options.label_smoothing > 0, "CARRY": base > 0, "KEEP": kept is not None,
        "EVEN_V": n_columns % tile.columns == 0,
    }  # fmt: skip
    flags = launch.flags | variant
    kernel[launch.grid(n_rows, n_strips)](
        hidden, part, launch.offset(base), indices, partials, partials if kept is None else kept,
        n_rows, base, n_columns, width, *hidden.stride(), *part.stride(), 0 if kept is None else kept.stride(0),
        options.logit_scale, options.softcap, tiles_a_strip, n_strips,
        **flags, **tile_table.register_cap(arch, hidden.element_size(), tile, flags),
    )  # fmt: skip


def combine(
    launch: Launch,
    indices: Tensor,
    targets: Tensor,
    partials: Tensor,
    losses: Tensor,
    hits: Tensor,
    stats: Tensor,
) -> None:
    """Combine the strips of rows: ``partials`` is (4, rows, strips).

    ``losses`` and ``hits`` are (rows,), ``stats`` is (2, rows or more).
    """
    kernel: Any = combine_partials
    (hidden, weight, bias), options = launch.inputs, launch.options
    n_rows, n_strips = partials.shape[1:]
    n_classes, width = weight.shape
    kernel[(n_rows,)](
        hidden, weight, launch.offset(0), indices, targets, partials,
        losses, hits, stats, n_rows, n_strips, n_classes, width,
        *hidden.stride(), *weight.stride(), stats.stride(0),
        options.logit_scale, options.softcap, options.label_smoothing, options.z_loss,
        HAS_BIAS=bias is not None, HAS_CAP=options.softcap > 0, COUNT=options.count_correct,
        BLOCK_S=triton.next_power_of_2(n_strips), BLOCK_V=launch.tile.columns,
        BLOCK_D=min(COMBINE_DEPTH, triton.next_power_of_2(width)), CHUNK=COMBINE_CHUNK,
    )  # fmt: skip


def split_factors(
    factors: Tensor, targets: Tensor, n_classes: int, logit_scale: float, low: torch.dtype
) -> Factors:
    """Split the rows' ``factors`` for inputs of type ``low``; see the module's docstring.

    A bad target of a row that counts gives NaN in the results that depend on it, never a silently wrong number.
    """
    dead = dead_rows(factors)
    bad = ((targets < 0) | (targets >= n_classes)) & ~dead
    factors = factors.masked_fill(bad, torch.nan)
    if low != torch.float16:
        return Factors(factors * logit_scale, torch.ones_like(factors), None, factors)
    largest = factors.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    gains = torch.full_like(factors, FLOAT16_GAIN).masked_fill(dead, 0.0).masked_fill(bad, torch.nan)
    return Factors(gains, factors / largest, largest / FLOAT16_GAIN, factors)


def sum_rows(grads: Tensor, factors: Tensor) -> Tensor:
    """Return ``sum_i factors[i] * grads[i]`` of (R, C) gradients and (R,) float32 factors: (C,) float64."""
    kernel: Any = column_sums
    n_rows, n_columns = grads.shape
    blocks = triton.cdiv(n_rows, SUM_ROWS)
    partials = torch.empty((blocks, n_columns), device=grads.device)
    kernel[(triton.cdiv(n_columns, SUM_COLUMNS), blocks)](
        grads, factors.contiguous(), partials, n_rows, n_columns, grads.stride(0),
        ROWS=SUM_ROWS, BLOCK_R=SUM_BLOCK, BLOCK_V=SUM_COLUMNS,
    )  # fmt: skip
    return partials.sum(dim=0, dtype=torch.float64)
