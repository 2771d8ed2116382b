"""Pearson loss (PKD) in plain PyTorch: the definition that every Pearson kernel is tested against; and its resize."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import compute_dtype


def resize_levels(
    students: list[Tensor], teachers: list[Tensor], resize: str | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Levels whose H or W differ, brought to one size: bilinear, align_corners=False, no antialias.

    `resize` names the side that is resized to the other's size. The resized copy is float32 (float64 where that side
    is), so that nothing is rounded; equal sizes pass untouched. ValueError where sizes differ and `resize` is None, or
    where an empty level would have to be enlarged.
    """
    students, teachers = list(students), list(teachers)
    for i, (student, teacher) in enumerate(zip(students, teachers)):
        if student.shape[2:] == teacher.shape[2:]:
            continue
        if resize is None:
            raise ValueError(
                f"student[{i}] and teacher[{i}] differ in size, {tuple(student.shape)} and {tuple(teacher.shape)}, "
                "and resize=None refuses to resize either"
            )
        if resize == "student":
            students[i] = _resized(f"student[{i}]", student, teacher)
        else:
            teachers[i] = _resized(f"teacher[{i}]", teacher, student)
    return students, teachers


def _resized(name: str, x: Tensor, other: Tensor) -> Tensor:
    size = tuple(other.shape[2:])
    x = x.to(compute_dtype(x))
    if 0 in size or x.shape[0] == 0 or x.shape[1] == 0:  # nothing to interpolate, but the graph stays
        return x.new_zeros(*x.shape[:2], *size) + x.reshape(-1)[:0].sum()
    if x.numel() == 0:
        raise ValueError(f"{name}: an empty level, {tuple(x.shape)}, cannot be resized to {size}")
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=False)


def _standardised(x: Tensor, eps: float, flat_is_constant: bool) -> Tensor:
    """(C, m) -> (x - mean) / (sd + eps) per channel; sd is unbiased and eps stands outside the root.

    A flat channel has sd 0, and no gradient flows to its sd; with `flat_is_constant` none flows to its values either.
    """
    # The first value is a constant that cancels: subtracted first, the mean is of numbers the size of the deviation.
    shifted = x - x[:, :1].detach()
    centred = shifted - shifted.mean(1, keepdim=True)
    # So is this scale. It keeps squares in range, and it is 0 for a flat channel and for no other.
    scale = shifted.detach().abs().amax(1, keepdim=True)
    flat = scale == 0
    scale = scale.masked_fill(flat, 1.0)
    variance = (centred / scale).square().sum(1, keepdim=True) / (x.shape[1] - 1)
    # The root of 0 has no derivative: a flat channel takes the root of 1 and drops it.
    deviation = (scale * variance.masked_fill(flat, 1.0).sqrt()).masked_fill(flat, 0.0)
    if flat_is_constant or eps == 0:
        centred = centred.masked_fill(flat, 0.0)
    divisor = deviation + eps
    return centred / (divisor.masked_fill(flat, 1.0) if eps == 0 else divisor)


def pearson_loss(
    students: list[Tensor],
    teachers: list[Tensor],
    *,
    eps: float = 1e-6,
    level_reduction: str = "sum",
    on_constant: str = "zero",
    resize: str | None = "student",
) -> Tensor:
    """PKD (Cao et al. 2022) over levels of (N, C, H, W), with statistics per channel over batch and space:

    per level ``1 / (2 C m) sum_ci (s^_ci - t^_ci)^2``, ``x^ = (x - mean) / (sd + eps)``, m = N H W, sd unbiased; then
    the sum over levels or their mean (empty ones counted). Levels of unequal size go through `resize_levels`.

    Fewer than two samples: 0 with gradient 0. A student channel whose values all equal its first: s^ = 0, so the
    published value; its gradient is 0 ("zero", or eps = 0) or the published -t^ / (C m eps) ("reference").
    """
    students, teachers = resize_levels(students, teachers, resize)
    dtype = compute_dtype(*students, *teachers)
    total = torch.zeros((), dtype=dtype, device=students[0].device)
    for student, teacher in zip(students, teachers):
        student, teacher = student.to(dtype), teacher.detach().to(dtype)
        channels, samples = student.shape[1], student.shape[0] * student.shape[2] * student.shape[3]
        if samples < 2 or channels == 0:
            total = total + student.reshape(-1)[:0].sum()  # 0, with a graph, whatever the one value is
            continue
        s = _standardised(student.transpose(0, 1).reshape(channels, samples), eps, on_constant == "zero")
        t = _standardised(teacher.transpose(0, 1).reshape(channels, samples), eps, False)
        total = total + (s - t).square().mean() / 2
    return total / len(students) if level_reduction == "mean" else total
