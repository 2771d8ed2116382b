"""What the row losses share beyond their arguments: how a backward reads its upstream gradient, and the fakes'
shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .arguments import NONE, arithmetic_dtype


def fake_outputs(student: Tensor, reduction: int, per_row: int) -> tuple[Tensor, Tensor]:
    """The loss (0-d, or one per row) and the (rows, per_row) statistics of a forward op."""
    dtype = arithmetic_dtype(student)
    rows = 1
    for size in student.shape[:-1]:
        rows = rows * size
    loss = student.new_empty(student.shape[:-1] if reduction == NONE else (), dtype=dtype)
    return loss, student.new_empty((rows, per_row), dtype=dtype)


def row_gradient(
    grad_loss: Tensor, student: Tensor, formula: Callable[[], Tensor], kernel: Callable[[Tensor, bool], Tensor]
) -> Tensor | None:
    """The student's gradient: from `kernel(grad_loss, per_row)`, or, under create_graph=True, from `formula()`.

    The upstream gradient is one number, or one per row; only the latter, of the rows' size, may need a contiguous copy.
    """
    if torch.is_grad_enabled():
        (grad,) = ops.gradients_of_formula(formula, [student], grad_loss)
        return grad
    return kernel(grad_loss.contiguous(), grad_loss.dim() > 0)


def saved_scalar(number: Any, tensor: Tensor | None) -> Any:
    """The argument that check_scalar or check_average split, whole again for the formula."""
    return number if tensor is None else tensor
