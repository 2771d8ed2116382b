"""Masked MSE in plain PyTorch: the definition that every masked MSE kernel is tested against."""

from __future__ import annotations

from torch import Tensor

from .common import Scalar, compute_dtype, scalar


def _region(square: Tensor, mask: Tensor, normalizer: str) -> Tensor:
    """sum(mask * square) over twice the region's size, at least 1."""
    n, channels = square.shape[:2]
    total = (square * mask.unsqueeze(1)).sum()
    if normalizer == "batch":
        return total / max(1, 2 * n)
    count = mask.sum() * (channels if normalizer == "elements" else 1)
    return total / (2 * count).clamp(min=1)


def masked_mse_loss(
    students: list[Tensor],
    teachers: list[Tensor],
    masks: list[Tensor],
    *,
    foreground_weight: Scalar = 1.0,
    background_weight: Scalar = 1.0,
    normalizer: str = "elements",
    level_reduction: str = "mean",
) -> Tensor:
    """DeFeat eq. 5 over levels of (N, C, H, W) with masks (N, H, W) in [0, 1]:

    per level ``w_f sum(M d^2) / max(1, 2 n_f) + w_b sum((1 - M) d^2) / max(1, 2 n_b)``, ``d = S - T``, then the mean
    over levels (empty ones counted) or their sum. ``n_f`` is C sum(M) for "elements", sum(M) for "pixels" and N for
    "batch"; ``n_b`` the same of 1 - M. An empty region or level gives 0 with a graph.
    """
    dtype = compute_dtype(*students, *teachers)
    device = students[0].device
    foreground_weight = scalar(foreground_weight, dtype, device)
    background_weight = scalar(background_weight, dtype, device)
    loss = scalar(0.0, dtype, device)
    for student, teacher, mask in zip(students, teachers, masks):
        square = (student.to(dtype) - teacher.detach().to(dtype)).square()
        mask = mask.to(dtype)
        loss = loss + foreground_weight * _region(square, mask, normalizer)
        loss = loss + background_weight * _region(square, 1 - mask, normalizer)
    return loss / len(students) if level_reduction == "mean" else loss
