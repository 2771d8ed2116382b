"""The row of temperature_kl and decoupled_kl, in Triton, as csrc/cpu/kl_rows.h and csrc/math/temperature_kl.h have it.

With b, c the bytes of a student's and a teacher's logit: the forward moves b + c per logit (a wide row whose sides are
close is read again, by then from the L2 cache mostly) and 28 bytes per row; the backward 2 b + c.

A row's divergence is summed as E[(t - s) / T] + log(sum_s / sum_t), E over p_t. Below `CLOSE` that cancels, and the
row is summed anew: with u = log(p_s / p_t),
  KL = E[exp(u) - 1 - u],
whose terms have one sign. An error d of log(sum_s / sum_t), which every u has, moves that sum by d^2 / 2 alone,
and d is about E[exp(u) - 1]; so half its square is taken off. The same sum serves wide rows whose first one is
infinite: a lane cannot know that a later maximum leaves its classes no probability, and float32 overflows where the
mean of its terms does not.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .numbers import device_function, max_over, sum_over
from .rows import (
    counted,
    exp_remainder,
    put_values,
    row_scale,
    row_start,
    tile_pair,
    tile_put,
    tile_rows,
    tile_start,
    tile_starts,
    walk_begin,
    walk_lanes,
    walk_pair,
    walk_put,
)

NOTHING = tl.constexpr(float("-inf"))
INFINITY = tl.constexpr(float("inf"))
CLOSE = tl.constexpr(0.25)
# What the backward needs of a row: gradient = coefficient * (exp2((s - shift_s) k) inverse_s - the same of t).
STATISTICS = tl.constexpr(6)  # shift_s, inverse_s, shift_t, inverse_t, coefficient, k


class Softness(NamedTuple):
    """A temperature T, and k = log2(e) / T and 1 / T, each rounded once."""

    temperature: float
    k: float
    inverse: float


class Region(NamedTuple):
    """decoupled_kl's two regions: which rows are foreground, each side's weight, and the foreground's softness."""

    flags: Tensor | None  # bool, one per row; None: there are no regions
    counts: Tensor | None  # of the foreground's rows, see rows.counted; None: a region's weight is not divided
    parts: int
    foreground: float
    foreground_tensor: Tensor | None  # instead of the number
    background: float
    background_tensor: Tensor | None
    softness: Softness


@device_function
def _options(scale, softness, region, row, count, live):
    """(scale, T, k, 1 / T) of each row."""
    zero = row.to(tl.float32) * 0.0
    factor = row_scale(scale, row, live)
    temperature, k, inverse = zero + softness.temperature, zero + softness.k, zero + softness.inverse
    if region.flags is not None:
        inside = tl.load(region.flags + row, mask=live, other=0) != 0
        foreground, background = zero + region.foreground, zero + region.background
        if region.foreground_tensor is not None:
            foreground = zero + tl.load(region.foreground_tensor)
        if region.background_tensor is not None:
            background = zero + tl.load(region.background_tensor)
        if region.counts is not None:
            number = counted(region.counts, region.parts)
            foreground /= tl.maximum(number, 1.0)
            background /= tl.maximum(count - number, 1.0)
        factor *= tl.where(inside, foreground, background)
        temperature = tl.where(inside, region.softness.temperature, temperature)
        k = tl.where(inside, region.softness.k, k)
        inverse = tl.where(inside, region.softness.inverse, inverse)
    return factor, temperature, k, inverse


@device_function
def _shift(top):
    """What is subtracted from logits. A row without finite values has no maximum; 0 keeps its exponents at -inf."""
    return tl.where(top == NOTHING, 0.0, top)


