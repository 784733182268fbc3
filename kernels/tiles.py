"""The Triton kernels of the ``triton`` engine: logits exist in registers only, one tile at a time.

``strip_kernel`` walks a strip of the vocabulary for a block of rows and keeps, a row, the running
maximum, the sum of exponentials, the target's logit and where the maximum was met first;
``merge_kernel`` joins a row's strips; ``slope_kernel`` computes a slice of the scores again and writes
the gradient of the logits. No atomics and no locks: every element has one writer, so a repeated run
gives the same bits. Scores are in base 2, ``z2 = z * log2(e)``, with the logit scale folded into the
same factor. Offsets are 64-bit. Knows nothing of torch.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["merge_kernel", "slope_kernel", "strip_kernel"]

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _scores(  # type: ignore[no-untyped-def]
    hidden, weight, bias, index, columns,  # noqa: ANN001
    n_columns, width, stride_hn, stride_hd, stride_wv, stride_wd, scale, softcap,  # noqa: ANN001
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Base-2 scores (BLOCK_N, BLOCK_V) of the rows ``index``, and tanh where the scores are capped."""
    # Columns beyond the end read the last one again: cheaper than a mask, and the caller drops them.
    near = tl.minimum(columns, n_columns - 1).to(tl.int64)
    depth = tl.arange(0, BLOCK_D)
    step = tl.full((), BLOCK_D, tl.int64)
    a_at = hidden + index[:, None] * stride_hn + depth.to(tl.int64)[None, :] * stride_hd
    b_at = weight + near[None, :] * stride_wv + depth.to(tl.int64)[:, None] * stride_wd
    z = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for k in range(0, width, BLOCK_D):
        if EVEN_D:
            a = tl.load(a_at)
            b = tl.load(b_at)
        else:
            a = tl.load(a_at, mask=depth[None, :] < width - k, other=0.0)
            b = tl.load(b_at, mask=depth[:, None] < width - k, other=0.0)
        z = tl.dot(a, b, z, input_precision=PRECISION)
        a_at += step * stride_hd
        b_at += step * stride_wd
    t = z
    if HAS_BIAS or HAS_CAP:
        z = z * scale
        if HAS_BIAS:
            z += tl.load(bias + near).to(tl.float32)[None, :]
        if HAS_CAP:
            u = z / softcap
            # Near 0 the exponential form cancels; a Pade approximant is exact to 1e-9 there.
            q = u * u
            small = u * (945.0 + q * (105.0 + q)) / (945.0 + q * (420.0 + 15.0 * q))
            large = 1.0 - 2.0 / (tl.exp2(u * (2.0 * LOG2E)) + 1.0)
            t = tl.where(q < 0.36, small, large)
            z = softcap * t
        z = z * LOG2E
    else:
        z = z * (scale * LOG2E)
    return z, t


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def strip_kernel(  # type: ignore[no-untyped-def]
    hidden, weight, bias, indices, targets, partials,  # noqa: ANN001
    n_rows, base, n_columns, width, stride_hn, stride_hd, stride_wv, stride_wd,  # noqa: ANN001
    scale, softcap, tiles_a_strip, n_strips,  # noqa: ANN001
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, SUM: tl.constexpr, CARRY: tl.constexpr,
    EVEN_V: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """Partial statistics (6, n_strips, n_rows) of vocabulary ``[base, base + n_columns)``.

    The six are: maximum, sum of exponentials, target's score, sum of scores, first column of the tile
    where the maximum was met first, and first column of the target's tile where no earlier column of
    that tile reaches the target's score (-2 elsewhere). With CARRY the strip goes on from what it left.
    """
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_rows = row < n_rows
    near = tl.minimum(row, n_rows - 1)
    index = tl.load(indices + near)
    goal = tl.load(targets + near) - base
    goal = tl.where((goal >= 0) & (goal < n_columns), goal, -1).to(tl.int32)
    lane = tl.arange(0, BLOCK_V)
    strip = tl.program_id(1).to(tl.int64)
    plane = tl.full((), n_strips, tl.int64) * n_rows
    place = partials + strip * n_rows + row
    largest = tl.full((BLOCK_N,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    at_target = tl.zeros((BLOCK_N,), dtype=tl.float32)
    summed = tl.zeros((BLOCK_N,), dtype=tl.float32)
    winner = tl.full((BLOCK_N,), -1.0, dtype=tl.float32)
    own = tl.full((BLOCK_N,), -2.0, dtype=tl.float32)
    if CARRY:
        largest = tl.load(place, mask=inside_rows, other=0.0)
        total = tl.load(place + plane, mask=inside_rows, other=0.0)
        at_target = tl.load(place + 2 * plane, mask=inside_rows, other=0.0)
        summed = tl.load(place + 3 * plane, mask=inside_rows, other=0.0)
        winner = tl.load(place + 4 * plane, mask=inside_rows, other=0.0)
        own = tl.load(place + 5 * plane, mask=inside_rows, other=0.0)
    first = tl.program_id(1) * tiles_a_strip * BLOCK_V
    for start in range(first, tl.minimum(first + tiles_a_strip * BLOCK_V, n_columns), BLOCK_V):
        columns = start + lane
        z, _ = _scores(
            hidden, weight, bias, index, columns, n_columns, width,
            stride_hn, stride_hd, stride_wv, stride_wd, scale, softcap,
            HAS_BIAS, HAS_CAP, EVEN_D, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        if SUM:
            kept = z
            if not EVEN_V:
                kept = tl.where((columns < n_columns)[None, :], z, 0.0)
            summed += tl.sum(kept, axis=1)
        if not EVEN_V:
            z = tl.where((columns < n_columns)[None, :], z, -float("inf"))
        local = goal - start
        here = (local >= 0) & (local < BLOCK_V)
        # float32 holds a tile's first column exactly up to 2^24
        name = (base + start).to(tl.float32)
        if tl.max(here.to(tl.int32), axis=0) > 0:
            found = tl.sum(tl.where(lane[None, :] == local[:, None], z, 0.0), axis=1)
            earlier = (lane[None, :] < local[:, None]) & (z >= found[:, None])
            beaten = tl.max(earlier.to(tl.int32), axis=1) > 0
            at_target = tl.where(here, found, at_target)
            own = tl.where(here & ~beaten, name, own)
        top = tl.max(z, axis=1)
        higher = tl.maximum(largest, top)
        # -inf only while every logit so far is -inf (a bias may ban classes): no -inf - -inf.
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp2(largest - shift) + tl.sum(tl.exp2(z - shift[:, None]), axis=1)
        winner = tl.where(top > largest, name, winner)
        largest = higher
    tl.store(place, largest, mask=inside_rows)
    tl.store(place + plane, total, mask=inside_rows)
    tl.store(place + 2 * plane, at_target, mask=inside_rows)
    tl.store(place + 3 * plane, summed, mask=inside_rows)
    tl.store(place + 4 * plane, winner, mask=inside_rows)
    tl.store(place + 5 * plane, own, mask=inside_rows)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def merge_kernel(  # type: ignore[no-untyped-def]
    partials, targets, losses, hits, stats,  # noqa: ANN001
    n_rows, n_strips, n_classes, stats_stride, smoothing, z_loss,  # noqa: ANN001
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Join the strips: (n_rows,) losses in nats and hits, and ``stats`` (2, ...): maximum, sum, base 2."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < n_rows
    plane = tl.full((), n_strips, tl.int64) * n_rows
    largest = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    at_target = tl.zeros((BLOCK,), dtype=tl.float32)
    summed = tl.zeros((BLOCK,), dtype=tl.float32)
    winner = tl.full((BLOCK,), -1.0, dtype=tl.float32)
    own = tl.full((BLOCK,), -2.0, dtype=tl.float32)
    for strip in range(0, n_strips):
        place = partials + tl.full((), strip, tl.int64) * n_rows + row
        top = tl.load(place, mask=inside, other=0.0)
        found = tl.load(place + 4 * plane, mask=inside, other=0.0)
        first = tl.where(top == largest, tl.minimum(winner, found), winner)
        winner = tl.where(top > largest, found, first)
        higher = tl.maximum(largest, top)
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp2(largest - shift)
        total += tl.load(place + plane, mask=inside, other=1.0) * tl.exp2(top - shift)
        largest = higher
        at_target += tl.load(place + 2 * plane, mask=inside, other=0.0)
        summed += tl.load(place + 3 * plane, mask=inside, other=0.0)
        own = tl.maximum(own, tl.load(place + 5 * plane, mask=inside, other=-2.0))
    target = tl.load(targets + row, mask=inside, other=0)
    natural = tl.log(total)
    loss = natural + LN2 * (largest - (1.0 - smoothing) * at_target)
    if smoothing > 0.0:  # apart: 0 * -inf is no loss
        loss -= LN2 * (smoothing * summed / n_classes)
    lse = natural + LN2 * largest
    loss += z_loss * lse * lse
    bad = (target < 0) | (target >= n_classes)
    tl.store(losses + row, tl.where(bad, float("nan"), loss), mask=inside)
    hit = (own == winner) & (at_target == largest) & (total == total)
    tl.store(hits + row, hit.to(tl.int8), mask=inside)
    tl.store(stats + row, largest, mask=inside)
    tl.store(stats + stats_stride + row, total, mask=inside)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def slope_kernel(  # type: ignore[no-untyped-def]
    hidden, weight, bias, indices, targets, peaks, shares, gains, slopes,  # noqa: ANN001
    n_rows, base, n_columns, width, stride_hn, stride_hd, stride_wv, stride_wd, slopes_stride,  # noqa: ANN001
    scale, softcap, on_target, elsewhere,  # noqa: ANN001
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """A slice's ``gain_i * dloss_i/dlogit_iv`` into ``slopes`` (n_rows, n_columns), rounded once.

    ``dloss/dz = share_i * 2^(z2 - peak_i) - elsewhere - on_target * (v is the target)``, where ``share``
    is ``(1 + 2 z_loss lse) / sum`` and ``elsewhere`` is ``smoothing / V``.
    """
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    near = tl.minimum(row, n_rows - 1)
    index = tl.load(indices + near)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    z, t = _scores(
        hidden, weight, bias, index, columns, n_columns, width,
        stride_hn, stride_hd, stride_wv, stride_wd, scale, softcap,
        HAS_BIAS, HAS_CAP, EVEN_D, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    goal = tl.load(targets + near) - base
    goal = tl.where((goal >= 0) & (goal < n_columns), goal, -1).to(tl.int32)
    peak = tl.load(peaks + near)
    share = tl.load(shares + near)
    gain = tl.load(gains + near)
    slope = tl.exp2(z - peak[:, None]) * share[:, None] - elsewhere
    slope -= tl.where(columns[None, :] == goal[:, None], on_target, 0.0)
    if HAS_CAP:
        slope = slope * (1.0 - t * t)
    slope = slope * gain[:, None]
    place = slopes + row.to(tl.int64)[:, None] * slopes_stride + columns[None, :]
    inside = (row < n_rows)[:, None] & (columns < n_columns)[None, :]
    tl.store(place, slope.to(slopes.dtype.element_ty), mask=inside)
