"""The -inf edges that the softmax losses share: what is ruled out by the teacher, the student, or both.

Each check takes `rows(student, teacher)`, a loss of one value per row at temperature 2, and holds it against the
definition written out in float64 here. `entropy` says whether the loss has the teacher's own entropy in it (KL) or not
(cross-entropy); `scale` is what the loss carries: T^2, or 1.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from grid import run
from numerics import error
from torch import Tensor

INF = float("inf")
T = 2.0
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
Rows = Callable[[Tensor, Tensor], Tensor]


def _eps(dtype: torch.dtype) -> float:
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def _logits(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(dtype)


def _check_gradient(grad: Tensor, s: Tensor, t: Tensor, scale: float) -> None:
    expected = scale / T * ((s.double() / T).softmax(-1) - (t.double() / T).softmax(-1))
    assert error(grad, expected) <= 4 * torch.finfo(grad.dtype).eps + 64 * _eps(grad.dtype)


def check_no_probability(
    rows: Rows, dtype: torch.dtype, width: int, student: float, teacher: float, *, entropy: bool, scale: float
) -> None:
    """p_t = 0 gives 0 whatever the student has; the student's own probability of such a class stays in the gradient."""
    s, t = _logits(4, width, dtype)
    for column in (0, width - 1):
        s[:, column], t[:, column] = student, teacher
    loss, grad = run(rows, s, t)
    p_s, p_t = (s.double() / T).softmax(-1)[:, 1:-1], (t.double() / T).softmax(-1)[:, 1:-1]
    expected = scale * (p_t * ((p_t.log() if entropy else 0) - p_s.log())).sum(-1)
    assert error(loss, expected) <= 64 * _eps(dtype)
    _check_gradient(grad, s, t, scale)
    if student == -INF:
        assert (grad[:, 0] == 0).all() and (grad[:, -1] == 0).all()


def check_late_maximum(rows: Rows, dtype: torch.dtype, *, entropy: bool, scale: float) -> None:
    """The student rules out the first 2048 classes. That the teacher gives them no probability shows only later."""
    s, t = torch.zeros(2, 5000).to(dtype), torch.zeros(2, 5000).to(dtype)
    s[:, :2048], t[:, 2048:3000], t[0, 3000:], t[1, 4999] = -INF, 800.0, 1600.0, 2048.0
    loss, grad = run(rows, s, t)
    assert loss.isfinite().all()
    cross, own = torch.tensor([2952.0, 2952.0]).log(), torch.tensor([2000.0, 1.0]).log()
    torch.testing.assert_close(loss.float(), scale * (cross - own if entropy else cross))
    assert (grad[:, :2048] == 0).all() and grad.isfinite().all()


def check_ruled_out(rows: Rows, dtype: torch.dtype, width: int, *, scale: float) -> None:
    """A student's -inf where the teacher has probability: +inf in that row, and a finite gradient."""
    s, t = _logits(3, width, dtype)
    s[1, 1] = -INF
    loss, grad = run(rows, s, t)
    assert loss[1] == INF and loss[[0, 2]].isfinite().all()
    _check_gradient(grad, s, t, scale)


def check_rows_of_nothing(rows: Rows, dtype: torch.dtype, width: int) -> None:
    """Rows all -inf on the student's side, the teacher's, or both: 0, and no gradient."""
    s, t = _logits(4, width, dtype)
    s[0], t[1], s[2], t[2] = -INF, -INF, -INF, -INF
    loss, grad = run(rows, s, t)
    assert (loss[:3] == 0).all() and (grad[:3] == 0).all()
    alone, alone_grad = run(rows, s[3:], t[3:])
    assert torch.equal(loss[3:], alone) and torch.equal(grad[3:], alone_grad)
