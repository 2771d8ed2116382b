"""The kernels of soft_cross_entropy, whose launches and bytes are in soft_cross_entropy.py.

gradient = soft * (exp2((s - shift_s) k) * mass_s - w_c exp2((t - shift_t) k) * inverse_t)
         + hard * (exp2((s - shift_s) log2 e) * inverse_hard - [c is the label])
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .numbers import device_function, max_over, sum_over, to_float32
from .rows import (
    counted,
    put_values,
    row_scale,
    row_start,
    tile_pair,
    tile_put,
    tile_rows,
    tile_start,
    tile_starts,
    walk_begin,
    walk_column,
    walk_lanes,
    walk_pair,
    walk_put,
)

LOG2_E = tl.constexpr(1.4426950408889634074)
NOTHING = tl.constexpr(float("-inf"))
STATISTICS = tl.constexpr(8)  # shift_s, mass_s, shift_t, inverse_t, inverse_hard, soft, hard, alive


class Classes(NamedTuple):
    """The soft part: a weight per class, k = log2(e) / T and 1 / T, each rounded once."""

    weight: Tensor | None
    k: float
    inverse: float


class Labels(NamedTuple):
    """The hard part: a label per row, which one is ignored, and the part's weight mu."""

    target: Tensor | None  # None: there is no hard part
    ignored: int
    mu: float
    tensor: Tensor | None  # instead of the number
    counts: Tensor | None  # of rows that are not ignored, where they are the divisor, see rows.counted
    parts: int


@device_function
def _shift(top):
    """What is subtracted from logits. A row without finite values has no maximum; 0 keeps its exponents at -inf."""
    return tl.where(top == NOTHING, 0.0, top)


@device_function
def _label(labels, row, live):
    """(label, whether the row counts) of each row."""
    label = row
    if labels.target is not None:
        label = tl.load(labels.target + row, mask=live, other=0)
        live = live & (label != labels.ignored)
    return label, live


@device_function
def _logit(rows, start, label, counts):
    """(the student's logit of the label, whether the label is a class)."""
    valid = (label >= 0) & (label < rows.columns)
    at = rows.student.data + (start + label * rows.student.column)
    return to_float32(tl.load(at, mask=counts & valid, other=0.0)), valid


@device_function
def _finish(
    statistics, row, live, counts, valid, shift_s, shift_t, sums, mean, hard_sum, logit, scale, labels, classes
):
    """Puts the statistics, and returns the value, of each row. `mean` is E[w (s - shift_s)] over p_t."""
    sum_s, sum_t, weighted = sums
    factor, mu = row_scale(scale, row, live), row.to(tl.float32) * 0.0
    some = counts & (sum_s != 0.0) & (sum_t != 0.0)  # 0 is the sum of a side all -inf; a maximum adds 1, or NaN
    value = tl.where(weighted == 0.0, 0.0, weighted / sum_t * tl.log(sum_s)) - mean * classes.inverse
    if labels.target is not None:
        mu += labels.mu
        if labels.tensor is not None:
            mu = row.to(tl.float32) * 0.0 + tl.load(labels.tensor)
        if labels.counts is not None:
            number = counted(labels.counts, labels.parts)
            factor = tl.where(number > 0.0, factor / number, 0.0)
        # A factor of 0 silences an infinite part, but never NaN.
        value = tl.where(mu == 1.0, tl.where(value == value, 0.0, value), (1.0 - mu) * value)
        value += tl.where(mu == 0.0, 0.0, mu * (tl.log(hard_sum) - (logit - shift_s)))
    at = statistics + row * STATISTICS
    tl.store(at, tl.where(some, shift_s, 0.0), mask=live)
    tl.store(at + 1, tl.where(some, weighted / sum_t / sum_s, 0.0), mask=live)
    tl.store(at + 2, tl.where(some, shift_t, 0.0), mask=live)
    tl.store(at + 3, tl.where(some, 1.0 / sum_t, 0.0), mask=live)
    tl.store(at + 4, tl.where(some, 1.0 / hard_sum, 0.0), mask=live)
    tl.store(
        at + 5, tl.where(some, tl.where(valid, factor * (1.0 - mu) * classes.inverse, float("nan")), 0.0), mask=live
    )
    tl.store(at + 6, tl.where(some, factor * mu, 0.0), mask=live)
    tl.store(at + 7, tl.where(some, 1.0, 0.0), mask=live)
    return tl.where(some, tl.where(valid, factor * value, float("nan")), 0.0)


