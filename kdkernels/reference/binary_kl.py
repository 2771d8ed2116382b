"""Binary KL (sigmoid heads) in plain PyTorch: the definition that every binary KL kernel is tested against."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .common import Scalar, compute_dtype, reduce_rows


def _outcome(student: Tensor, teacher: Tensor) -> Tensor:
    """p_t log(p_t / p_s) for p = sigmoid; p_t = 0 contributes 0 whatever the student has."""
    p_t = teacher.sigmoid()
    absent = p_t == 0
    return p_t * (F.logsigmoid(teacher).masked_fill(absent, 0.0) - F.logsigmoid(student).masked_fill(absent, 0.0))


def binary_kl_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
    avg_factor: Scalar | None = None,
) -> Tensor:
    """``T^2 sum_c KL(Bernoulli(p_t,c) || Bernoulli(p_s,c))`` per row of (..., C), ``p = sigmoid(z / T)``.

    Hinton et al. 2015 with two outcomes per class. "batchmean" divides the sum by the rows, "mean" by rows x classes
    (avg_factor replaces the rows, and gives 0 when it is 0 or less), "sum" by nothing, "none" keeps the rows. With a
    weight the numerator is weighted, the divisor is not. No rows give 0 with a graph.

    An outcome that the teacher rules out contributes 0 whatever the student has, so logits of +-inf are well
    defined; one that the student alone rules out gives +inf, with the gradient T (p_s - p_t). NaN stays in its row.
    """
    dtype = compute_dtype(student, teacher)
    s, t = student.to(dtype) / temperature, teacher.detach().to(dtype) / temperature
    rows = temperature * temperature * (_outcome(s, t) + _outcome(-s, -t)).sum(-1)
    return reduce_rows(
        rows,
        weight=weight,
        reduction=reduction,
        divisor=rows.numel(),
        avg_factor=avg_factor,
        classes=student.shape[-1] if reduction == "mean" else 1,
    )
