"""Binary KL in Triton, as csrc/math/binary_kl.h has it: elementwise in the logits, summed over classes.

With b, c the bytes of a student's and a teacher's logit: the forward moves b + c per logit and 4 to 8 bytes per row, in
one launch, and a second that adds the programs' sums where there are several. The backward moves 2 b + c.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .numbers import device_function, sum_over
from .rows import (
    Result,
    exp_remainder,
    launch,
    on,
    put_values,
    row_scale,
    row_start,
    rows_of,
    scale_of,
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

MINUS_LOG2_E = tl.constexpr(-1.4426950408889634074)


def binary_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    weight: Tensor | None,
    reduction: int,
    avg_factor: float | None,
    avg_factor_tensor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The loss, and each row's coefficient of the gradient."""
    rows = rows_of(student, teacher)
    count = student.numel() // rows.columns
    kernel, programs, constants = launch(rows, count, binary_kl_tile, binary_kl_walk)
    result = Result(student, count, reduction, 1, programs)
    scale = scale_of(reduction, count, rows.columns, avg_factor, avg_factor_tensor, weight)
    with on(student):
        if programs:
            kernel[(programs,)](
                rows,
                count,
                result.statistics,
                result.values,
                scale,
                float(temperature),
                1 / temperature,
                KEEP=result.keep,
                **constants,
            )
        return result.finish()


def binary_kl_backward(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, temperature: float, coefficients: Tensor, per_row: bool
) -> Tensor:
    """The student's gradient."""
    grad = torch.empty_like(student)
    rows = rows_of(student, teacher, grad)
    count = student.numel() // rows.columns
    kernel, programs, constants = launch(rows, count, binary_kl_tile_gradient, binary_kl_walk_gradient)
    if programs:
        with on(student):
            kernel[(programs,)](rows, count, coefficients, grad_loss, 1 / temperature, PER_ROW=per_row, **constants)
    return grad


@device_function
def _log_ratio(a, b):
    """log((1 + a) / (1 + b)) for a, b in [0, 1], by the series of 2 artanh(z), |z| <= 1/3."""
    z = (a - b) / (a + b + 2.0)
    z2 = z * z
    p = z2 * (1.0 / 15) + 1.0 / 13
    p = p * z2 + 1.0 / 11
    p = p * z2 + 1.0 / 9
    p = p * z2 + 1.0 / 7
    p = p * z2 + 1.0 / 5
    p = p * z2 + 1.0 / 3
    p = p * z2 + 1.0
    return 2.0 * z * p


@device_function
def _close(p, q, d):
    """KL where d = x_s - x_t is at most 1/2 in magnitude. With r the smaller of p and q (and d's sign turned with it),

    KL = r (exp(d) - 1 - d) + (log(1 + y) - y),  y = r (exp(d) - 1),

    whose second term is at most half the first: nothing cancels.
    """
    r, d = tl.where(p < q, p, q), tl.where(p < q, d, -d)
    remainder = r * exp_remainder(d)
    y = r * d + remainder
    # log(1 + y) - y with z = y / (2 + y): 2 artanh(z) - y = -y z + 2 z^3 (1/3 + z^2 / 5 + ...)
    z = y / (y + 2.0)
    z2 = z * z
    series = z2 * (1.0 / 11) + 1.0 / 9
    series = series * z2 + 1.0 / 7
    series = series * z2 + 1.0 / 5
    series = series * z2 + 1.0 / 3
    kl = remainder + (2.0 * z2 * z * series - y * z)
    return tl.where(kl < 0.0, 0.0, kl)


@device_function
def _divergence(s, t, inverse):
    """KL(Bernoulli(sigmoid(t / T)) || Bernoulli(sigmoid(s / T))). Neither side of a sigmoid loses its digits when it
    saturates: all comes from exp(-|x|).
    """
    xs, xt = s * inverse, t * inverse
    es, et = tl.exp2(tl.abs(xs) * MINUS_LOG2_E), tl.exp2(tl.abs(xt) * MINUS_LOG2_E)
    larger = 1.0 / (1.0 + et)
    smaller = et * larger
    p, q = tl.where(xt > 0.0, larger, smaller), tl.where(xt > 0.0, smaller, larger)
    ratio = _log_ratio(et, es)
    inside = p * ((tl.where(xt < 0.0, xt, 0.0) - tl.where(xs < 0.0, xs, 0.0)) - ratio)
    outside = q * ((tl.where(xs > 0.0, xs, 0.0) - tl.where(xt > 0.0, xt, 0.0)) - ratio)
    kl = tl.where(p == 0.0, 0.0, inside) + tl.where(q == 0.0, 0.0, outside)
    kl = tl.where(kl < 0.0, 0.0, kl)
    d = (s - t) * inverse
    kl = tl.where(tl.abs(d) <= 0.5, _close(p, q, d), kl)
    # Equal infinities have no difference, but they are equal.
    return tl.where((xs == xt) & (d != d), 0.0, kl)


