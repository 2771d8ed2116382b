"""Teacher-bounded regression in Triton, as csrc/cpu/bounded_regression.cpp has it: rows of four coordinates.

With b the bytes of a coordinate: the forward reads 12 b per row (the batch gate 24 b) and writes the row's derivative,
16 bytes, which the backward multiplies by the upstream gradient: 16 bytes read and 4 b written.

Forward: one launch; before it, for the batch gate, one that adds the squared errors of both sides; after it, where
there are several programs, one that adds their sums. Backward: one launch. A float64 target is first copied to float32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .numbers import device_function, sum_over, to_float32
from .rows import (
    Result,
    launch,
    on,
    put_values,
    row_scale,
    rows_of,
    scale_of,
    tile_at,
    tile_mask,
    tile_pair,
    tile_put,
    tile_rows,
    tile_start,
    tile_starts,
)

COORDINATES = tl.constexpr(4)
ROW, ELEMENT, BATCH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # csrc/math/bounded_regression.h: Gate
PARTS = tl.constexpr(64)


class Terms(NamedTuple):
    """The two terms' weights, each a number or a tensor instead of it; smooth L1's beta; the gate's margin."""

    bound: float
    bound_tensor: Tensor | None
    smooth: float
    smooth_tensor: Tensor | None
    beta: float
    margin: float


