"""Binary KL in Triton, as csrc/math/binary_kl.h has it: elementwise in the logits, summed over classes.

With b, c the bytes of a student's and a teacher's logit: the forward moves b + c per logit and 4 to 8 bytes per row, in
one launch, and a second that adds the programs' sums where there are several. The backward moves 2 b + c.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .numbers import device_function, store_rounded, sum_over, to_float32
from .rows import (
    Result,
    exp_remainder,
    on,
    put_values,
    row_scale,
    row_start,
    rows_of,
    scale_of,
    strip_at,
    strip_mask,
    tile_start,
    walk_column,
    walk_lanes,
    walk_split,
    walk_start,
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
    kernel, programs, options = rows.launch(_tile, _walk)
    result = Result(student, rows.count, reduction, 1, programs)
    with on(student):
        if programs:
            kernel[(programs,)](
                *rows.operands,
                rows.sizes,
                rows.count,
                rows.columns,
                result.statistics,
                result.values,
                scale_of(reduction, rows.count, rows.columns, avg_factor, avg_factor_tensor, weight),
                float(temperature),
                1 / temperature,
                KEEP=result.keep,
                enable_fp_fusion=True,
                **options,
            )
        return result.finish()


def binary_kl_backward(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, temperature: float, coefficients: Tensor, per_row: bool
) -> Tensor:
    """The student's gradient."""
    grad = torch.empty_like(student)
    rows = rows_of(student, teacher, grad)
    kernel, programs, options = rows.launch(_tile_gradient, _walk_gradient)
    if programs:
        with on(student):
            kernel[(programs,)](
                *rows.operands,
                rows.sizes,
                rows.count,
                rows.columns,
                coefficients,
                grad_loss,
                1 / temperature,
                PER_ROW=per_row,
                enable_fp_fusion=True,
                **options,
            )
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


@triton.jit(do_not_specialize=["rows"])
def _tile(
    student,
    teacher,
    sizes,
    rows,
    columns,
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
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    start_s, start_t = tile_start(student, row, sizes, COMMON), tile_start(teacher, row, sizes, COMMON)
    total = tl.full([ROWS, CHUNK], 0, tl.float32)
    for j in tl.static_range(STRIPS):
        column = j * CHUNK + tl.arange(0, CHUNK)
        inside = strip_mask(live, column, columns, COMMON)
        s = to_float32(tl.load(strip_at(student, start_s, column), mask=inside, other=0.0))
        t = to_float32(tl.load(strip_at(teacher, start_t, column), mask=inside, other=0.0))
        total += _divergence(s, t, inverse)
    coefficient = row_scale(scale, row, live) * temperature
    tl.store(coefficients + row, coefficient, mask=live)
    put_values(values, coefficient * temperature * sum_over(total, 1), row, live, KEEP)


@triton.jit(do_not_specialize=["rows"])
def _tile_gradient(
    student,
    teacher,
    grad,
    sizes,
    rows,
    columns,
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
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    start_s, start_t = tile_start(student, row, sizes, COMMON), tile_start(teacher, row, sizes, COMMON)
    start_g = tile_start(grad, row, sizes, COMMON)
    coefficient = tl.load((coefficients + row)[:, None], mask=live[:, None], other=0.0)
    coefficient *= tl.load((grad_loss + row * PER_ROW)[:, None], mask=live[:, None], other=0.0)
    for j in tl.static_range(STRIPS):
        column = j * CHUNK + tl.arange(0, CHUNK)
        inside = strip_mask(live, column, columns, COMMON)
        s = to_float32(tl.load(strip_at(student, start_s, column), mask=inside, other=0.0))
        t = to_float32(tl.load(strip_at(teacher, start_t, column), mask=inside, other=0.0))
        store_rounded(strip_at(grad, start_g, column), coefficient * _slope(s, t, inverse), inside)


@triton.jit(do_not_specialize=["rows"])
def _walk(
    student,
    teacher,
    sizes,
    rows,
    columns,
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
    STEP: tl.constexpr = LANES * VEC
    row = tl.program_id(0).to(tl.int64)
    start_s, start_t = row_start(student, row, sizes), row_start(teacher, row, sizes)
    head, main = walk_split(start_s, columns, VEC, STEP, UNIT)
    main_s = student.data + walk_start(start_s, head, VEC, ALIGNED[0])
    main_t = teacher.data + walk_start(start_t, head, VEC, ALIGNED[1])
    lane = walk_lanes(LANES, VEC)
    total = tl.full([LANES], 0, tl.float32)
    for i in range(0, main, STEP):
        s, t = to_float32(tl.load(main_s + (i + lane))), to_float32(tl.load(main_t + (i + lane)))
        total += sum_over(_divergence(s, t, inverse), 1)
    for i in range(0, columns - main, STEP):
        column = walk_column(i + lane, head, main)
        inside = column < columns
        s = to_float32(tl.load(student.data + (start_s + column * student.column), mask=inside, other=0.0))
        t = to_float32(tl.load(teacher.data + (start_t + column * teacher.column), mask=inside, other=0.0))
        total += sum_over(_divergence(s, t, inverse), 1)
    coefficient = row_scale(scale, row, True) * temperature
    tl.store(coefficients + row, coefficient)
    tl.store(values + row, coefficient * temperature * sum_over(total, 0))


@triton.jit(do_not_specialize=["rows"])
def _walk_gradient(
    student,
    teacher,
    grad,
    sizes,
    rows,
    columns,
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
    STEP: tl.constexpr = LANES * VEC
    row = tl.program_id(0).to(tl.int64)
    coefficient = tl.load(coefficients + row) * tl.load(grad_loss + row * PER_ROW)
    start_s, start_t = row_start(student, row, sizes), row_start(teacher, row, sizes)
    start_g = row_start(grad, row, sizes)
    head, main = walk_split(start_s, columns, VEC, STEP, UNIT)
    main_s = student.data + walk_start(start_s, head, VEC, ALIGNED[0])
    main_t = teacher.data + walk_start(start_t, head, VEC, ALIGNED[1])
    main_g = grad.data + walk_start(start_g, head, VEC, ALIGNED[2])
    lane = walk_lanes(LANES, VEC)
    for i in range(0, main, STEP):
        s, t = to_float32(tl.load(main_s + (i + lane))), to_float32(tl.load(main_t + (i + lane)))
        store_rounded(main_g + (i + lane), coefficient * _slope(s, t, inverse), None)
    for i in range(0, columns - main, STEP):
        column = walk_column(i + lane, head, main)
        inside = column < columns
        s = to_float32(tl.load(student.data + (start_s + column * student.column), mask=inside, other=0.0))
        t = to_float32(tl.load(teacher.data + (start_t + column * teacher.column), mask=inside, other=0.0))
        g = coefficient * _slope(s, t, inverse)
        store_rounded(grad.data + (start_g + column * grad.column), g, inside)
