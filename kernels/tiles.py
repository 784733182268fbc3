"""The Triton kernels of the ``triton`` engine. Logits exist only in registers, one tile at a time.

``partial_softmax`` walks over a strip of the vocabulary for a block of rows and keeps, for each row, the running
maximum, the sum of exponentials and the position of the first maximum. ``combine_partials`` combines a row's
strips and adds its target. ``logits_grad`` computes a slice of the scores again and writes the gradient
of the logits. For chunks of rows ``partial_softmax`` also keeps each tile's exponentials, from which
``probs_to_grad`` computes the gradient without another product. ``column_sums`` adds the rows of a gradient
for the bias. There are no atomics and no locks: every element has a single writer, so a repeated run gives the same
bits. Scores are in base 2, ``z2 = z * log2(e)``, with the logit scale folded into the same factor.
Offsets are 64-bit. This module knows nothing of torch.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "KEPT_GAIN", "column_sums", "combine_partials", "log_one_more", "logits_grad", "partial_softmax",
    "probs_to_grad", "tanh",
]  # fmt: skip

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Exponentials are stored times 2^8: float16's smallest normal number is 6e-5, its largest 65504.
KEPT_GAIN = tl.constexpr(8.0)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def tanh(u) -> tl.tensor:  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Return the hyperbolic tangent of float32 ``u``, as exact near 0 as elsewhere."""
    # Near 0 the exponential form cancels; a Pade approximant is exact to 1e-9 there.
    q = u * u
    small = u * (945.0 + q * (105.0 + q)) / (945.0 + q * (420.0 + 15.0 * q))
    large = 1.0 - 2.0 / (tl.exp2(u * (2.0 * LOG2E)) + 1.0)
    return tl.where(q < 0.36, small, large)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def log_one_more(x) -> tl.tensor:  # type: ignore[no-untyped-def]  # noqa: ANN001
    """Return ``log(1 + x)`` of float32 ``x >= 0``, as exact near 0 as elsewhere; a GPU's logarithm is inexact near 1."""
    s = x / (2.0 + x)
    q = s * s
    small = 2.0 * s * (1.0 + q * (1.0 / 3.0 + q * (0.2 + q * (1.0 / 7.0 + q * (1.0 / 9.0)))))
    return tl.where(x < 0.5, small, tl.log(1.0 + x))


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _base_two(  # type: ignore[no-untyped-def]
    z, offset, scale, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,  # noqa: ANN001
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Turn products into base-2 scores; also return the tanh if scores are capped."""
    t = z
    if HAS_BIAS or HAS_CAP:
        z = z * scale
        if HAS_BIAS:
            z += offset
        if HAS_CAP:
            t = tanh(z / softcap)
            z = softcap * t
        z = z * LOG2E
    else:
        z = z * (scale * LOG2E)
    return z, t


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _scores(  # type: ignore[no-untyped-def]
    hidden, weight, bias, index, columns,  # noqa: ANN001
    n_columns, width, stride_hn, stride_hd, stride_wv, stride_wd, scale, softcap,  # noqa: ANN001
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:  # fmt: skip
    """Return base-2 scores (BLOCK_N, BLOCK_V) of the rows ``index``, and the tanh if scores are capped."""
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
    offset = 0.0
    if HAS_BIAS:
        offset = tl.load(bias + near).to(tl.float32)[None, :]
    z, t = _base_two(z, offset, scale, softcap, HAS_BIAS, HAS_CAP)
    return z, t


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def partial_softmax(  # type: ignore[no-untyped-def]
    hidden, weight, bias, indices, partials, kept,  # noqa: ANN001
    n_rows, base, n_columns, width, stride_hn, stride_hd, stride_wv, stride_wd, kept_stride,  # noqa: ANN001
    scale, softcap, tiles_a_strip, n_strips,  # noqa: ANN001
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, SUM: tl.constexpr, CARRY: tl.constexpr,
    KEEP: tl.constexpr, EVEN_V: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """Compute partial statistics (4, n_rows, n_strips) of the vocabulary ``[base, base + n_columns)``.

    The four are the maximum, the sum of exponentials without the maximum's own 1 (beside which small ones would be
    lost), the sum of scores, and the first column of the tile with the first maximum. With CARRY the strip
    continues from its earlier statistics. The target's score is left to :func:`combine_partials`: finding it here
    would cost 58 registers per thread, and with them the second block on a multiprocessor.
    """
    # Programs (row block, strip, group): a group's states stay in the L2 cache for all strips.
    row_block = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    strip = tl.program_id(1)
    row = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_rows = row < n_rows
    near = tl.minimum(row, n_rows - 1)
    index = tl.load(indices + near)
    lane = tl.arange(0, BLOCK_V)
    plane = tl.full((), n_strips, tl.int64) * n_rows
    place = partials + row.to(tl.int64) * n_strips + strip
    largest = tl.full((BLOCK_N,), -float("inf"), dtype=tl.float32)
    rest = tl.zeros((BLOCK_N,), dtype=tl.float32)
    summed = tl.zeros((BLOCK_N,), dtype=tl.float32)
    winner = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if CARRY:
        largest = tl.load(place, mask=inside_rows, other=0.0)
        rest = tl.load(place + plane, mask=inside_rows, other=0.0)
        summed = tl.load(place + 2 * plane, mask=inside_rows, other=0.0)
        winner = tl.load(place + 3 * plane, mask=inside_rows, other=0.0)
    first = strip * tiles_a_strip * BLOCK_V
    for start in range(first, tl.minimum(first + tiles_a_strip * BLOCK_V, n_columns), BLOCK_V):
        columns = start + lane
        z, _ = _scores(
            hidden, weight, bias, index, columns, n_columns, width,
            stride_hn, stride_hd, stride_wv, stride_wd, scale, softcap,
            HAS_BIAS, HAS_CAP, EVEN_D, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        if SUM:
            real = z
            if not EVEN_V:
                real = tl.where((columns < n_columns)[None, :], z, 0.0)
            summed += tl.sum(real, axis=1)
        if not EVEN_V:
            z = tl.where((columns < n_columns)[None, :], z, -float("inf"))
        top = tl.max(z, axis=1)
        higher = tl.maximum(largest, top)
        # -inf only while every logit so far is -inf (a bias may ban classes): no -inf - -inf.
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        powers = tl.exp2(z - shift[:, None])
        added = tl.sum(powers, axis=1)
        under = (rest + 1.0) * tl.exp2(largest - shift) + (added - 1.0)  # with the maximum in this tile
        rest = tl.where(top > largest, under, rest + added)
        if KEEP:
            kept_at = kept + row.to(tl.int64)[:, None] * kept_stride + columns[None, :]
            inside = inside_rows[:, None] & (columns < n_columns)[None, :]
            rounded = (powers * (2.0**KEPT_GAIN)).to(kept.dtype.element_ty)
            tl.store(kept_at, rounded, mask=inside)
        # float32 holds a tile's first column exactly up to 2^24
        winner = tl.where(top > largest, (base + start).to(tl.float32), winner)
        largest = higher
    tl.store(place, largest, mask=inside_rows)
    tl.store(place + plane, rest, mask=inside_rows)
    tl.store(place + 2 * plane, summed, mask=inside_rows)
    tl.store(place + 3 * plane, winner, mask=inside_rows)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def combine_partials(  # type: ignore[no-untyped-def]
    hidden, weight, bias, indices, targets, partials, losses, hits, stats,  # noqa: ANN001
    n_rows, n_strips, n_classes, width, stride_hn, stride_hd, stride_wv, stride_wd,  # noqa: ANN001
    stats_stride, scale, softcap, smoothing, z_loss,  # noqa: ANN001
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, COUNT: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    """Combine the strips of a row: its loss in nats, whether it hits, its maximum and sum, base 2.

    The product of the row with its target is computed here, in another order than in the tiles. A row
    hits if the target is the first column with the largest score. Then the score *is* the maximum, which makes a
    confident row's loss exact. If the maximum has more than two thirds of the probability, a target within half of it
    is that column. If it has less, the scores of the winning tile are computed again, all in one order, so that ties
    go to the first column; without COUNT they are not, and such a row does not hit.
    """
    row = tl.program_id(0).to(tl.int64)
    strip = tl.arange(0, BLOCK_S)
    plane = tl.full((), n_strips, tl.int64) * n_rows
    place = partials + row * n_strips + strip
    known = strip < n_strips
    tops = tl.load(place, mask=known, other=-float("inf"))
    largest = tl.max(tops, axis=0)
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    share = tl.exp2(tops - shift)
    # Every strip's sum lacks the 1 of its own maximum; the combined sum lacks only that of the first largest.
    leader = tl.min(tl.where(tops == largest, strip, BLOCK_S), axis=0)
    rest = tl.sum(tl.load(place + plane, mask=known, other=0.0) * share, axis=0)
    rest += tl.sum(tl.where(strip == leader, 0.0, share), axis=0)
    total = 1.0 + rest
    summed = tl.sum(tl.load(place + 2 * plane, mask=known, other=0.0), axis=0)
    winners = tl.load(place + 3 * plane, mask=known, other=0.0)
    winner = tl.min(tl.where(known & (tops == largest), winners, float("inf")), axis=0)
    target = tl.load(targets + row)
    bad = (target < 0) | (target >= n_classes)
    column = tl.where(bad, 0, target)
    depth = tl.arange(0, BLOCK_D)
    x_at = hidden + tl.load(indices + row) * stride_hn + depth.to(tl.int64) * stride_hd
    w_at = weight + column * stride_wv + depth.to(tl.int64) * stride_wd
    step = tl.full((), BLOCK_D, tl.int64)
    product = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for k in range(0, width, BLOCK_D):
        x = tl.load(x_at + (k // BLOCK_D) * step * stride_hd, mask=depth < width - k, other=0.0)
        w = tl.load(w_at + (k // BLOCK_D) * step * stride_wd, mask=depth < width - k, other=0.0)
        product += x.to(tl.float32) * w.to(x.dtype).to(tl.float32)
    offset = 0.0
    if HAS_BIAS:
        offset = tl.load(bias + column).to(tl.float32)
    at_target, _ = _base_two(tl.sum(product, axis=0), offset, scale, softcap, HAS_BIAS, HAS_CAP)
    tile = (column // BLOCK_V) * BLOCK_V
    near = (at_target > largest - 0.5) & (tile.to(tl.float32) == winner) & (bad == 0)
    hit = near & (total < 1.5)
    if COUNT & near & (total >= 1.5):
        best = -float("inf")
        place_of_best = tile
        for first in range(0, BLOCK_V, CHUNK):
            columns = tile + first + tl.arange(0, CHUNK)
            inside = columns < n_classes
            rows_at = weight + tl.where(inside, columns, 0)[:, None] * stride_wv
            rows_at += depth.to(tl.int64)[None, :] * stride_wd
            products = tl.zeros((CHUNK, BLOCK_D), dtype=tl.float32)
            for k in range(0, width, BLOCK_D):
                some = depth < width - k
                x = tl.load(x_at + (k // BLOCK_D) * step * stride_hd, mask=some, other=0.0)
                w = tl.load(rows_at + (k // BLOCK_D) * step * stride_wd, mask=some[None, :], other=0.0)
                products += x.to(tl.float32)[None, :] * w.to(x.dtype).to(tl.float32)
            offsets = 0.0
            if HAS_BIAS:
                offsets = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
            scores, _t = _base_two(tl.sum(products, axis=1), offsets, scale, softcap, HAS_BIAS, HAS_CAP)
            scores = tl.where(inside, scores, -float("inf"))
            top = tl.max(scores, axis=0)
            found = tl.min(tl.where(scores == top, columns, n_classes), axis=0)
            place_of_best = tl.where(top > best, found, place_of_best)
            best = tl.maximum(top, best)
        hit = place_of_best == target
    at_target = tl.where(hit, largest, at_target)
    natural = log_one_more(rest)
    loss = natural + LN2 * ((1.0 - smoothing) * (largest - at_target))
    if smoothing > 0.0:  # separate, because 0 * -inf is NaN
        loss += LN2 * (smoothing * (largest - summed / n_classes))
    lse = natural + LN2 * largest
    if z_loss > 0.0:  # separate: the square of a large lse is infinite, and 0 * inf is NaN
        loss += z_loss * lse * lse
    tl.store(losses + row, tl.where(bad, float("nan"), loss))
    tl.store(hits + row, hit.to(tl.int8))
    tl.store(stats + row, largest)
    tl.store(stats + stats_stride + row, total)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def logits_grad(  # type: ignore[no-untyped-def]
    hidden, weight, bias, indices, targets, peaks, shares, gains, grads,  # noqa: ANN001
    n_rows, base, n_columns, width, stride_hn, stride_hd, stride_wv, stride_wd, grads_stride,  # noqa: ANN001
    scale, softcap, on_target, elsewhere,  # noqa: ANN001
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, EVEN_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """Write a slice's ``gain_i * dloss_i/dlogit_iv`` into ``grads`` (n_rows, n_columns), rounded once.

    ``dloss/dz = share_i * 2^(z2 - peak_i) - elsewhere - on_target * (v is the target)``, where ``share``
    is ``(1 + 2 z_loss lse) / sum`` and ``elsewhere`` is ``smoothing / V``.
    """
    row_block = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)  # as in partial_softmax
    row = row_block * BLOCK_N + tl.arange(0, BLOCK_N)
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
    if HAS_CAP:  # d softcap(u) / du = 1 - tanh(u / c)^2
        slope = slope * (1.0 - t * t)
    # A row without weight contributes nothing, not even its NaN.
    slope = tl.where((gain == 0.0)[:, None], 0.0, slope * gain[:, None])
    place = grads + row.to(tl.int64)[:, None] * grads_stride + columns[None, :]
    inside = (row < n_rows)[:, None] & (columns < n_columns)[None, :]
    tl.store(place, slope.to(grads.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def probs_to_grad(  # type: ignore[no-untyped-def]
    kept, targets, partials, peaks, sums, gains,  # noqa: ANN001
    n_rows, n_classes, n_tiles, kept_stride, on_target, elsewhere, z_loss,  # noqa: ANN001
    TILE_V: tl.constexpr, BLOCK_V: tl.constexpr,
) -> None:  # fmt: skip
    """Turn the exponentials of :func:`partial_softmax` into ``gain_i * dloss_i/dlogit_iv``, in place.

    ``partials`` begins with the tiles' maxima (n_rows, n_tiles), of tiles TILE_V wide; ``peaks`` and
    ``sums`` are the rows'. Each program handles BLOCK_V columns of a row.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = columns < n_classes
    peak = tl.load(peaks + row)
    total = tl.load(sums + row)
    natural = tl.log(total) + LN2 * peak
    share = (1.0 + 2.0 * z_loss * natural) / total
    top = tl.load(partials + row * n_tiles + columns // TILE_V, mask=inside, other=0.0)
    place = kept + row * kept_stride + columns
    power = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    slope = power * (tl.exp2(top - peak - KEPT_GAIN) * share) - elsewhere
    slope -= tl.where(columns == tl.load(targets + row), on_target, 0.0)
    gain = tl.load(gains + row)
    slope = tl.where(gain == 0.0, 0.0, slope * gain)
    tl.store(place, slope.to(kept.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def column_sums(  # type: ignore[no-untyped-def]
    grads, factors, partials, n_rows, n_columns, grads_stride,  # noqa: ANN001
    ROWS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
) -> None:  # fmt: skip
    """Write sums of ``factors[i] * grads[i]`` over every ROWS rows into ``partials`` (blocks, n_columns).

    BLOCK_R rows at a time are added in a tree, and only few such sums one after another, so that the error
    grows with the logarithm of their number.
    """
    columns = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = columns < n_columns
    first = tl.program_id(1) * ROWS
    total = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for start in range(first, tl.minimum(first + ROWS, n_rows), BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        place = grads + row.to(tl.int64)[:, None] * grads_stride + columns[None, :]
        part = tl.load(place, mask=(row < n_rows)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        factor = tl.load(factors + row, mask=row < n_rows, other=0.0)
        total += tl.sum(part * factor[:, None], axis=0)
    tl.store(partials + tl.program_id(1).to(tl.int64) * n_columns + columns, total, mask=inside)