def bounded_regression(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    margin: float,
    bound_weight: float,
    bound_weight_tensor: Tensor | None,
    smooth_l1_weight: float,
    smooth_l1_weight_tensor: Tensor | None,
    beta: float,
    gate: int,
    weight: Tensor | None,
    reduction: int,
    avg_factor: float | None,
    avg_factor_tensor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The loss, and (rows, 4) d loss / d student but for the upstream gradient."""
    if target.dtype == torch.float64:
        target = target.float()
    rows = rows_of(student, teacher, target)
    count = student.numel() // rows.columns
    kernel, programs, constants = launch(rows, count, bounded_tile, None)
    result = Result(student, count, reduction, COORDINATES.value, programs)
    scale = scale_of(reduction, count, 1, avg_factor, avg_factor_tensor, weight)
    bound, smooth = float(bound_weight), float(smooth_l1_weight)
    terms = Terms(bound, bound_weight_tensor, smooth, smooth_l1_weight_tensor, float(beta), float(margin))
    with on(student):
        if programs:
            squares, parts = None, 0
            if gate == BATCH.value:
                parts = min(PARTS.value, programs)
                squares = torch.empty((2, parts), dtype=torch.float32, device=student.device)
                span = triton.cdiv(programs, parts)
                bounded_squares[(parts,)](rows, count, squares, span, 1 / (4 * count), **constants)
            kernel[(programs,)](
                rows,
                count,
                result.statistics,
                result.values,
                scale,
                terms,
                squares,
                parts,
                GATE=gate,
                KEEP=result.keep,
                **constants,
            )
        return result.finish()


def bounded_regression_backward(grad_loss: Tensor, student: Tensor, derivative: Tensor, per_row: bool) -> Tensor:
    """The student's gradient."""
    grad = torch.empty_like(student)
    rows = rows_of(grad, grad, grad)
    count = student.numel() // rows.columns
    kernel, programs, constants = launch(rows, count, bounded_tile_gradient, None)
    if programs:
        with on(student):
            kernel[(programs,)](rows, count, derivative, grad_loss, PER_ROW=per_row, **constants)
    return grad


@device_function
def _differences(rows, row, live, CHUNK: tl.constexpr, COMMON: tl.constexpr):
    """Student and teacher less the target, (rows, 4); 0 beyond the rows."""
    column = tl.arange(0, CHUNK)
    s, t = tile_pair(rows, tile_starts(rows, row, COMMON), column, live, 0.0, COMMON)
    at = tile_at(rows.other, tile_start(rows.other, row, rows.sizes, COMMON), column)
    y = to_float32(tl.load(at, mask=tile_mask(live, column, rows.columns, COMMON), other=0.0))
    return s - y, t - y


@triton.jit(do_not_specialize=["count", "span"])
def bounded_squares(
    rows,
    count,
    squares,
    span,
    share,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STRIPS: tl.constexpr,
    COMMON: tl.constexpr,
):
    """squares[side, program] = the mean squared error's part that comes from `span` tiles."""
    program = tl.program_id(0).to(tl.int64)
    student, teacher = tl.full([ROWS, CHUNK], 0, tl.float32), tl.full([ROWS, CHUNK], 0, tl.float32)
    for i in range(0, span):
        row = (program * span + i) * ROWS + tl.arange(0, ROWS)
        s, t = _differences(rows, row, row < count, CHUNK, COMMON)
        student += s * s * share
        teacher += t * t * share
    tl.store(squares + program, sum_over(sum_over(student, 1), 0))
    tl.store(squares + tl.num_programs(0) + program, sum_over(sum_over(teacher, 1), 0))


@triton.jit(do_not_specialize=["count", "parts"])
def bounded_tile(
    rows,
    count,
    derivative,
    values,
    scale,
    terms,
    squares,
    parts,
    GATE: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STRIPS: tl.constexpr,
    COMMON: tl.constexpr,
):
    row, live = tile_rows(count, ROWS)
    d, other = _differences(rows, row, live, CHUNK, COMMON)
    # The gate is open while the student is not better than the teacher by the margin: strict, so equality closes it.
    if GATE == BATCH:
        lane = tl.arange(0, PARTS)
        student = sum_over(tl.load(squares + lane, mask=lane < parts, other=0.0), 0)
        teacher = sum_over(tl.load(squares + parts + lane, mask=lane < parts, other=0.0), 0)
        is_open = student + terms.margin > teacher
    elif GATE == ROW:
        is_open = (sum_over(d * d, 1) + terms.margin > sum_over(other * other, 1))[:, None]
    else:
        is_open = d * d + terms.margin > other * other
    bound, smooth = terms.bound, terms.smooth
    if terms.bound_tensor is not None:
        bound = tl.load(terms.bound_tensor)
    if terms.smooth_tensor is not None:
        smooth = tl.load(terms.smooth_tensor)

    size = tl.abs(d)
    near = size < terms.beta
    smooth_l1 = tl.where(near, 0.5 * size * size / terms.beta, size - 0.5 * terms.beta)
    sign = tl.where(d > 0.0, 1.0, tl.where(d < 0.0, -1.0, d))
    slope = tl.where(near, d / terms.beta, sign)
    # A closed gate gives 0 whatever the square is, infinity included.
    value = sum_over(smooth * smooth_l1 + bound * tl.where(is_open, d * d, 0.0), 1)
    factor = row_scale(scale, row, live)
    column = tl.arange(0, CHUNK)
    at = derivative + row[:, None] * COORDINATES + column[None, :]
    g = factor[:, None] * (smooth * slope + bound * tl.where(is_open, 2.0 * d, 0.0))
    tl.store(at, g, mask=tile_mask(live, column, rows.columns, COORDINATES))
    put_values(values, factor * value, row, live, KEEP)


@triton.jit(do_not_specialize=["count"])
def bounded_tile_gradient(
    rows,
    count,
    derivative,
    grad_loss,
    PER_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STRIPS: tl.constexpr,
    COMMON: tl.constexpr,
):
    row, live = tile_rows(count, ROWS)
    column = tl.arange(0, CHUNK)
    upstream = tl.load((grad_loss + row * PER_ROW)[:, None], mask=live[:, None], other=0.0)
    at = derivative + row[:, None] * COORDINATES + column[None, :]
    g = upstream * tl.load(at, mask=tile_mask(live, column, rows.columns, COORDINATES), other=0.0)
    tile_put(rows, tile_start(rows.other, row, rows.sizes, COMMON), column, live, g, COMMON)
