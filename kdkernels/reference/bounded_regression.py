"""Bounded regression (Chen et al. 2017) in plain PyTorch: the definition that its kernels are tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import Scalar, compute_dtype, reduce_rows, scalar


def bounded_regression_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    margin: float = 0.0,
    bound_weight: Scalar = 0.5,
    smooth_l1_weight: Scalar = 1.0,
    beta: float = 1.0,
    gate: str = "row",
    weight: Tensor | None = None,
    reduction: str = "mean",
    avg_factor: Scalar | None = None,
) -> Tensor:
    """Chen et al. 2017, eq. 4-5, per row of deltas (..., 4):

    ``v sum_c smoothL1(R_s - y) + n sum_c b_c (R_s - y)^2``, v and n the weights. The gate b is 1 while the student's
    squared error + margin is strictly above the teacher's, else 0: summed over the row's coordinates ("row"), of each
    coordinate ("element"), or averaged over all 4 K elements ("batch"). It is a step and has no gradient.

    "mean" divides the sum by the rows (avg_factor replaces them, and gives 0 when it is 0 or less), "sum" by nothing,
    "none" keeps the rows; a row weight scales the numerator alone. No rows give 0 with a graph.
    """
    dtype, device = compute_dtype(student, teacher), student.device
    student, target = student.to(dtype), target.detach().to(dtype)
    error = (student - target).square()
    teacher_error = (teacher.detach().to(dtype) - target).square()
    compared, bound = error.detach(), teacher_error
    if gate == "row":
        compared, bound = compared.sum(-1, keepdim=True), bound.sum(-1, keepdim=True)
    elif gate == "batch":
        elements = max(error.numel(), 1)
        compared, bound = compared.sum() / elements, bound.sum() / elements
    bounded = torch.where(compared + margin > bound, error, torch.zeros_like(error)).sum(-1)
    smooth = F.smooth_l1_loss(student, target, reduction="none", beta=beta).sum(-1)
    rows = scalar(smooth_l1_weight, dtype, device) * smooth + scalar(bound_weight, dtype, device) * bounded
    return reduce_rows(rows, weight=weight, reduction=reduction, divisor=rows.numel(), avg_factor=avg_factor)