@device_function
def _value(sum_s, sum_t, dot, inverse):
    """(whether there is a distribution on both sides, 1 / sums, log(sum_s / sum_t), KL, whether to sum it anew)."""
    some = (sum_s != 0.0) & (sum_t != 0.0)  # 0 is the sum of a side all -inf; a maximum adds 1, or NaN
    inverse_s, inverse_t = tl.where(some, 1.0 / sum_s, 0.0), tl.where(some, 1.0 / sum_t, 0.0)
    ratio = tl.log(tl.div_rn(sum_s, sum_t))  # rounded as it should be: 0 for equal sides
    kl = dot * inverse_t * inverse + ratio
    return some, inverse_s, inverse_t, ratio, kl, some & ((kl < CLOSE) | (kl == INFINITY))


@device_function
def _anew(s, t, shift_s, shift_t, inverse_s, inverse_t, ratio, k, inverse):
    """Each class's share of E[exp(u) - 1 - u] and of E[exp(u) - 1]."""
    # u is a difference of logits less that of the maxima. Whichever is taken first leaves the other exact: the logits'
    # where the sides are close as they stand, the maxima's where a common offset lies between them.
    between = shift_s - shift_t
    offset = (between <= -1.0) | (between >= 1.0)
    from_s, from_t = tl.where(offset, shift_s, 0.0), tl.where(offset, shift_t, 0.0)
    u = (((s - from_s) - (t - from_t)) - tl.where(offset, 0.0, between)) * inverse - ratio
    p, q = tl.exp2((t - shift_t) * k) * inverse_t, tl.exp2((s - shift_s) * k) * inverse_s
    near = tl.abs(u) <= 1.0
    remainder = exp_remainder(u)
    gain = tl.where(near, p * (u + remainder), q - p)
    term = tl.where(near, p * remainder, (q - p) - p * u)
    # p = 0 contributes what the student has there, whatever u is.
    return tl.where(p == 0.0, q, term), tl.where(p == 0.0, q, gain)


@device_function
def _finish(statistics, row, live, some, shift_s, shift_t, inverse_s, inverse_t, kl, options):
    """Puts the statistics, and returns the value, of each row."""
    factor, temperature, k, _ = options
    at = statistics + row * STATISTICS
    tl.store(at, shift_s, mask=live)
    tl.store(at + 1, inverse_s, mask=live)
    tl.store(at + 2, shift_t, mask=live)
    tl.store(at + 3, inverse_t, mask=live)
    tl.store(at + 4, factor * temperature, mask=live)
    tl.store(at + 5, k, mask=live)
    return tl.where(some, factor * temperature * temperature * tl.where(kl < 0.0, 0.0, kl), 0.0)


@device_function
def _statistics(statistics, grad_loss, row, live, PER_ROW: tl.constexpr):
    """What the gradient needs of each row, the upstream gradient in the coefficient."""
    at = statistics + row * STATISTICS
    shift_s, inverse_s = tl.load(at, mask=live, other=0.0), tl.load(at + 1, mask=live, other=0.0)
    shift_t, inverse_t = tl.load(at + 2, mask=live, other=0.0), tl.load(at + 3, mask=live, other=0.0)
    coefficient, k = tl.load(at + 4, mask=live, other=0.0), tl.load(at + 5, mask=live, other=0.0)
    return shift_s, inverse_s, shift_t, inverse_t, coefficient * tl.load(grad_loss + row * PER_ROW, mask=live), k


@device_function
def _gradient(s, t, row):
    shift_s, inverse_s, shift_t, inverse_t, coefficient, k = row
    g = coefficient * (tl.exp2((s - shift_s) * k) * inverse_s - tl.exp2((t - shift_t) * k) * inverse_t)
    return tl.where((inverse_s == 0.0) & (inverse_t == 0.0), 0.0, g)  # a side all -inf


# Tiles: several rows in a program.


