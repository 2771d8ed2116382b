"""What the formulas share: the dtype they compute in, device-side scalars, row reductions, and softmax's edge rules.

Nothing specific to one loss belongs here, and nothing that reads a tensor on the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

Scalar = float | Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 where any of the tensors is float64."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def scalar(x: Scalar, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number or 0-d tensor as a 0-d tensor of `dtype` on `device`; a tensor keeps its graph."""
    # full, not tensor(): the value travels as a kernel argument, not as a copy from the host.
    return x.to(dtype) if isinstance(x, Tensor) else torch.full((), x, dtype=dtype, device=device)


def divide(total: Tensor, divisor: Scalar) -> Tensor:
    """`total / divisor`, and 0 where the divisor is 0 or negative."""
    divisor = scalar(divisor, total.dtype, total.device)
    nothing = divisor <= 0
    return torch.where(nothing, torch.zeros_like(total), total / torch.where(nothing, 1.0, divisor))


def reduce_rows(
    rows: Tensor,
    *,
    weight: Tensor | None,
    reduction: str,
    divisor: int | Tensor,
    avg_factor: Scalar | None,
    classes: int = 1,
) -> Tensor:
    """One loss per row, weighted and reduced: "none", "sum", or a mean, the sum over (avg_factor or divisor) * classes.

    `divisor` counts rows and is held at 1 or more, so that no rows give 0; an avg_factor of 0 or less gives 0.
    """
    if weight is not None:
        rows = rows * weight.to(rows.dtype)
    if reduction == "none":
        return rows
    total = rows.sum()
    if reduction == "sum":
        return total
    if avg_factor is not None:
        return divide(total, scalar(avg_factor, total.dtype, total.device) * classes)
    divisor = divisor.clamp(min=1) if isinstance(divisor, Tensor) else max(divisor, 1)
    return total / (divisor * classes)


def empty_rows(student: Tensor, teacher: Tensor) -> Tensor:
    """(..., 1): rows that are all -inf on either side. They have no distribution; their loss and gradient are 0."""
    none_left = float("-inf")
    return (student == none_left).all(-1, keepdim=True) | (teacher == none_left).all(-1, keepdim=True)


def log_probabilities(logits: Tensor, temperature: Scalar) -> Tensor:
    """log softmax(logits / temperature) over the last dimension."""
    # The maximum is a constant that cancels: subtracted first, it keeps large common offsets out of the rounding.
    shifted = logits - logits.detach().amax(-1, keepdim=True)
    return torch.log_softmax(shifted / temperature, -1)
