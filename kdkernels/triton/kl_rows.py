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

from .numbers import device_function, max_over, store_rounded, sum_over, to_float32
from .rows import (
    counted,
    exp_remainder,
    put_values,
    row_scale,
    row_start,
    strip_at,
    strip_mask,
    tile_start,
    walk_column,
    walk_lanes,
    walk_split,
    walk_start,
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

    flags: Tensor  # bool, one per row
    counts: Tensor | None  # of the foreground's rows, see rows.counted; None: a region's weight is not divided
    parts: int
    foreground: float
    foreground_tensor: Tensor | None  # instead of the number
    background: float
    background_tensor: Tensor | None
    softness: Softness


@device_function
def _options(scale, softness, region, row, rows, live):
    """(scale, T, k, 1 / T) of each row."""
    zero = row.to(tl.float32) * 0.0
    factor = row_scale(scale, row, live)
    temperature, k, inverse = zero + softness.temperature, zero + softness.k, zero + softness.inverse
    if region is not None:
        inside = tl.load(region.flags + row, mask=live, other=0) != 0
        foreground, background = zero + region.foreground, zero + region.background
        if region.foreground_tensor is not None:
            foreground = zero + tl.load(region.foreground_tensor)
        if region.background_tensor is not None:
            background = zero + tl.load(region.background_tensor)
        if region.counts is not None:
            number = counted(region.counts, region.parts)
            foreground /= tl.maximum(number, 1.0)
            background /= tl.maximum(rows - number, 1.0)
        factor *= tl.where(inside, foreground, background)
        temperature = tl.where(inside, region.softness.temperature, temperature)
        k = tl.where(inside, region.softness.k, k)
        inverse = tl.where(inside, region.softness.inverse, inverse)
    return factor, temperature, k, inverse


@device_function
def _put_statistics(statistics, row, live, shift_s, inverse_s, shift_t, inverse_t, coefficient, k):
    at = statistics + row * STATISTICS
    tl.store(at, shift_s, mask=live)
    tl.store(at + 1, inverse_s, mask=live)
    tl.store(at + 2, shift_t, mask=live)
    tl.store(at + 3, inverse_t, mask=live)
    tl.store(at + 4, coefficient, mask=live)
    tl.store(at + 5, k, mask=live)


@device_function
def _origin(shift_s, shift_t):
    """(from_s, from_t, rest): ((s - from_s) - (t - from_t)) - rest is (s - shift_s) - (t - shift_t).

    Whichever difference is taken first leaves the other exact: the logits' where the sides are close as they stand, the
    maxima's where a common offset lies between them.
    """
    between = shift_s - shift_t
    offset = (between <= -1.0) | (between >= 1.0)
    return tl.where(offset, shift_s, 0.0), tl.where(offset, shift_t, 0.0), tl.where(offset, 0.0, between)


@device_function
def _close_terms(p, q, u):
    """A class's share of E[exp(u) - 1 - u] and of E[exp(u) - 1], for teacher's and student's probabilities p, q."""
    near = tl.abs(u) <= 1.0
    remainder = exp_remainder(u)
    gain = tl.where(near, p * (u + remainder), q - p)
    term = tl.where(near, p * remainder, (q - p) - p * u)
    # p = 0 contributes what the student has there, whatever u is.
    return tl.where(p == 0.0, q, term), tl.where(p == 0.0, q, gain)


@device_function
def _shift(top):
    """What is subtracted from logits. A row without finite values has no maximum; 0 keeps its exponents at -inf."""
    return tl.where(top == NOTHING, 0.0, top)


@device_function
def _value(sum_s, sum_t, dot, inverse):
    """(whether there is a distribution on both sides, 1 / sums, log(sum_s / sum_t), KL, whether to sum it anew)."""
    some = (sum_s != 0.0) & (sum_t != 0.0)  # 0 is the sum of a side all -inf; a maximum adds 1, or NaN
    inverse_s, inverse_t = tl.where(some, 1.0 / sum_s, 0.0), tl.where(some, 1.0 / sum_t, 0.0)
    ratio = tl.log(sum_s / sum_t)
    kl = dot * inverse_t * inverse + ratio
    return some, inverse_s, inverse_t, ratio, kl, some & ((kl < CLOSE) | (kl == INFINITY))


@device_function
def _strip(student, teacher, start_s, start_t, first, columns, live, CHUNK: tl.constexpr, COMMON: tl.constexpr):
    """One strip of both sides, from column `first` on; -inf beyond the rows."""
    column = first + tl.arange(0, CHUNK)
    inside = strip_mask(live, column, columns, COMMON)
    s = tl.load(strip_at(student, start_s, column), mask=inside, other=NOTHING)
    t = tl.load(strip_at(teacher, start_t, column), mask=inside, other=NOTHING)
    return to_float32(s), to_float32(t)


@triton.jit(do_not_specialize=["rows"])
def kl_tile(
    student,
    teacher,
    sizes,
    rows,
    columns,
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
    """Several rows. Loads are written where they are used; the compiler keeps what they bring."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    start_s = tile_start(student, row, sizes, COMMON)
    start_t = tile_start(teacher, row, sizes, COMMON)
    factor, temperature, k, inverse = _options(scale, softness, region, row, rows, live)

    top_s, top_t = tl.full([ROWS, CHUNK], NOTHING, tl.float32), tl.full([ROWS, CHUNK], NOTHING, tl.float32)
    for j in tl.static_range(STRIPS):
        s, t = _strip(student, teacher, start_s, start_t, j * CHUNK, columns, live, CHUNK, COMMON)
        top_s, top_t = tl.maximum(top_s, s), tl.maximum(top_t, t)
    shift_s, shift_t = _shift(max_over(top_s, 1)), _shift(max_over(top_t, 1))

    sum_s, sum_t = tl.full([ROWS, CHUNK], 0, tl.float32), tl.full([ROWS, CHUNK], 0, tl.float32)
    dot = tl.full([ROWS, CHUNK], 0, tl.float32)
    for j in tl.static_range(STRIPS):
        s, t = _strip(student, teacher, start_s, start_t, j * CHUNK, columns, live, CHUNK, COMMON)
        ds, dt = s - shift_s[:, None], t - shift_t[:, None]
        et = tl.exp2(dt * k[:, None])
        sum_s += tl.exp2(ds * k[:, None])
        sum_t += et
        dot += tl.where(et == 0.0, 0.0, et * (dt - ds))
    sum_s, sum_t = sum_over(sum_s, 1), sum_over(sum_t, 1)
    some, inverse_s, inverse_t, ratio, kl, again = _value(sum_s, sum_t, sum_over(dot, 1), inverse)

    if sum_over(again.to(tl.int32), 0) > 0:
        from_s, from_t, rest = _origin(shift_s, shift_t)
        terms, gains = tl.full([ROWS, CHUNK], 0, tl.float32), tl.full([ROWS, CHUNK], 0, tl.float32)
        for j in tl.static_range(STRIPS):
            s, t = _strip(student, teacher, start_s, start_t, j * CHUNK, columns, live, CHUNK, COMMON)
            u = ((s - from_s[:, None]) - (t - from_t[:, None])) - rest[:, None]
            p = tl.exp2((t - shift_t[:, None]) * k[:, None]) * inverse_t[:, None]
            q = tl.exp2((s - shift_s[:, None]) * k[:, None]) * inverse_s[:, None]
            term, gain = _close_terms(p, q, u * inverse[:, None] - ratio[:, None])
            terms += term
            gains += gain
        y = sum_over(gains, 1)
        kl = tl.where(again, sum_over(terms, 1) - 0.5 * y * y, kl)
    kl = tl.where(kl < 0.0, 0.0, kl)
    value = tl.where(some, factor * temperature * temperature * kl, 0.0)
    put_values(values, value, row, live, KEEP)
    _put_statistics(statistics, row, live, shift_s, inverse_s, shift_t, inverse_t, factor * temperature, k)


@device_function
def _gradient(s, t, shift_s, inverse_s, shift_t, inverse_t, coefficient, k):
    return coefficient * (tl.exp2((s - shift_s) * k) * inverse_s - tl.exp2((t - shift_t) * k) * inverse_t)


@triton.jit(do_not_specialize=["rows"])
def kl_tile_gradient(
    student,
    teacher,
    grad,
    sizes,
    rows,
    columns,
    statistics,
    grad_loss,
    PER_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STRIPS: tl.constexpr,
    COMMON: tl.constexpr,
):
    """Several rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    start_s = tile_start(student, row, sizes, COMMON)
    start_t = tile_start(teacher, row, sizes, COMMON)
    start_g = tile_start(grad, row, sizes, COMMON)
    at = (statistics + row * STATISTICS)[:, None]
    shown = live[:, None]
    shift_s, inverse_s = tl.load(at, mask=shown, other=0.0), tl.load(at + 1, mask=shown, other=0.0)
    shift_t, inverse_t = tl.load(at + 2, mask=shown, other=0.0), tl.load(at + 3, mask=shown, other=0.0)
    coefficient, k = tl.load(at + 4, mask=shown, other=0.0), tl.load(at + 5, mask=shown, other=0.0)
    coefficient *= tl.load(grad_loss + (row * PER_ROW)[:, None], mask=shown, other=0.0)
    some = (inverse_s != 0.0) | (inverse_t != 0.0)
    for j in tl.static_range(STRIPS):
        s, t = _strip(student, teacher, start_s, start_t, j * CHUNK, columns, live, CHUNK, COMMON)
        g = tl.where(some, _gradient(s, t, shift_s, inverse_s, shift_t, inverse_t, coefficient, k), 0.0)
        column = j * CHUNK + tl.arange(0, CHUNK)
        store_rounded(strip_at(grad, start_g, column), g, strip_mask(live, column, columns, COMMON))


@device_function
def _add(s, t, top_s, top_t, sum_s, sum_t, dot, k):
    """A step's values into the lanes' sums, which first move under the lanes' new maxima."""
    new_s, new_t = tl.maximum(top_s, max_over(s, 1)), tl.maximum(top_t, max_over(t, 1))
    shift_s, shift_t = _shift(new_s), _shift(new_t)
    sum_s, sum_t, dot = _move(top_s, top_t, sum_s, sum_t, dot, new_s, new_t, shift_s, shift_t, k)
    ds, dt = s - shift_s[:, None], t - shift_t[:, None]
    es, et = tl.exp2(ds * k), tl.exp2(dt * k)
    product = tl.where(et == 0.0, 0.0, et * (dt - ds))
    return new_s, new_t, sum_s + sum_over(es, 1), sum_t + sum_over(et, 1), dot + sum_over(product, 1)


@device_function
def _move(top_s, top_t, sum_s, sum_t, dot, new_s, new_t, shift_s, shift_t, k):
    """Sums under the maxima (top_s, top_t) as sums under (new_s, new_t)."""
    factor_s, factor_t = tl.exp2((top_s - shift_s) * k), tl.exp2((top_t - shift_t) * k)
    moved = tl.where(new_s > top_s, new_s - top_s, 0.0) - tl.where(new_t > top_t, new_t - top_t, 0.0)
    dot = tl.where(factor_t == 0.0, 0.0, factor_t * (dot + sum_t * moved))
    return sum_s * factor_s, sum_t * factor_t, dot


@device_function
def _add_close(s, t, shift_s, shift_t, from_s, from_t, rest, inverse_s, inverse_t, ratio, k, inverse, terms, gains):
    """A step's share of the two sums of a row that is summed anew."""
    u = (((s - from_s) - (t - from_t)) - rest) * inverse - ratio
    p, q = tl.exp2((t - shift_t) * k) * inverse_t, tl.exp2((s - shift_s) * k) * inverse_s
    term, gain = _close_terms(p, q, u)
    return terms + sum_over(term, 1), gains + sum_over(gain, 1)


@triton.jit(do_not_specialize=["rows"])
def kl_walk(
    student,
    teacher,
    sizes,
    rows,
    columns,
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
    """One wide row."""
    STEP: tl.constexpr = LANES * VEC
    row = tl.program_id(0).to(tl.int64)
    factor, temperature, k, inverse = _options(scale, softness, region, row, rows, True)
    start_s, start_t = row_start(student, row, sizes), row_start(teacher, row, sizes)
    head, main = walk_split(start_s, columns, VEC, STEP, UNIT)
    main_s = student.data + walk_start(start_s, head, VEC, ALIGNED[0])
    main_t = teacher.data + walk_start(start_t, head, VEC, ALIGNED[1])
    lane = walk_lanes(LANES, VEC)

    top_s, top_t = tl.full([LANES], NOTHING, tl.float32), tl.full([LANES], NOTHING, tl.float32)
    sum_s, sum_t = tl.full([LANES], 0, tl.float32), tl.full([LANES], 0, tl.float32)
    dot = tl.full([LANES], 0, tl.float32)
    for i in range(0, main, STEP):
        s, t = to_float32(tl.load(main_s + (i + lane))), to_float32(tl.load(main_t + (i + lane)))
        top_s, top_t, sum_s, sum_t, dot = _add(s, t, top_s, top_t, sum_s, sum_t, dot, k)
    for i in range(0, columns - main, STEP):
        column = walk_column(i + lane, head, main)
        inside = column < columns
        s = to_float32(tl.load(student.data + (start_s + column * student.column), mask=inside, other=NOTHING))
        t = to_float32(tl.load(teacher.data + (start_t + column * teacher.column), mask=inside, other=NOTHING))
        top_s, top_t, sum_s, sum_t, dot = _add(s, t, top_s, top_t, sum_s, sum_t, dot, k)

    new_s, new_t = max_over(top_s, 0), max_over(top_t, 0)
    shift_s, shift_t = _shift(new_s), _shift(new_t)
    sum_s, sum_t, dot = _move(top_s, top_t, sum_s, sum_t, dot, new_s, new_t, shift_s, shift_t, k)
    sum_s, sum_t, dot = sum_over(sum_s, 0), sum_over(sum_t, 0), sum_over(dot, 0)
    some, inverse_s, inverse_t, ratio, kl, again = _value(sum_s, sum_t, dot, inverse)
    if again:
        from_s, from_t, rest = _origin(shift_s, shift_t)
        terms, gains = tl.full([LANES], 0, tl.float32), tl.full([LANES], 0, tl.float32)
        for i in range(0, main, STEP):
            s, t = to_float32(tl.load(main_s + (i + lane))), to_float32(tl.load(main_t + (i + lane)))
            terms, gains = _add_close(
                s, t, shift_s, shift_t, from_s, from_t, rest, inverse_s, inverse_t, ratio, k, inverse, terms, gains
            )
        for i in range(0, columns - main, STEP):
            column = walk_column(i + lane, head, main)
            inside = column < columns
            s = to_float32(tl.load(student.data + (start_s + column * student.column), mask=inside, other=NOTHING))
            t = to_float32(tl.load(teacher.data + (start_t + column * teacher.column), mask=inside, other=NOTHING))
            terms, gains = _add_close(
                s, t, shift_s, shift_t, from_s, from_t, rest, inverse_s, inverse_t, ratio, k, inverse, terms, gains
            )
        y = sum_over(gains, 0)
        kl = sum_over(terms, 0) - 0.5 * y * y
    kl = tl.where(kl < 0.0, 0.0, kl)
    tl.store(values + row, tl.where(some, factor * temperature * temperature * kl, 0.0))
    _put_statistics(statistics, row, True, shift_s, inverse_s, shift_t, inverse_t, factor * temperature, k)


@triton.jit(do_not_specialize=["rows"])
def kl_walk_gradient(
    student,
    teacher,
    grad,
    sizes,
    rows,
    columns,
    statistics,
    grad_loss,
    PER_ROW: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One wide row."""
    STEP: tl.constexpr = LANES * VEC
    row = tl.program_id(0).to(tl.int64)
    at = statistics + row * STATISTICS
    shift_s, inverse_s = tl.load(at), tl.load(at + 1)
    shift_t, inverse_t = tl.load(at + 2), tl.load(at + 3)
    coefficient, k = tl.load(at + 4), tl.load(at + 5)
    coefficient *= tl.load(grad_loss + row * PER_ROW)
    some = (inverse_s != 0.0) | (inverse_t != 0.0)
    start_s, start_t, start_g = (
        row_start(student, row, sizes),
        row_start(teacher, row, sizes),
        row_start(grad, row, sizes),
    )
    head, main = walk_split(start_s, columns, VEC, STEP, UNIT)
    main_s = student.data + walk_start(start_s, head, VEC, ALIGNED[0])
    main_t = teacher.data + walk_start(start_t, head, VEC, ALIGNED[1])
    main_g = grad.data + walk_start(start_g, head, VEC, ALIGNED[2])
    lane = walk_lanes(LANES, VEC)
    for i in range(0, main, STEP):
        s, t = to_float32(tl.load(main_s + (i + lane))), to_float32(tl.load(main_t + (i + lane)))
        g = _gradient(s, t, shift_s, inverse_s, shift_t, inverse_t, coefficient, k)
        store_rounded(main_g + (i + lane), tl.where(some, g, 0.0), None)
    for i in range(0, columns - main, STEP):
        column = walk_column(i + lane, head, main)
        inside = column < columns
        s = to_float32(tl.load(student.data + (start_s + column * student.column), mask=inside, other=0.0))
        t = to_float32(tl.load(teacher.data + (start_t + column * teacher.column), mask=inside, other=0.0))
        g = _gradient(s, t, shift_s, inverse_s, shift_t, inverse_t, coefficient, k)
        store_rounded(grad.data + (start_g + column * grad.column), tl.where(some, g, 0.0), inside)