@device_function
def _statistics(statistics, grad_loss, target, row, columns, live, PER_ROW: tl.constexpr):
    """What the gradient needs of each row, its label (-1: none of the classes) and the upstream gradient included."""
    at, label = statistics + row * STATISTICS, row
    upstream = tl.load(grad_loss + row * PER_ROW, mask=live)
    if target is not None:
        label = tl.load(target + row, mask=live, other=0)
        label = tl.where((label >= 0) & (label < columns), label, -1).to(tl.int32)
    soft, hard = upstream * tl.load(at + 5, mask=live, other=0.0), upstream * tl.load(at + 6, mask=live, other=0.0)
    shift_s, mass = tl.load(at, mask=live, other=0.0), tl.load(at + 1, mask=live, other=0.0)
    shift_t, inverse_t = tl.load(at + 2, mask=live, other=0.0), tl.load(at + 3, mask=live, other=0.0)
    alive = tl.load(at + 7, mask=live, other=0.0) != 0.0
    return shift_s, mass, shift_t, inverse_t, tl.load(at + 4, mask=live, other=0.0), soft, hard, alive, label


@device_function
def _gradient(s, t, weight, column, known, k, HARD: tl.constexpr):
    shift_s, mass, shift_t, inverse_t, inverse_hard, soft, hard, alive, label = known
    ds = s - shift_s
    g = soft * (tl.exp2(ds * k) * mass - weight * (tl.exp2((t - shift_t) * k) * inverse_t))
    if HARD:
        g += hard * (tl.exp2(ds * LOG2_E) * inverse_hard) - tl.where(column == label, hard, 0.0)
    return tl.where(alive, g, 0.0)


# Tiles: several rows in a program.


@device_function
def _tile_weight(weight, column, columns):
    """A strip's class weights, for every row."""
    found = tl.full([1, 1], 1, tl.float32)
    if weight is not None:
        found = tl.load(weight + column, mask=column < columns, other=0.0)[None, :]
    return found


@triton.jit(do_not_specialize=["count"])
def soft_tile(
    rows,
    count,
    statistics,
    values,
    scale,
    classes,
    labels,
    KEEP: tl.constexpr,
    SEPARATE: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STRIPS: tl.constexpr,
    COMMON: tl.constexpr,
):
    """Loads are written where they are used; the compiler keeps what they bring."""
    row, live = tile_rows(count, ROWS)
    label, counts = _label(labels, row, live)
    starts = tile_starts(rows, row, COMMON)
    k = classes.k

    top_s, top_t = tl.full([ROWS, CHUNK], NOTHING, tl.float32), tl.full([ROWS, CHUNK], NOTHING, tl.float32)
    for j in tl.static_range(STRIPS):
        s, t = tile_pair(rows, starts, j * CHUNK + tl.arange(0, CHUNK), counts, NOTHING, COMMON)
        top_s, top_t = tl.maximum(top_s, s), tl.maximum(top_t, t)
    shift_s, shift_t = _shift(max_over(top_s, 1)), _shift(max_over(top_t, 1))

    zero = tl.full([ROWS, CHUNK], 0, tl.float32)
    sum_s, sum_t, weighted, dot, hard_sum = zero, zero, zero, zero, zero
    for j in tl.static_range(STRIPS):
        column = j * CHUNK + tl.arange(0, CHUNK)
        s, t = tile_pair(rows, starts, column, counts, NOTHING, COMMON)
        ds = s - shift_s[:, None]
        et = tl.exp2((t - shift_t[:, None]) * k)
        wet = et * _tile_weight(classes.weight, column, rows.columns)
        sum_s += tl.exp2(ds * k)
        sum_t += et
        weighted += wet
        dot += tl.where(wet == 0.0, 0.0, wet * ds)
        if SEPARATE:
            hard_sum += tl.exp2(ds * LOG2_E)
    sums = (sum_over(sum_s, 1), sum_over(sum_t, 1), sum_over(weighted, 1))
    hard_sum = sum_over(hard_sum, 1) if SEPARATE else sums[0]
    mean = sum_over(dot, 1) / sums[1]
    again = counts & (tl.abs(mean) == -NOTHING)
    if sum_over(again.to(tl.int32), 0) > 0:  # the sum overflowed, perhaps; its terms over sum_t do not
        dot = zero
        for j in tl.static_range(STRIPS):
            column = j * CHUNK + tl.arange(0, CHUNK)
            s, t = tile_pair(rows, starts, column, counts, NOTHING, COMMON)
            p = tl.exp2((t - shift_t[:, None]) * k) / sums[1][:, None]
            wp = p * _tile_weight(classes.weight, column, rows.columns)
            dot += tl.where(wp == 0.0, 0.0, wp * (s - shift_s[:, None]))
        mean = tl.where(again, sum_over(dot, 1), mean)

    valid, logit = live, shift_s
    if labels.target is not None:
        logit, valid = _logit(rows, starts[0], label, counts)
    value = _finish(
        statistics, row, live, counts, valid, shift_s, shift_t, sums, mean, hard_sum, logit, scale, labels, classes
    )
    put_values(values, value, row, live, KEEP)