@triton.jit(do_not_specialize=["count"])
def kl_tile(
    rows,
    count,
    statistics,
    values,
    scale,
    softness,
    region,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STRIPS: tl.constexpr,
    COMMON: tl.constexpr,
):
    """Loads are written where they are used; the compiler keeps what they bring."""
    row, live = tile_rows(count, ROWS)
    starts = tile_starts(rows, row, COMMON)
    options = _options(scale, softness, region, row, count, live)
    k, inverse = options[2][:, None], options[3]

    top_s, top_t = tl.full([ROWS, CHUNK], NOTHING, tl.float32), tl.full([ROWS, CHUNK], NOTHING, tl.float32)
    for j in tl.static_range(STRIPS):
        s, t = tile_pair(rows, starts, j * CHUNK + tl.arange(0, CHUNK), live, NOTHING, COMMON)
        top_s, top_t = tl.maximum(top_s, s), tl.maximum(top_t, t)
    shift_s, shift_t = _shift(max_over(top_s, 1)), _shift(max_over(top_t, 1))

    sum_s, sum_t = tl.full([ROWS, CHUNK], 0, tl.float32), tl.full([ROWS, CHUNK], 0, tl.float32)
    dot = tl.full([ROWS, CHUNK], 0, tl.float32)
    for j in tl.static_range(STRIPS):
        s, t = tile_pair(rows, starts, j * CHUNK + tl.arange(0, CHUNK), live, NOTHING, COMMON)
        ds, dt = s - shift_s[:, None], t - shift_t[:, None]
        et = tl.exp2(dt * k)
        sum_s += tl.exp2(ds * k)
        sum_t += et
        dot += tl.where(et == 0.0, 0.0, et * (dt - ds))
    some, inverse_s, inverse_t, ratio, kl, again = _value(
        sum_over(sum_s, 1), sum_over(sum_t, 1), sum_over(dot, 1), inverse
    )
    if sum_over(again.to(tl.int32), 0) > 0:
        terms, gains = tl.full([ROWS, CHUNK], 0, tl.float32), tl.full([ROWS, CHUNK], 0, tl.float32)
        for j in tl.static_range(STRIPS):
            s, t = tile_pair(rows, starts, j * CHUNK + tl.arange(0, CHUNK), live, NOTHING, COMMON)
            term, gain = _anew(
                s,
                t,
                shift_s[:, None],
                shift_t[:, None],
                inverse_s[:, None],
                inverse_t[:, None],
                ratio[:, None],
                k,
                inverse[:, None],
            )
            terms += term
            gains += gain
        y = sum_over(gains, 1)
        kl = tl.where(again, sum_over(terms, 1) - 0.5 * y * y, kl)
    value = _finish(statistics, row, live, some, shift_s, shift_t, inverse_s, inverse_t, kl, options)
    put_values(values, value, row, live, KEEP)


@triton.jit(do_not_specialize=["count"])
def kl_tile_gradient(
    rows,
    count,
    statistics,
    grad_loss,
    PER_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STRIPS: tl.constexpr,
    COMMON: tl.constexpr,
):
    row, live = tile_rows(count, ROWS)
    starts, start = tile_starts(rows, row, COMMON), tile_start(rows.other, row, rows.sizes, COMMON)
    known = _statistics(statistics, grad_loss, row[:, None], live[:, None], PER_ROW)
    for j in tl.static_range(STRIPS):
        column = j * CHUNK + tl.arange(0, CHUNK)
        s, t = tile_pair(rows, starts, column, live, NOTHING, COMMON)
        tile_put(rows, start, column, live, _gradient(s, t, known), COMMON)


# Walks: one wide row in a program.


@device_function
def _add(s, t, sums, k):
    """A step's values into the lanes' sums, which first move under the lanes' new maxima."""
    new_s, new_t = tl.maximum(sums[0], max_over(s, 1)), tl.maximum(sums[1], max_over(t, 1))
    sum_s, sum_t, dot = _move(sums, new_s, new_t, k)
    ds, dt = s - _shift(new_s)[:, None], t - _shift(new_t)[:, None]
    es, et = tl.exp2(ds * k), tl.exp2(dt * k)
    product = tl.where(et == 0.0, 0.0, et * (dt - ds))
    return new_s, new_t, sum_s + sum_over(es, 1), sum_t + sum_over(et, 1), dot + sum_over(product, 1)