@device_function
def _slope(s, t, inverse):
    """sigmoid(s / T) - sigmoid(t / T); where both are near 1, from their distances to 1."""
    xs, xt = s * inverse, t * inverse
    es, et = tl.exp2(tl.abs(xs) * MINUS_LOG2_E), tl.exp2(tl.abs(xt) * MINUS_LOG2_E)
    larger_s, larger_t = 1.0 / (1.0 + es), 1.0 / (1.0 + et)
    smaller_s, smaller_t = es * larger_s, et * larger_t
    plain = tl.where(xs > 0.0, larger_s, smaller_s) - tl.where(xt > 0.0, larger_t, smaller_t)
    return tl.where((xs > 0.0) & (xt > 0.0), smaller_t - smaller_s, plain)


@triton.jit(do_not_specialize=["count"])
def binary_kl_tile(
    rows,
    count,
    coefficients,
    values,
    scale,
    temperature,
    inverse,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STRIPS: tl.constexpr,
    COMMON: tl.constexpr,
):
    """Several rows."""
    row, live = tile_rows(count, ROWS)
    starts = tile_starts(rows, row, COMMON)
    total = tl.full([ROWS, CHUNK], 0, tl.float32)
    for j in tl.static_range(STRIPS):
        s, t = tile_pair(rows, starts, j * CHUNK + tl.arange(0, CHUNK), live, 0.0, COMMON)
        total += _divergence(s, t, inverse)
    coefficient = row_scale(scale, row, live) * temperature
    tl.store(coefficients + row, coefficient, mask=live)
    put_values(values, coefficient * temperature * sum_over(total, 1), row, live, KEEP)


@triton.jit(do_not_specialize=["count"])
def binary_kl_tile_gradient(
    rows,
    count,
    coefficients,
    grad_loss,
    inverse,
    PER_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STRIPS: tl.constexpr,
    COMMON: tl.constexpr,
):
    """Several rows."""
    row, live = tile_rows(count, ROWS)
    starts, start = tile_starts(rows, row, COMMON), tile_start(rows.other, row, rows.sizes, COMMON)
    coefficient = tl.load((coefficients + row)[:, None], mask=live[:, None], other=0.0)
    coefficient *= tl.load((grad_loss + row * PER_ROW)[:, None], mask=live[:, None], other=0.0)
    for j in tl.static_range(STRIPS):
        column = j * CHUNK + tl.arange(0, CHUNK)
        s, t = tile_pair(rows, starts, column, live, 0.0, COMMON)
        tile_put(rows, start, column, live, coefficient * _slope(s, t, inverse), COMMON)


@triton.jit(do_not_specialize=["count"])
def binary_kl_walk(
    rows,
    count,
    coefficients,
    values,
    scale,
    temperature,
    inverse,
    KEEP: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One wide row."""
    row = tl.program_id(0).to(tl.int64)
    begin, lane = walk_begin(rows, row, rows.columns, LANES, VEC, UNIT), walk_lanes(LANES, VEC)
    total = tl.full([LANES], 0, tl.float32)
    for i in range(0, begin[3], LANES * VEC):
        s, t = walk_pair(rows, begin, i + lane, 0.0, VEC, ALIGNED, True)
        total += sum_over(_divergence(s, t, inverse), 1)
    for i in range(0, rows.columns - begin[3], LANES * VEC):
        s, t = walk_pair(rows, begin, i + lane, 0.0, VEC, ALIGNED, False)
        total += sum_over(_divergence(s, t, inverse), 1)
    coefficient = row_scale(scale, row, True) * temperature
    tl.store(coefficients + row, coefficient)
    tl.store(values + row, coefficient * temperature * sum_over(total, 0))


@triton.jit(do_not_specialize=["count"])
def binary_kl_walk_gradient(
    rows,
    count,
    coefficients,
    grad_loss,
    inverse,
    PER_ROW: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    UNIT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """One wide row."""
    row = tl.program_id(0).to(tl.int64)
    coefficient = tl.load(coefficients + row) * tl.load(grad_loss + row * PER_ROW)
    begin, lane = walk_begin(rows, row, rows.columns, LANES, VEC, UNIT), walk_lanes(LANES, VEC)
    start = row_start(rows.other, row, rows.sizes)
    for i in range(0, begin[3], LANES * VEC):
        s, t = walk_pair(rows, begin, i + lane, 0.0, VEC, ALIGNED, True)
        walk_put(rows, start, begin, i + lane, coefficient * _slope(s, t, inverse), VEC, ALIGNED, True)
    for i in range(0, rows.columns - begin[3], LANES * VEC):
        s, t = walk_pair(rows, begin, i + lane, 0.0, VEC, ALIGNED, False)
        walk_put(rows, start, begin, i + lane, coefficient * _slope(s, t, inverse), VEC, ALIGNED, False)
