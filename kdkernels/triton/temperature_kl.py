"""Temperature KL in Triton: the launches of kl_rows.py, which decoupled_kl shares. Bytes moved: kl_rows.py.

Forward: one launch, and a second that adds the programs' sums where there are several. Backward: one launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .kl_rows import STATISTICS, Region, Softness, kl_tile, kl_tile_gradient, kl_walk, kl_walk_gradient
from .rows import Result, Scale, launch, on, rows_of, scale_of

LOG2_E = 1.4426950408889634074


def temperature_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    weight: Tensor | None,
    reduction: int,
    avg_factor: float | None,
    avg_factor_tensor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The loss, and (rows, 6) statistics for the backward."""
    columns = student.shape[-1]
    scale = scale_of(reduction, student.numel() // columns, columns, avg_factor, avg_factor_tensor, weight)
    softness = softness_of(temperature)
    return forward(student, teacher, reduction, scale, softness, Region(None, None, 0, 0.0, None, 0.0, None, softness))


def temperature_kl_backward(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, statistics: Tensor, per_row: bool
) -> Tensor:
    """The student's gradient."""
    return backward(grad_loss, student, teacher, statistics, per_row)


def softness_of(temperature: float) -> Softness:
    return Softness(float(temperature), LOG2_E / temperature, 1 / temperature)


def forward(
    student: Tensor, teacher: Tensor, reduction: int, scale: Scale, softness: Softness, region: Region
) -> tuple[Tensor, Tensor]:
    """The loss and the rows' statistics; `scale` and `softness` are the background's where there is a region."""
    rows = rows_of(student, teacher)
    count = student.numel() // rows.columns
    kernel, programs, constants = launch(rows, count, kl_tile, kl_walk)
    result = Result(student, count, reduction, STATISTICS.value, programs)
    with on(student):
        if programs:
            kernel[(programs,)](
                rows,
                count,
                result.statistics,
                result.values,
                scale,
                softness,
                region,
                KEEP=result.keep,
                **constants,
            )
        return result.finish()


def backward(grad_loss: Tensor, student: Tensor, teacher: Tensor, statistics: Tensor, per_row: bool) -> Tensor:
    """The student's gradient: both logits read again, one written."""
    grad = torch.empty_like(student)
    rows = rows_of(student, teacher, grad)
    count = student.numel() // rows.columns
    kernel, programs, constants = launch(rows, count, kl_tile_gradient, kl_walk_gradient)
    if programs:
        with on(student):
            kernel[(programs,)](rows, count, statistics, grad_loss, PER_ROW=per_row, **constants)
    return grad