@device_function
def _move(sums, new_s, new_t, k):
    """The lanes' sums under other maxima."""
    top_s, top_t, sum_s, sum_t, dot = sums
    factor_s, factor_t = tl.exp2((top_s - _shift(new_s)) * k), tl.exp2((top_t - _shift(new_t)) * k)
    moved = tl.where(new_s > top_s, new_s - top_s, 0.0) - tl.where(new_t > top_t, new_t - top_t, 0.0)
    dot = tl.where(factor_t == 0.0, 0.0, factor_t * (dot + sum_t * moved))
    return sum_s * factor_s, sum_t * factor_t, dot


@triton.jit(do_not_specialize=["count"])
def kl_walk(
    rows,
    count,
    statistics,
    values,
    scale,
    softness,
    region,
    KEEP: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    options = _options(scale, softness, region, row, count, True)
    k, inverse = options[2], options[3]
    begin, lane = walk_begin(rows, row, rows.columns, LANES, VEC, UNIT), walk_lanes(LANES, VEC)
    rest = rows.columns - begin[3]

    least, zero = tl.full([LANES], NOTHING, tl.float32), tl.full([LANES], 0, tl.float32)
    sums = (least, least, zero, zero, zero)
    for i in range(0, begin[3], LANES * VEC):
        s, t = walk_pair(rows, begin, i + lane, NOTHING, VEC, ALIGNED, True)
        sums = _add(s, t, sums, k)
    for i in range(0, rest, LANES * VEC):
        s, t = walk_pair(rows, begin, i + lane, NOTHING, VEC, ALIGNED, False)
        sums = _add(s, t, sums, k)
    top_s, top_t = max_over(sums[0], 0), max_over(sums[1], 0)
    sum_s, sum_t, dot = _move(sums, top_s, top_t, k)
    shift_s, shift_t = _shift(top_s), _shift(top_t)
    some, inverse_s, inverse_t, ratio, kl, again = _value(
        sum_over(sum_s, 0), sum_over(sum_t, 0), sum_over(dot, 0), inverse
    )
    if again:
        terms, gains = zero, zero
        for i in range(0, begin[3], LANES * VEC):
            s, t = walk_pair(rows, begin, i + lane, NOTHING, VEC, ALIGNED, True)
            term, gain = _anew(s, t, shift_s, shift_t, inverse_s, inverse_t, ratio, k, inverse)
            terms += sum_over(term, 1)
            gains += sum_over(gain, 1)
        for i in range(0, rest, LANES * VEC):
            s, t = walk_pair(rows, begin, i + lane, NOTHING, VEC, ALIGNED, False)
            term, gain = _anew(s, t, shift_s, shift_t, inverse_s, inverse_t, ratio, k, inverse)
            terms += sum_over(term, 1)
            gains += sum_over(gain, 1)
        y = sum_over(gains, 0)
        kl = sum_over(terms, 0) - 0.5 * y * y
    value = _finish(statistics, row, True, some, shift_s, shift_t, inverse_s, inverse_t, kl, options)
    tl.store(values + row, value)


@triton.jit(do_not_specialize=["count"])
def kl_walk_gradient(
    rows,
    count,
    statistics,
    grad_loss,
    PER_ROW: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    known = _statistics(statistics, grad_loss, row, True, PER_ROW)
    begin, lane = walk_begin(rows, row, rows.columns, LANES, VEC, UNIT), walk_lanes(LANES, VEC)
    start = row_start(rows.other, row, rows.sizes)
    for i in range(0, begin[3], LANES * VEC):
        s, t = walk_pair(rows, begin, i + lane, NOTHING, VEC, ALIGNED, True)
        walk_put(rows, start, begin, i + lane, _gradient(s, t, known), VEC, ALIGNED, True)
    for i in range(0, rows.columns - begin[3], LANES * VEC):
        s, t = walk_pair(rows, begin, i + lane, NOTHING, VEC, ALIGNED, False)
        walk_put(rows, start, begin, i + lane, _gradient(s, t, known), VEC, ALIGNED, False)
