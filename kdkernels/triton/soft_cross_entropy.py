"""Soft cross-entropy with class weights and a hard part, in Triton, as csrc/math/soft_cross_entropy.h has it.

With b, c the bytes of a student's and a teacher's logit: the forward moves b + c per logit (rows that are ignored are
not read; a wide row whose sum is infinite is read again: see `soft_walk`) and about 44 bytes per row; the backward
2 b + c. Class weights, 4 bytes per class, come from a cache after the first row.

Forward: one launch; before it one that counts the rows of a mean of which labels may ignore some, and after it one that
adds the programs' sums where there are several. Backward: one launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses.arguments import MEAN_OF_ROWS
from .rows import Result, count_rows, launch, on, rows_of, scale_of
from .soft_rows import STATISTICS, Classes, Labels, soft_tile, soft_tile_gradient, soft_walk, soft_walk_gradient

LOG2_E = 1.4426950408889634074


def soft_cross_entropy(
    student: Tensor,
    teacher: Tensor,
    class_weight: Tensor | None,
    temperature: float,
    target: Tensor | None,
    hard_weight: float,
    hard_weight_tensor: Tensor | None,
    ignore_index: int,
    weight: Tensor | None,
    reduction: int,
    avg_factor: float | None,
    avg_factor_tensor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The loss, and (rows, 8) statistics for the backward."""
    rows = rows_of(student, teacher)
    count = student.numel() // rows.columns
    kernel, programs, constants = launch(rows, count, soft_tile, soft_walk)
    result = Result(student, count, reduction, STATISTICS.value, programs)
    scale = scale_of(reduction, count, rows.columns, avg_factor, avg_factor_tensor, weight)
    counts, parts = None, 0
    if (
        target is not None
        and programs
        and reduction == MEAN_OF_ROWS
        and avg_factor is None
        and avg_factor_tensor is None
    ):
        counts, parts = count_rows(target, ignore_index)
        scale = scale._replace(factor=1.0)
    with on(student):
        if programs:
            kernel[(programs,)](
                rows,
                count,
                result.statistics,
                result.values,
                scale,
                Classes(class_weight, LOG2_E / temperature, 1 / temperature),
                Labels(target, ignore_index, float(hard_weight), hard_weight_tensor, counts, parts),
                KEEP=result.keep,
                SEPARATE=target is not None and temperature != 1,
                **constants,
            )
        return result.finish()


def soft_cross_entropy_backward(
    grad_loss: Tensor,
    student: Tensor,
    teacher: Tensor,
    class_weight: Tensor | None,
    temperature: float,
    target: Tensor | None,
    statistics: Tensor,
    per_row: bool,
) -> Tensor:
    """The student's gradient."""
    grad = torch.empty_like(student)
    rows = rows_of(student, teacher, grad)
    count = student.numel() // rows.columns
    kernel, programs, constants = launch(rows, count, soft_tile_gradient, soft_walk_gradient)
    classes = Classes(class_weight, LOG2_E / temperature, 1 / temperature)
    if programs:
        with on(student):
            kernel[(programs,)](rows, count, statistics, grad_loss, classes, target, PER_ROW=per_row, **constants)
    return grad
