"""Choose whether the ``triton`` engine computes gradients over chunks of the vocabulary or chunks of rows.

``vocab_chunks`` (N small against V): the forward pass keeps two numbers per row, and the backward pass computes a
slice's scores again. dW is written once; dX is read and written once per slice. That is 8 N D V operations.
``row_chunks`` (N large against V): the forward pass computes a block's scores over the whole vocabulary, keeps their
exponentials, and computes the gradients at once. dX is written once; dW is read and written once per block.
That is 6 N D V operations, and another pass over the scores instead of the recomputation.

:func:`switch_rows` returns the number of rows from which ``row_chunks`` is used, by memory first and then by a
model of time. The rates of that model are an H100's, from data sheets and published runs; nothing here
has been timed. Only their ratio matters, and :func:`use` overrides the choice.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

__all__ = [
    "CHUNKS", "Head", "Plan", "asked", "budget_of", "by_columns", "by_rows", "plan_columns", "plan_rows_at_once",
    "switch_rows", "use", "whole_waves",
]  # fmt: skip

CHUNKS = ("vocab_chunks", "row_chunks")
GRAD_BYTES = 48 << 20
# Memory that chunks of rows may take by default if they are faster.
ROW_CHUNK_BYTES = 256 << 20
# If they take more memory than chunks of the vocabulary, they must save a tenth of the time.
WORTH_MEMORY = 0.9
LEAST_COLUMNS = 1536
COLUMN_STEP = 128
# With fewer rows, dW's traffic takes more time than the recomputation that is saved.
LEAST_ROWS = 2048
ROW_STEP = 128
# Four float32 statistics per row for every tile of the vocabulary, which is at least this wide.
TILE_COLUMNS, TILE_BYTES = 64, 16
# Operations and bytes per second: tiles, library products, memory. float32 runs outside the tensor cores.
TILE_RATE = {2: 500e12, 4: 40e12}
LIBRARY_RATE = {2: 700e12, 4: 50e12}
BYTE_RATE = 3e12
NEVER = 1 << 62
_override: list[str] = []


class Head(NamedTuple):
    """A head: ``classes`` V, ``width`` D, bytes of an element of a state and of the weight."""

    classes: int
    width: int
    itemsize: int
    weight_itemsize: int


class Plan(NamedTuple):
    """A way to compute the gradients of N rows.

    Attributes:
        span: columns of a slice, or rows of a block.
        workspace: bytes of all temporary buffers beyond the inputs and the gradients.
        flops: multiply-adds times two, forward and backward.
        traffic: bytes of memory traffic of accumulators, operands and scores.
        seconds: the model's time, only for comparison.
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
    """Return the number of classes in a slice of the backward pass.

    Args:
        n_rows: M valid rows.
        n_classes: V.
        width: D.
        itemsize: bytes of an element of the logits' gradient.
        workspace_mb: bound in MiB on all temporary buffers: the logits' gradient, the gathered rows and dX in
            float32; 0 plans 48 MiB of it, or 1536 columns if that is more, because each slice
            reads and writes all of dX.
        bytes_beside: further bytes per column, for a cast weight or a float32 piece of dW.
    """
    if workspace_mb > 0:
        budget = workspace_mb * 2**20 - n_rows * width * (itemsize + 4)
        return _fitting(budget, n_rows * itemsize + bytes_beside, n_classes, COLUMN_STEP)
    columns = _fitting(GRAD_BYTES, n_rows * itemsize, n_classes, COLUMN_STEP)
    return min(max(columns, LEAST_COLUMNS), n_classes)


def whole_waves(span: int, width: int, processors: int) -> int:
    """Return at most ``span`` columns, such that dW's tiles of 256 x 128 divide into whole waves.

    A slice of 6144 columns and a width of 768 make 144 tiles, for which 132 multiprocessors take as
    long as for 264; 5632 columns make 132. A slice of less than one wave stays as it is.
    """
    wave = processors // -(-width // 128) * 256
    return span // wave * wave if 0 < wave <= span else span


def by_columns(n_rows: int, head: Head, workspace_mb: float) -> Plan:
    """Return the plan with slices of the vocabulary for ``n_rows`` rows: width, memory and traffic."""
    v, d, b, w = head
    beside = d * b if w != b else 0
    span = plan_columns(n_rows, v, d, b, workspace_mb, beside)
    slices = v / span
    traffic = n_rows * d * (8 + 2 * b) * slices + 3 * n_rows * v * b + 3 * v * d * w
    seconds = 4 * n_rows * d * v * (1 / TILE_RATE[b] + 1 / LIBRARY_RATE[b]) + traffic / BYTE_RATE
    workspace = n_rows * span * b + n_rows * d * (b + 4) + span * beside
    return Plan(span, workspace, 8 * n_rows * d * v, traffic, seconds)