@triton.jit(do_not_specialize=["count"])
def soft_tile_gradient(
    rows,
    count,
    statistics,
    grad_loss,
    classes,
    target,
    PER_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STRIPS: tl.constexpr,
    COMMON: tl.constexpr,
):
    row, live = tile_rows(count, ROWS)
    starts, start = tile_starts(rows, row, COMMON), tile_start(rows.other, row, rows.sizes, COMMON)
    known = _statistics(statistics, grad_loss, target, row[:, None], rows.columns, live[:, None], PER_ROW)
    alive = tl.load(statistics + row * STATISTICS + 7, mask=live, other=0.0) != 0.0
    for j in tl.static_range(STRIPS):
        column = j * CHUNK + tl.arange(0, CHUNK)
        s, t = tile_pair(rows, starts, column, alive, NOTHING, COMMON)
        weight = _tile_weight(classes.weight, column, rows.columns)
        g = _gradient(s, t, weight, column[None, :], known, classes.k, target is not None)
        tile_put(rows, start, column, live, g, COMMON)


# Walks: one wide row in a program.


@device_function
def _move(sums, new_s, new_t, k):
    """The lanes' sums under other maxima."""
    top_s, top_t, sum_s, sum_t, weighted, dot, hard_sum = sums
    factor_s, factor_t = tl.exp2((top_s - _shift(new_s)) * k), tl.exp2((top_t - _shift(new_t)) * k)
    moved = tl.where(new_s > top_s, new_s - top_s, 0.0)
    dot = tl.where(weighted == 0.0, dot, dot - weighted * moved)
    dot = tl.where(factor_t == 0.0, 0.0, factor_t * dot)
    return sum_s * factor_s, sum_t * factor_t, weighted * factor_t, dot, hard_sum * tl.exp2(-moved * LOG2_E)


@device_function
def _add(s, t, weight, sums, k, SEPARATE: tl.constexpr):
    """A step's values into the lanes' sums, which first move under the lanes' new maxima."""
    new_s, new_t = tl.maximum(sums[0], max_over(s, 1)), tl.maximum(sums[1], max_over(t, 1))
    sum_s, sum_t, weighted, dot, hard_sum = _move(sums, new_s, new_t, k)
    ds = s - _shift(new_s)[:, None]
    et = tl.exp2((t - _shift(new_t)[:, None]) * k)
    wet = et * weight
    dot += sum_over(tl.where(wet == 0.0, 0.0, wet * ds), 1)
    if SEPARATE:
        hard_sum += sum_over(tl.exp2(ds * LOG2_E), 1)
    sum_s += sum_over(tl.exp2(ds * k), 1)
    return new_s, new_t, sum_s, sum_t + sum_over(et, 1), weighted + sum_over(wet, 1), dot, hard_sum


@device_function
def _add_mean(s, t, weight, mean, shift_s, shift_t, sum_t, k):
    wp = tl.exp2((t - shift_t) * k) / sum_t * weight
    return mean + sum_over(tl.where(wp == 0.0, 0.0, wp * (s - shift_s)), 1)


@device_function
def _walk_weight(weight, begin, index, columns, MAIN: tl.constexpr):
    """A step's class weights."""
    found = tl.full([1, 1], 1, tl.float32)
    if weight is not None:
        column = walk_column(begin, index, MAIN)
        if MAIN:
            found = tl.load(weight + column)
        else:
            found = tl.load(weight + column, mask=column < columns, other=0.0)
    return found


