"""Soft cross-entropy (Chen et al. 2017) in plain PyTorch: the definition that its kernels are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import Scalar, compute_dtype, empty_rows, log_probabilities, reduce_rows, scalar


def _soft_rows(student: Tensor, teacher: Tensor, class_weight: Tensor | None, temperature: float) -> Tensor:
    log_s = log_probabilities(student, temperature)
    p_t = log_probabilities(teacher, temperature).exp()
    silent = p_t == 0
    if class_weight is not None:
        class_weight = class_weight.to(student.dtype)
        p_t = p_t * class_weight
        silent = silent | ((class_weight == 0) & log_s.detach().isinf())
    return -(p_t * log_s.masked_fill(silent, 0.0)).sum(-1)


def _part(factor: Tensor, rows: Tensor) -> Tensor:
    """factor * rows, where a part that is switched off gives 0 even where its rows are infinite."""
    off = (factor == 0) & rows.detach().isinf()
    return factor * rows.masked_fill(off, 0.0)


def soft_cross_entropy_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    class_weight: Tensor | None = None,
    temperature: float = 1.0,
    target: Tensor | None = None,
    hard_weight: Scalar = 0.0,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: str = "mean",
    avg_factor: Scalar | None = None,
) -> Tensor:
    """Chen et al. 2017, eq. 2-3, per row of (..., C): ``h CE(z_s, target) - (1 - h) sum_c w_c p_t,c log p_s,c``.

    ``p = softmax(z / T)`` in the soft part, without T^2; the hard part is at T = 1 and without class weights. Without
    a target the soft part stands alone. "mean" divides by the rows that are not ignored (avg_factor replaces them, and
    gives 0 when it is 0 or less), "sum" by nothing, "none" keeps the rows; a row weight scales the numerator alone.

    w_c p_t,c = 0 contributes 0 whatever the student has; a student's -inf where it is not 0 gives +inf, as in the hard
    part, with a finite gradient. A row all -inf on either side is 0 in both parts, and counts. A row whose target is
    ignore_index is 0 and does not count. Any other target out of range makes its row NaN, loss and gradient. A part
    whose factor is 0 gives 0.
    """
    dtype, device = compute_dtype(student, teacher), student.device
    hard_weight = scalar(hard_weight, dtype, device)
    student, teacher = student.to(dtype), teacher.detach().to(dtype)
    silent = empty_rows(student, teacher)
    counted: int | Tensor = student.numel() // student.shape[-1]
    if target is not None:
        ignored = target == ignore_index
        counted = (~ignored).sum()
        stray = ((target < 0) | (target >= student.shape[-1])) & ~ignored
        silent = silent | ignored.unsqueeze(-1)
    student, teacher = student.masked_fill(silent, 0.0), teacher.masked_fill(silent, 0.0)
    rows = _part(1 - hard_weight, _soft_rows(student, teacher, class_weight, temperature))
    if target is not None:
        label = target.masked_fill(ignored | stray, 0).unsqueeze(-1)
        hard = -log_probabilities(student, 1.0).gather(-1, label).squeeze(-1)
        rows = rows + _part(hard_weight, hard)
        # A factor, so that the gradient is NaN as well.
        rows = rows * torch.ones_like(rows).masked_fill(stray, float("nan"))
    rows = rows.masked_fill(silent.squeeze(-1), 0.0)
    return reduce_rows(rows, weight=weight, reduction=reduction, divisor=counted, avg_factor=avg_factor)