def _row_bytes(head: Head) -> tuple[float, float]:
    """Return the fixed bytes of a block of rows, and its bytes per row."""
    v, d, b, w = head
    cast = v * d * b if w != b else 0
    sums = v * d * 4 if w != 4 else 0
    piece = 4 if b == 2 else b
    return cast + sums, v * b + TILE_BYTES * v / TILE_COLUMNS + d * (b + piece)


def plan_rows_at_once(n_rows: int, head: Head, budget: float) -> int:
    """Return the number of rows of a block within ``budget`` bytes; blocks are about equally large."""
    fixed, each = _row_bytes(head)
    most = _fitting(budget - fixed, each, max(n_rows, 1), ROW_STEP)
    blocks = -(-max(n_rows, 1) // most)
    even = -(-n_rows // blocks)
    return max(1, min(most, -(-even // ROW_STEP) * ROW_STEP))


def by_rows(n_rows: int, head: Head, budget: float) -> Plan:
    """Return the plan with blocks of rows for ``n_rows`` rows within ``budget`` bytes: height, memory and traffic."""
    v, d, b, w = head
    fixed, each = _row_bytes(head)
    span = _fitting(budget - fixed, each, max(n_rows, 1), ROW_STEP)
    blocks = n_rows / span
    traffic = v * d * (8 + 2 * b) * blocks + 5 * n_rows * v * b + v * d * (w + 4) + n_rows * d * 4 * b
    seconds = n_rows * d * v * (2 / TILE_RATE[b] + 4 / LIBRARY_RATE[b]) + traffic / BYTE_RATE
    return Plan(span, fixed + span * each, 6 * n_rows * d * v, traffic, seconds)


def _worth(n_rows: int, head: Head, budget: float) -> bool:
    """Return whether chunks of rows within ``budget`` are faster, by a tenth if they take more memory."""
    columns, rows = by_columns(n_rows, head, 0.0), by_rows(n_rows, head, budget)
    if rows.workspace <= columns.workspace:
        return rows.span >= min(n_rows, LEAST_ROWS) and rows.seconds < columns.seconds
    large = n_rows >= LEAST_ROWS and rows.span >= LEAST_ROWS // 2
    return large and rows.workspace <= budget and rows.seconds < WORTH_MEMORY * columns.seconds


def budget_of(n_rows: int, head: Head, workspace_mb: float) -> float:
    """Return the bytes that chunks of rows may take: the workspace, or those of chunks of the vocabulary, or 256 MiB."""
    if workspace_mb > 0:
        return workspace_mb * 2**20
    lean = by_columns(n_rows, head, 0.0).workspace
    return lean if _worth(n_rows, head, lean) else max(lean, float(ROW_CHUNK_BYTES))


def _rows_win(n_rows: int, head: Head, workspace_mb: float) -> bool:
    budget = budget_of(n_rows, head, workspace_mb)
    if workspace_mb <= 0:
        return _worth(n_rows, head, budget)
    columns, rows = by_columns(n_rows, head, workspace_mb), by_rows(n_rows, head, budget)
    if (rows.workspace <= budget) != (columns.workspace <= budget):
        return rows.workspace <= budget
    if rows.workspace > budget:  # neither fits: use the one that is closer
        return rows.workspace < columns.workspace
    return rows.seconds < columns.seconds


@lru_cache(maxsize=256)
def _switch(head: Head, workspace_mb: float) -> int:
    high = 1
    while not _rows_win(high, head, workspace_mb):
        high *= 2
        if high > 1 << 40:
            return NEVER
    low = high // 2  # columns win at low, rows at high
    while high - low > 1:
        middle = (low + high) // 2
        if _rows_win(middle, head, workspace_mb):
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
    """Return the least number of rows, ignored ones included, for which blocks of rows are used.

    Without a workspace, blocks are used if 2048 rows of them need no more memory than slices of the
    vocabulary and are faster in the model, or if 1024 rows of them fit 256 MiB and are faster by a tenth. With a
    workspace, they are used if only they fit, or if both fit and they are faster. A head with a soft cap never
    switches, because the cap's derivative cannot be recovered from an exponential.
    """
    if capped or itemsize not in TILE_RATE:
        return NEVER
    return _switch(Head(n_classes, width, itemsize, weight_itemsize), workspace_mb)


def asked() -> str:
    """Return the chunks that :func:`use` asks for here, or an empty string."""
    return _override[-1] if _override else ""


@contextmanager
def use(chunks: str) -> Iterator[None]:
    """Use ``chunks`` (``vocab_chunks`` or ``row_chunks``) for every shape inside the ``with`` block.

    With ``row_chunks`` the engine refuses a head with a soft cap.

    Raises:
        ValueError: the name is neither of the two.
    """
    if chunks not in CHUNKS:
        raise ValueError(f"chunks must be 'vocab_chunks' or 'row_chunks', not {chunks!r}.")
    _override.append(chunks)
    try:
        yield
    finally:
        _override.pop()
