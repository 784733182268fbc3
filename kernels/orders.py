"""In which order the ``triton`` engine makes gradients: over slices of the vocabulary, or over blocks of rows.

*Columns* (N small beside V): forward keeps two numbers a row; backward makes a slice's scores again. dW
is written once, dX is read and written once a slice: 8 N D V operations.
*Rows* (N large beside V): forward makes a block's scores over the whole vocabulary, keeps their
exponentials, and makes the gradients at once. dX is written once, dW is read and written once a block:
6 N D V operations, and one more pass over the scores instead of the recomputation.

:func:`switch_rows` says from how many rows on the second one is taken, by memory first and then by a
model of time. The rates of that model are an H100's from data sheets and published runs: nothing here
has been timed. Only their ratio matters, and :func:`use` overrules the choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

__all__ = [
    "Need",
    "Order",
    "asked",
    "budget_of",
    "by_columns",
    "by_rows",
    "plan_columns",
    "plan_rows_at_once",
    "switch_rows",
    "use",
]

SLOPE_BYTES = 48 << 20
LEAST_COLUMNS = 1536
COLUMN_STEP = 128
# A block of fewer rows spends more time on dW's traffic than the spared recomputation takes.
LEAST_ROWS = 2048
ROW_STEP = 128
# Four float32 statistics a row for every tile of the vocabulary, which is at least this wide.
TILE_COLUMNS, TILE_BYTES = 64, 16
# Operations and bytes a second: tiles, library products, memory. float32 runs outside the tensor cores.
TILE_RATE = {2: 500e12, 4: 40e12}
LIBRARY_RATE = {2: 700e12, 4: 50e12}
BYTE_RATE = 3e12
NEVER = 1 << 62
_override: list[str] = []


class Need(NamedTuple):
    """One head: ``classes`` V, ``width`` D, bytes of a state and of an element of the weight."""

    classes: int
    width: int
    itemsize: int
    weight_itemsize: int


class Order(NamedTuple):
    """One way to make the gradients of N rows.

    Attributes:
        span: columns of a slice, or rows of a block.
        workspace: bytes of all temporary buffers beyond the inputs and the gradients.
        flops: multiply-adds times two, forward and backward.
        traffic: bytes that accumulators, operands and scores move.
        seconds: the model's time, for comparison only.
    """

    span: int
    workspace: float
    flops: float
    traffic: float
    seconds: float


def _fitting(budget: float, bytes_each: float, most: int, step: int) -> int:
    fitting = int(budget // max(bytes_each, 1)) // step * step
    return min(max(fitting, step), most)


def plan_columns(
    n_rows: int, n_classes: int, width: int, itemsize: int, workspace_mb: float, bytes_beside: int = 0
) -> int:
    """Return how many classes one slice of the backward pass takes.

    Args:
        n_rows: M valid rows.
        n_classes: V.
        width: D.
        itemsize: bytes of an element of the slopes.
        workspace_mb: bound in MiB on all temporary buffers: the slopes, the gathered rows and dX in
            float32; 0 plans 48 MiB of slopes, or 1536 columns where that is more, since each slice
            reads and writes all of dX.
        bytes_beside: further bytes a column, for a cast weight or a float32 piece of dW.
    """
    if workspace_mb > 0:
        budget = workspace_mb * 2**20 - n_rows * width * (itemsize + 4)
        return _fitting(budget, n_rows * itemsize + bytes_beside, n_classes, COLUMN_STEP)
    columns = _fitting(SLOPE_BYTES, n_rows * itemsize, n_classes, COLUMN_STEP)
    return min(max(columns, LEAST_COLUMNS), n_classes)


def by_columns(n_rows: int, need: Need, workspace_mb: float) -> Order:
    """Slices of the vocabulary for ``n_rows`` rows: their width, memory and traffic."""
    v, d, b, w = need
    beside = d * b if w != b else 0
    span = plan_columns(n_rows, v, d, b, workspace_mb, beside)
    slices = v / span
    traffic = n_rows * d * (8 + 2 * b) * slices + 3 * n_rows * v * b + 3 * v * d * w
    seconds = 4 * n_rows * d * v * (1 / TILE_RATE[b] + 1 / LIBRARY_RATE[b]) + traffic / BYTE_RATE
    workspace = n_rows * span * b + n_rows * d * (b + 4) + span * beside
    return Order(span, workspace, 8 * n_rows * d * v, traffic, seconds)


def _row_bytes(need: Need) -> tuple[float, float]:
    """Bytes that a block of rows takes whatever its size, and further ones a row."""
    v, d, b, w = need
    cast = v * d * b if w != b else 0
    sums = v * d * 4 if w != 4 else 0
    piece = 4 if b == 2 else b
    return cast + sums, v * b + TILE_BYTES * v / TILE_COLUMNS + d * (b + piece)


def plan_rows_at_once(n_rows: int, need: Need, budget: float) -> int:
    """Return how many rows one block takes within ``budget`` bytes; blocks are about equally large."""
    fixed, each = _row_bytes(need)
    most = _fitting(budget - fixed, each, max(n_rows, 1), ROW_STEP)
    blocks = -(-max(n_rows, 1) // most)
    even = -(-n_rows // blocks)
    return max(1, min(most, -(-even // ROW_STEP) * ROW_STEP))


def by_rows(n_rows: int, need: Need, budget: float) -> Order:
    """Blocks of rows for ``n_rows`` rows within ``budget`` bytes: their height, memory and traffic."""
    v, d, b, w = need
    fixed, each = _row_bytes(need)
    span = _fitting(budget - fixed, each, max(n_rows, 1), ROW_STEP)
    blocks = n_rows / span
    traffic = v * d * (8 + 2 * b) * blocks + 5 * n_rows * v * b + v * d * (w + 4) + n_rows * d * 4 * b
    seconds = n_rows * d * v * (2 / TILE_RATE[b] + 4 / LIBRARY_RATE[b]) + traffic / BYTE_RATE
    return Order(span, fixed + span * each, 6 * n_rows * d * v, traffic, seconds)


def budget_of(n_rows: int, need: Need, workspace_mb: float) -> float:
    """Bytes that blocks of rows may take: the workspace, or what slices of the vocabulary would."""
    return workspace_mb * 2**20 if workspace_mb > 0 else by_columns(n_rows, need, 0.0).workspace


def _rows_win(n_rows: int, need: Need, workspace_mb: float) -> bool:
    columns = by_columns(n_rows, need, workspace_mb)
    budget = budget_of(n_rows, need, workspace_mb)
    rows = by_rows(n_rows, need, budget)
    if workspace_mb <= 0:
        fits = rows.workspace <= budget and rows.span >= min(n_rows, LEAST_ROWS)
        return fits and rows.seconds < columns.seconds
    if (rows.workspace <= budget) != (columns.workspace <= budget):
        return rows.workspace <= budget
    if rows.workspace > budget:  # neither fits: what misses by less
        return rows.workspace < columns.workspace
    return rows.seconds < columns.seconds


@lru_cache(maxsize=256)
def _switch(need: Need, workspace_mb: float) -> int:
    high = 1
    while not _rows_win(high, need, workspace_mb):
        high *= 2
        if high > 1 << 40:
            return NEVER
    low = high // 2  # columns win at low, rows at high
    while high - low > 1:
        middle = (low + high) // 2
        if _rows_win(middle, need, workspace_mb):
            high = middle
        else:
            low = middle
    return high


def switch_rows(
    n_classes: int,
    width: int,
    itemsize: int,
    weight_itemsize: int,
    workspace_mb: float = 0.0,
    capped: bool = False,
) -> int:
    """Return the least number of rows, ignored ones included, for which blocks of rows are taken.

    Without a workspace, blocks are taken where 2048 rows of them need no more memory than slices of the
    vocabulary and the model has them faster; with one, where they alone keep to it, or both do and
    blocks are faster. A soft cap's slope cannot be told from an exponential: such a head never switches.
    """
    if capped or itemsize not in TILE_RATE:
        return NEVER
    return _switch(Need(n_classes, width, itemsize, weight_itemsize), workspace_mb)


def asked() -> str:
    """Return the order that :func:`use` asks for here, or nothing."""
    return _override[-1] if _override else ""


@contextmanager
def use(order: str) -> Iterator[None]:
    """Take ``order`` (``rows`` or ``columns``) whatever the shape, inside the ``with`` block.

    A head with a soft cap is refused by the engine under ``rows``.

    Raises:
        ValueError: no such order.
    """
    if order not in ("rows", "columns"):
        raise ValueError(f"The order must be 'rows' or 'columns', not {order!r}.")
    _override.append(order)
    try:
        yield
    finally:
        _override.pop()