@triton.jit(do_not_specialize=["count"])
def soft_walk(
    rows,
    count,
    statistics,
    values,
    scale,
    classes,
    labels,
    KEEP: tl.constexpr,
    SEPARATE: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A lane cannot know that a later maximum leaves its classes no probability: where the sum of w p (s - shift_s) is
    infinite, the row is read again under its final maxima.
    """
    row = tl.program_id(0).to(tl.int64)
    label, counts = _label(labels, row, row < count)
    width = tl.where(counts, rows.columns, 0)  # of an ignored row nothing is read
    begin, lane = walk_begin(rows, row, width, LANES, VEC, UNIT), walk_lanes(LANES, VEC)
    main = tl.maximum(begin[3], 0)
    k = classes.k

    least, zero = tl.full([LANES], NOTHING, tl.float32), tl.full([LANES], 0, tl.float32)
    sums = (least, least, zero, zero, zero, zero, zero)
    for i in range(0, main, LANES * VEC):
        s, t = walk_pair(rows, begin, i + lane, NOTHING, VEC, ALIGNED, True)
        sums = _add(s, t, _walk_weight(classes.weight, begin, i + lane, rows.columns, True), sums, k, SEPARATE)
    for i in range(0, width - main, LANES * VEC):
        s, t = walk_pair(rows, begin, i + lane, NOTHING, VEC, ALIGNED, False)
        sums = _add(s, t, _walk_weight(classes.weight, begin, i + lane, rows.columns, False), sums, k, SEPARATE)
    top_s, top_t = max_over(sums[0], 0), max_over(sums[1], 0)
    sum_s, sum_t, weighted, dot, hard_sum = _move(sums, top_s, top_t, k)
    shift_s, shift_t = _shift(top_s), _shift(top_t)
    totals = (sum_over(sum_s, 0), sum_over(sum_t, 0), sum_over(weighted, 0))
    hard_total = sum_over(hard_sum, 0) if SEPARATE else totals[0]
    mean = sum_over(dot, 0) / totals[1]
    if counts & (tl.abs(mean) == -NOTHING):
        parts = zero
        for i in range(0, main, LANES * VEC):
            s, t = walk_pair(rows, begin, i + lane, NOTHING, VEC, ALIGNED, True)
            weight = _walk_weight(classes.weight, begin, i + lane, rows.columns, True)
            parts = _add_mean(s, t, weight, parts, shift_s, shift_t, totals[1], k)
        for i in range(0, width - main, LANES * VEC):
            s, t = walk_pair(rows, begin, i + lane, NOTHING, VEC, ALIGNED, False)
            weight = _walk_weight(classes.weight, begin, i + lane, rows.columns, False)
            parts = _add_mean(s, t, weight, parts, shift_s, shift_t, totals[1], k)
        mean = sum_over(parts, 0)

    valid, logit = counts, shift_s
    if labels.target is not None:
        logit, valid = _logit(rows, begin[0], label, counts)
    value = _finish(
        statistics, row, True, counts, valid, shift_s, shift_t, totals, mean, hard_total, logit, scale, labels, classes
    )
    tl.store(values + row, value)


@triton.jit(do_not_specialize=["count"])
def soft_walk_gradient(
    rows,
    count,
    statistics,
    grad_loss,
    classes,
    target,
    PER_ROW: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    known = _statistics(statistics, grad_loss, target, row, rows.columns, True, PER_ROW)
    begin, lane = walk_begin(rows, row, rows.columns, LANES, VEC, UNIT), walk_lanes(LANES, VEC)
    start = row_start(rows.other, row, rows.sizes)
    for i in range(0, begin[3], LANES * VEC):
        s, t = walk_pair(rows, begin, i + lane, NOTHING, VEC, ALIGNED, True)
        weight = _walk_weight(classes.weight, begin, i + lane, rows.columns, True)
        g = _gradient(s, t, weight, walk_column(begin, i + lane, True), known, classes.k, target is not None)
        walk_put(rows, start, begin, i + lane, g, VEC, ALIGNED, True)
    for i in range(0, rows.columns - begin[3], LANES * VEC):
        s, t = walk_pair(rows, begin, i + lane, NOTHING, VEC, ALIGNED, False)
        weight = _walk_weight(classes.weight, begin, i + lane, rows.columns, False)
        g = _gradient(s, t, weight, walk_column(begin, i + lane, False), known, classes.k, target is not None)
        walk_put(rows, start, begin, i + lane, g, VEC, ALIGNED, False)
