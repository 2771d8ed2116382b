"""Temperature KL in plain PyTorch: the definition that every KL kernel is tested against."""

from __future__ import annotations

from torch import Tensor

from .common import Scalar, compute_dtype, empty_rows, log_probabilities, reduce_rows


def kl_rows(student: Tensor, teacher: Tensor, temperature: Scalar) -> Tensor:
    """KL(softmax(teacher / T) || softmax(student / T)) per row, without T^2. T is a number or, per row, (..., 1).

    p_t = 0 contributes 0 whatever the student has; a student's -inf where p_t > 0 gives +inf with the gradient
    p_s - p_t; a row all -inf on either side gives 0 with gradient 0. NaN stays in its row.
    """
    empty = empty_rows(student, teacher)
    log_s = log_probabilities(student.masked_fill(empty, 0.0), temperature)
    log_t = log_probabilities(teacher.masked_fill(empty, 0.0), temperature)
    p_t = log_t.exp()
    # Both logs leave before they meet the 0 that multiplies them: 0 * inf would be NaN, in the gradient as well.
    absent = p_t == 0
    difference = log_t.masked_fill(absent, 0.0) - log_s.masked_fill(absent, 0.0)
    return (p_t * difference).sum(-1)


def temperature_kl_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
    avg_factor: Scalar | None = None,
) -> Tensor:
    """Hinton et al. 2015: ``T^2 sum_c p_t log(p_t / p_s)`` per row of (..., C), ``p = softmax(z / T)``.

    "batchmean" divides the sum by the rows, "mean" by rows x classes (avg_factor replaces the rows, and gives 0 when it
    is 0 or less), "sum" by nothing, "none" keeps the rows. With a weight the numerator is weighted, the divisor is not.
    No rows give 0 with a graph. Edges: `kl_rows`.
    """
    dtype = compute_dtype(student, teacher)
    rows = temperature * temperature * kl_rows(student.to(dtype), teacher.detach().to(dtype), temperature)
    return reduce_rows(
        rows,
        weight=weight,
        reduction=reduction,
        divisor=rows.numel(),
        avg_factor=avg_factor,
        classes=student.shape[-1] if reduction == "mean" else 1,
    )
