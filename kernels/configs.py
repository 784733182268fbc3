"""Tile sizes of the Triton kernels, by architecture, type and shape: a table, nothing is searched at run time.

Every row is built ahead of time in the tests for its architecture, without a spill and within the
chip's shared memory. The order within an entry is that of expectation, not of measurement: no entry has
been timed on a GPU yet. :func:`use` puts a tile of one's own in front of the table, which is how a
tuning run tries the others.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

__all__ = [
    "ARCHITECTURES",
    "SHARED_LIMIT",
    "Tile",
    "architecture",
    "candidates",
    "interpreted",
    "pick",
    "use",
]


class Tile(NamedTuple):
    """One block of scores: ``rows`` x ``columns``, ``depth`` of the width at a time, warps and stages."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


# Shared memory that one block may take, bytes (CUDA C++ programming guide, table of compute capabilities).
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
ARCHITECTURES = tuple(SHARED_LIMIT)

# 16-bit inputs. On Hopper two blocks of the first tile fit a multiprocessor (128 registers a thread with 8
# warps), so that one block's exponentials run beside the other's products; the second tile reads a third
# less for the same products, alone on its multiprocessor, and has no registers left for a bias or a cap.
_AMPERE = (Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 4, 3), Tile(64, 128, 32, 4, 4))
_HOPPER = (Tile(128, 128, 64, 8, 3), Tile(128, 256, 64, 8, 3), Tile(64, 128, 64, 4, 4))
# Few rows: a block of 128 would be mostly padding.
_FEW_ROWS = (Tile(16, 128, 64, 4, 4), Tile(32, 128, 64, 4, 4))
# float32 is multiplied in float32 (no TF32), outside the tensor cores. Where exponentials are kept, the
# first tile spills on sm_120 with a bias: the assembler gives up registers for a second block.
_WIDE = (Tile(64, 64, 16, 8, 2), Tile(32, 64, 32, 4, 2))
_INTERPRETER = (Tile(16, 32, 16, 4, 1),)

FEW = 32
_override: list[tuple[str | None, Tile]] = []


def interpreted() -> bool:
    """Return whether Triton runs its kernels in its interpreter (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def architecture(capability: tuple[int, int]) -> int:
    """Return the newest architecture of the table that ``capability`` is not older than.

    Raises:
        ValueError: older than all of them.
    """
    number = capability[0] * 10 + capability[1]
    fitting = [known for known in ARCHITECTURES if known <= number]
    if not fitting:
        raise ValueError(f"sm_{number} is older than sm_{ARCHITECTURES[0]}, the first with tile sizes here.")
    return fitting[-1]


def candidates(arch: int, itemsize: int, kernel: str = "strip") -> tuple[Tile, ...]:
    """Return every tile shipped for ``arch``, inputs of ``itemsize`` bytes (2 or 4) and ``kernel``."""
    if itemsize == 4:
        return _WIDE[1:] if kernel == "kept" else _WIDE
    return (_HOPPER if arch == 90 else _AMPERE) + _FEW_ROWS


def fits_options(tile: Tile) -> bool:
    """Return whether a bias, a cap, smoothing or kept exponentials have registers enough in ``tile``."""
    return tile.rows * tile.columns <= 64 * 32 * tile.warps


def pick(arch: int, itemsize: int, n_rows: int, kernel: str = "strip") -> Tile:
    """Return the tile for ``n_rows`` rows, rounded up to a power of two for the choice.

    Args:
        arch: a key of the table, see :func:`architecture`.
        itemsize: bytes of an input element, 2 or 4.
        n_rows: valid rows.
        kernel: ``strip`` (forward), ``kept`` (the same, keeping its exponentials) or ``slope`` (backward).
    """
    for wanted, tile in reversed(_override):
        if wanted in (None, kernel, "strip" if kernel == "kept" else kernel):
            return tile
    if interpreted():
        return _INTERPRETER[0]
    if itemsize == 4:
        return _WIDE[1] if n_rows <= FEW or kernel == "kept" else _WIDE[0]
    if n_rows <= FEW:
        return _FEW_ROWS[0] if n_rows <= FEW // 2 else _FEW_ROWS[1]
    table = _HOPPER if arch == 90 else _AMPERE
    return table[2] if n_rows <= 64 else table[0]


@contextmanager
def use(tile: Tile, kernel: str | None = None) -> Iterator[None]:
    """Take ``tile`` for every launch of ``kernel`` (None: of all) inside the ``with`` block.

    What is asked for ``strip`` holds for ``kept`` too.
    """
    _override.append((kernel, tile))
    try:
        yield
    finally:
        _override.pop()
