"""What the row losses share beyond their arguments: how a backward reads its upstream gradient, the plan of a call that
takes the one-pass form, and the fakes' shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import ops
from .arguments import NONE, Scalar, arithmetic_dtype
from .one_pass import Call, OnePass, Plan, scaled, takes_one_pass


def fake_outputs(student: Tensor, reduction: int, per_row: int) -> tuple[Tensor, Tensor]:
    """The loss (0-d, or one per row) and the (rows, per_row) statistics of a forward op."""
    dtype = arithmetic_dtype(student)
    rows = 1
    for size in student.shape[:-1]:
        rows = rows * size
    loss = student.new_empty(student.shape[:-1] if reduction == NONE else (), dtype=dtype)
    return loss, student.new_empty((rows, per_row), dtype=dtype)


def fake_one_pass(student: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and the gradient of a one-pass op."""
    return student.new_empty((), dtype=torch.float32), torch.empty_like(student)


def rows_take_one_pass(one_pass: OnePass, op: str, backend: str, student: Tensor, reduction: str) -> bool:
    """:func:`takes_one_pass`, for a loss that may also be one value per row."""
    if reduction != "none":
        return takes_one_pass(one_pass, op, backend, [student])
    if one_pass is True and torch.is_grad_enabled() and student.requires_grad:
        loss = op.removesuffix("_one_pass")
        raise RuntimeError(f"{loss}: one_pass=True cannot be had: one value per row takes two passes")
    return False


def row_plan(
    call: Call,
    formula: Callable[[Tensor, Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    loss_weight: Scalar,
    *operands: Any,
) -> Plan:
    """A row loss as a plan, from the call of its op and its formula without `loss_weight`. `operands` is what else the
    formula holds.
    """

    def weighted_formula(students, others):
        return scaled(formula(students[0], others[0]), loss_weight)

    tensors = [x for x in (loss_weight, *operands) if isinstance(x, Tensor)]
    return Plan(call.backend, [student], [teacher], call, weighted_formula, tensors)


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
