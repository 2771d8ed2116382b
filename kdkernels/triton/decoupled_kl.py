"""Decoupled KL in Triton: temperature_kl's kernels with two regions' weights, temperatures and counts.

Bytes moved: kl_rows.py, and one per row for its region. A mean takes one small launch more, which counts the
foreground's rows.
"""

from __future__ import annotations

from torch import Tensor

from ..losses.arguments import MEAN_OF_ROWS
from .kl_rows import Region
from .rows import Scale, count_rows
from .temperature_kl import backward, forward, softness_of


def decoupled_kl(
    student: Tensor,
    teacher: Tensor,
    foreground: Tensor,
    foreground_weight: float,
    foreground_weight_tensor: Tensor | None,
    background_weight: float,
    background_weight_tensor: Tensor | None,
    foreground_temperature: float,
    background_temperature: float,
    weight: Tensor | None,
    reduction: int,
) -> tuple[Tensor, Tensor]:
    """The loss, and (rows, 6) statistics for the backward."""
    counts, parts = count_rows(foreground, 0) if reduction == MEAN_OF_ROWS and foreground.numel() else (None, 0)
    region = Region(
        foreground,
        counts,
        parts,
        float(foreground_weight),
        foreground_weight_tensor,
        float(background_weight),
        background_weight_tensor,
        softness_of(foreground_temperature),
    )
    scale = Scale(1.0, None, weight)
    return forward(student, teacher, reduction, scale, softness_of(background_temperature), region)


def decoupled_kl_backward(
    grad_loss: Tensor, student: Tensor, teacher: Tensor, statistics: Tensor, per_row: bool
) -> Tensor:
    """The student's gradient."""
    return backward(grad_loss, student, teacher, statistics, per_row)
