"""A table of tile sizes of the Triton kernels, by architecture, type and shape, without autotuning at run time.

The tests compile every row for its architecture, without a spill and within the chip's shared memory. The order
within an entry is expected, not measured: no entry has been timed on a GPU yet. :func:`use` sets another tile, and
:func:`tuned` changes the launches, for a tuning run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

__all__ = [
    "ARCHITECTURES", "BLOCKS_A_PROCESSOR", "SHARED_LIMIT", "Tile", "Tuning", "architecture", "candidates",
    "fits_options", "interpreted", "pick", "register_cap", "tuned", "tuning", "use",
]  # fmt: skip


class Tile(NamedTuple):
    """A block of scores: ``rows`` x ``columns``, ``depth`` of the width at a time, warps and stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


class Tuning(NamedTuple):
    """Launch choices that no GPU has timed yet; :func:`tuned` switches each off.

    Attributes:
        row_blocks_a_group: row blocks that pass over the vocabulary together; a large number means all of them.
        cap_registers: whether variants that would lose the second block on a multiprocessor are
            compiled for fewer registers, see :func:`register_cap`.
        cast_bytes: bytes of a slice of the weight that is cast in the forward pass.
        whole_waves: whether a slice of dW divides into whole waves of the multiprocessors.
    """

    row_blocks_a_group: int = 24
    cap_registers: bool = True
    cast_bytes: int = 64 << 20
    whole_waves: bool = True


# Shared memory per block in bytes (CUDA C++ programming guide, table of compute capabilities).
SHARED_LIMIT = {
    80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 103: 227 << 10, 120: 99 << 10
}  # fmt: skip
ARCHITECTURES = tuple(SHARED_LIMIT)

# Two blocks of the first tile fit a multiprocessor of Hopper, 128 registers a thread with 8 warps.
BLOCKS_A_PROCESSOR = 2
CAPPED_REGISTERS = 128
# Hopper and data-centre Blackwell: large shared memory, products that read it directly.
_LARGE = (90, 100, 103)

# 16-bit inputs. On Hopper two blocks of the first tile fit a multiprocessor (128 registers a thread with 8
# warps), so that one block's exponentials run beside the other's products; the second tile reads a third
# less for the same products, alone on its multiprocessor, and has no registers left for a bias or a cap.
_AMPERE = (Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 4, 3), Tile(64, 128, 32, 4, 4))
_HOPPER = (Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3), Tile(64, 128, 64, 4, 4))
# For few rows, a block of 128 would be mostly padding.
_FEW_ROWS = (Tile(16, 128, 64, 4, 4), Tile(32, 128, 64, 4, 4))
# float32 is multiplied in float32 (no TF32), outside the tensor cores. Where exponentials are kept, the
# first tile spills on sm_120 with a bias: the assembler gives up registers for a second block.
_WIDE = (Tile(64, 64, 16, 8, 2), Tile(32, 64, 32, 4, 2))
_INTERPRETER = (Tile(16, 32, 16, 4, 1),)

FEW = 32
_override: list[tuple[str | None, Tile]] = []
_tuning: list[Tuning] = [Tuning()]


def interpreted() -> bool:
    """Return whether Triton runs its kernels in its interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def architecture(capability: tuple[int, int]) -> int:
    """Return the newest architecture of the table that ``capability`` is not older than.

    Raises:
        ValueError: it is older than all of them.
    """
    number = capability[0] * 10 + capability[1]
    fitting = [known for known in ARCHITECTURES if known <= number]
    if not fitting:
        raise ValueError(f"sm_{number} is older than sm_{ARCHITECTURES[0]}, the first with tile sizes here.")
    return fitting[-1]


def candidates(arch: int, itemsize: int, kernel: str = "softmax") -> tuple[Tile, ...]:
    """Return every tile shipped for ``arch``, inputs of ``itemsize`` bytes (2 or 4) and ``kernel``."""
    if itemsize == 4:
        return _WIDE[1:] if kernel == "kept" else _WIDE
    return (_HOPPER if arch in _LARGE else _AMPERE) + _FEW_ROWS


def fits_options(tile: Tile) -> bool:
    """Return whether ``tile`` has enough registers for a bias, a cap, smoothing or kept exponentials."""
    return tile.rows * tile.columns <= 64 * 32 * tile.warps


def pick(arch: int, itemsize: int, n_rows: int, kernel: str = "softmax") -> Tile:
    """Return the tile for ``n_rows`` rows, rounded up to a power of two for the choice.

    Args:
        arch: a key of the table, see :func:`architecture`.
        itemsize: bytes of an input element, 2 or 4.
        n_rows: valid rows.
        kernel: ``softmax`` (forward), ``kept`` (the same, keeping its exponentials) or ``grad`` (backward).
    """
    for wanted, tile in reversed(_override):
        if wanted in (None, kernel, "softmax" if kernel == "kept" else kernel):
            return tile
    if interpreted():
        return _INTERPRETER[0]
    if itemsize == 4:
        return _WIDE[1] if n_rows <= FEW or kernel == "kept" else _WIDE[0]
    if n_rows <= FEW:
        return _FEW_ROWS[0] if n_rows <= FEW // 2 else _FEW_ROWS[1]
    table = _HOPPER if arch in _LARGE else _AMPERE
    return table[2] if n_rows <= 64 else table[0]


def tuning() -> Tuning:
    """Return the current launch choices."""
    return _tuning[-1]


@contextmanager
def tuned(**changes: Any) -> Iterator[None]:
    """Change fields of :class:`Tuning` inside the ``with`` block.

    Example:
        >>> with tuned(cap_registers=False, row_blocks_a_group=1 << 20):
        ...     pass
    """
    _tuning.append(tuning()._replace(**changes))
    try:
        yield
    finally:
        _tuning.pop()


def register_cap(arch: int, itemsize: int, tile: Tile, flags: dict[str, Any]) -> dict[str, int]:
    """Return the launch option that keeps ``partial_softmax`` at two blocks per multiprocessor, if possible.

    On Hopper a carried strip, smoothing, and a vocabulary or width that ends inside a tile take 141 to 157
    registers per thread, with which only one block fits. They compile for 128 without a spill; a bias, a cap,
    kept exponentials, and smoothing together with any of the others do not. ``flags`` are the kernel's
    compile-time arguments.
    """
    uneven = flags["CARRY"] or not (flags["EVEN_V"] and flags["EVEN_D"])
    heavy = flags["HAS_BIAS"] or flags["HAS_CAP"] or flags["KEEP"]
    capable = arch == 90 and itemsize == 2 and tile == _HOPPER[0]
    wanted = capable and not heavy and uneven != flags["SUM"]
    return {"maxnreg": CAPPED_REGISTERS} if wanted and tuning().cap_registers and not interpreted() else {}


@contextmanager
def use(tile: Tile, kernel: str | None = None) -> Iterator[None]:
    """Use ``tile`` for every launch of ``kernel`` (None: of all kernels) inside the ``with`` block.

    A tile for ``softmax`` is also used for ``kept``.
    """
    _override.append((kernel, tile))
    try:
        yield
    finally:
        _override.pop()
