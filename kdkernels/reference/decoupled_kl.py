"""Decoupled KL (DeFeat) in plain PyTorch: the definition that every decoupled KL kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from .common import Scalar, compute_dtype, scalar
from .temperature_kl import kl_rows


def decoupled_kl_loss(
    student: Tensor,
    teacher: Tensor,
    foreground: Tensor,
    *,
    foreground_weight: Scalar = 1.0,
    background_weight: Scalar = 1.0,
    foreground_temperature: float = 1.0,
    background_temperature: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """DeFeat (Guo et al. 2021) eq. 6-9; `foreground` says of each row of (..., C) which region it belongs to:

    ``w_f T_f^2 / K_f sum_fg KL_i(T_f) + w_b T_b^2 / K_b sum_bg KL_i(T_b)``, KL as in `kl_rows`, edges too.

    K is the region's own number of rows for "mean"; "sum" divides by nothing; "none" keeps the rows, with
    their region's weight and T^2. A row weight scales the numerator alone. An empty region gives 0 with a graph.
    """
    dtype, device = compute_dtype(student, teacher), student.device

    def per_row(inside: Scalar | Tensor, outside: Scalar | Tensor) -> Tensor:
        return torch.where(foreground, scalar(inside, dtype, device), scalar(outside, dtype, device))

    temperature = per_row(foreground_temperature, background_temperature)
    share = per_row(foreground_weight, background_weight) * temperature.square()
    if reduction == "mean":
        share = share / per_row(foreground.sum(), (~foreground).sum())  # a row finds at least itself
    if weight is not None:
        share = share * weight.to(dtype)
    rows = share * kl_rows(student.to(dtype), teacher.detach().to(dtype), temperature.unsqueeze(-1))
    return rows if reduction == "none" else rows.sum()
