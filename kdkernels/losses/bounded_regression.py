"""Teacher-bounded regression (Chen et al. 2017): the public function, the module, and the autograd Function."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..reference.bounded_regression import bounded_regression_loss as formula
from .arguments import (
    MEAN_OF_ROWS,
    NONE,
    SUM,
    Scalar,
    check_average,
    check_choice,
    check_device,
    check_float,
    check_number,
    check_pair,
    check_row_weight,
    check_scalar,
    in_arithmetic,
    needs_formula,
)
from .module import LossModule
from .one_pass import Call, OnePass, Plan, check_one_pass, scaled, value
from .rows import fake_one_pass, fake_outputs, row_gradient, row_plan, rows_take_one_pass, saved_scalar

ops.LOSSES.append("bounded_regression")
_REDUCTIONS = {"mean": MEAN_OF_ROWS, "sum": SUM, "none": NONE}
_GATES = ("row", "element", "batch")  # csrc/math/bounded_regression.h: Gate


def _fake_forward(
    student, teacher, target, margin, bw, bw_tensor, sw, sw_tensor, beta, gate, weight, reduction, avg, avg_tensor
):
    return fake_outputs(student, reduction, 4)


def _fake_backward(grad_loss, student, derivative, per_row):
    return torch.empty_like(student)


def _fake_one_pass(student, *options):
    return fake_one_pass(student)


_forward = ops.define(
    "bounded_regression",
    "(Tensor student, Tensor teacher, Tensor target, float margin, float bound_weight, Tensor? bound_weight_tensor, "
    "float smooth_l1_weight, Tensor? smooth_l1_weight_tensor, float beta, int gate, Tensor? weight, int reduction, "
    "float? avg_factor, Tensor? avg_factor_tensor) -> (Tensor, Tensor)",
    _fake_forward,
)
_backward = ops.define(
    "bounded_regression_backward",
    "(Tensor grad_loss, Tensor student, Tensor derivative, bool per_row) -> Tensor",
    _fake_backward,
)


ops.define(
    "bounded_regression_one_pass",
    "(Tensor student, Tensor teacher, Tensor target, float margin, float bound_weight, Tensor? bound_weight_tensor, "
    "float smooth_l1_weight, Tensor? smooth_l1_weight_tensor, float beta, int gate, Tensor? weight, int reduction, "
    "float? avg_factor, Tensor? avg_factor_tensor, float loss_weight, Tensor? loss_weight_tensor) -> (Tensor, Tensor)",
    _fake_one_pass,
    module="bounded_regression",
)


class _BoundedRegression(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        backend,
        student,
        teacher,
        target,
        margin,
        bw,
        bw_tensor,
        sw,
        sw_tensor,
        beta,
        gate,
        weight,
        reduction,
        avg,
        avg_tensor,
    ):
        loss, derivative = _forward[backend](
            student,
            teacher,
            target,
            margin,
            bw,
            bw_tensor,
            sw,
            sw_tensor,
            beta,
            _GATES.index(gate),
            weight,
            _REDUCTIONS[reduction],
            avg,
            avg_tensor,
        )
        ops.save(ctx, student, teacher, target, derivative, bw_tensor, sw_tensor, weight, avg_tensor)
        ctx.backend = backend
        ctx.options = (margin, bw, sw, beta, gate, reduction, avg)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        student, teacher, target, derivative, bw_tensor, sw_tensor, weight, avg_tensor = ops.saved(ctx)
        margin, bw, sw, beta, gate, reduction, avg = ctx.options
        grad = row_gradient(
            grad_loss,
            student,
            lambda: ops.run_formula(
                formula,
                student,
                teacher,
                target,
                margin=margin,
                bound_weight=saved_scalar(bw, bw_tensor),
                smooth_l1_weight=saved_scalar(sw, sw_tensor),
                beta=beta,
                gate=gate,
                weight=weight,
                reduction=reduction,
                avg_factor=saved_scalar(avg, avg_tensor),
            ),
            lambda upstream, per_row: _backward[ctx.backend](upstream, student, derivative, per_row),
        )
        return (None, grad) + (None,) * 13


def weighted(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    one_pass: OnePass = "auto",
    loss_weight: Scalar = 1.0,
    margin: float = 0.0,
    bound_weight: Scalar = 0.5,
    smooth_l1_weight: Scalar = 1.0,
    beta: float = 1.0,
    gate: str = "row",
    weight: Tensor | None = None,
    reduction: str = "mean",
    avg_factor: Scalar | None = None,
) -> Tensor | Plan:
    """:func:`bounded_regression_loss` times `loss_weight`; maybe still a plan."""
    check_one_pass(one_pass)
    check_pair(student, teacher)
    if student.dim() < 1 or student.shape[-1] != 4:
        raise ValueError(f"student: expected (..., 4) box deltas, got shape {tuple(student.shape)}")
    check_float("target", target)
    if target.shape != student.shape:
        raise ValueError(f"student and target differ in shape: {tuple(student.shape)} and {tuple(target.shape)}")
    check_device("target", target, student)
    if target.requires_grad:
        raise ValueError("target: it requires a gradient, but the target is a constant here: detach it")
    margin = check_number("margin", margin)
    bw, bw_tensor = check_scalar("bound_weight", bound_weight, student)
    sw, sw_tensor = check_scalar("smooth_l1_weight", smooth_l1_weight, student)
    beta = check_number("beta", beta)
    if beta < 0:
        raise ValueError(f"beta: expected a number of at least 0, got {beta}")
    check_choice("gate", gate, _GATES)
    check_row_weight(weight, student)
    check_choice("reduction", reduction, tuple(_REDUCTIONS))
    avg, avg_tensor = check_average(avg_factor, reduction, student)
    differentiable = needs_formula(weight, bound_weight, smooth_l1_weight, avg_factor)
    backend = ops.backend_for("bounded_regression", student, teacher, differentiable=differentiable)

    def by_formula(student, teacher):
        return ops.run_formula(
            formula,
            student,
            teacher,
            target,
            margin=margin,
            bound_weight=bound_weight,
            smooth_l1_weight=smooth_l1_weight,
            beta=beta,
            gate=gate,
            weight=weight,
            reduction=reduction,
            avg_factor=avg_factor,
        )

    if rows_take_one_pass(one_pass, "bounded_regression_one_pass", backend, student, reduction):
        scale = check_scalar("loss_weight", loss_weight, student)

        def arguments(_):
            terms = margin, bw, bw_tensor, sw, sw_tensor, beta, _GATES.index(gate)
            rows = in_arithmetic(weight, student), _REDUCTIONS[reduction], avg, avg_tensor
            return student, teacher, target, *terms, *rows, *scale

        call = Call("bounded_regression_one_pass", backend, arguments)
        operands = target, bound_weight, smooth_l1_weight, weight, avg_factor
        return row_plan(call, by_formula, student, teacher, loss_weight, *operands)
    if backend == "reference":
        return scaled(by_formula(student, teacher), loss_weight)
    loss = _BoundedRegression.apply(
        backend,
        student,
        teacher,
        target,
        margin,
        bw,
        bw_tensor,
        sw,
        sw_tensor,
        beta,
        gate,
        in_arithmetic(weight, student),
        reduction,
        avg,
        avg_tensor,
    )
    return scaled(loss, loss_weight)


def bounded_regression_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    margin: float = 0.0,
    bound_weight: Scalar = 0.5,
    smooth_l1_weight: Scalar = 1.0,
    beta: float = 1.0,
    gate: str = "row",
    weight: Tensor | None = None,
    reduction: str = "mean",
    avg_factor: Scalar | None = None,
    one_pass: OnePass = "auto",
) -> Tensor:
    r"""Smooth L1 to the target, plus a squared error that is charged only while the student is not better than the
    teacher.

    .. math::
        L_r = \lambda \sum_i \operatorname{smoothL1}_\beta(s_i - y_i) + \nu \sum_i g_i (s_i - y_i)^2, \qquad
        g = 1[\, e(s, y) + m > e(t, y) \,]

    Args:
        student: box deltas (..., 4) of the rows that have a target; rows are all leading dimensions. Offsets, as the
            head predicts them. float32, bfloat16, float16, float64.
        teacher: the same shape, on the same proposals; a constant. Alike in dtype or float32 for the compiled kernels.
        target: the deltas y to regress to, same shape; a constant. The student's dtype, or any that it may be cast to.
        margin: m. With m > 0 the student is charged until it beats the teacher by m. The paper gives no value.
        bound_weight: nu (paper: 0.5), smooth_l1_weight: a number, or a 0-d float32 tensor that is read on the device.
        beta: where smooth L1 turns from quadratic to linear; 0 is plain L1.
        gate: what e compares: ``"row"``, the squared error of a row's four coordinates; ``"element"``, of each
            coordinate; ``"batch"``, the mean over all rows and coordinates (one gate for all).
        weight: one number per row, shaped like the rows. The numerator is weighted; neither divisor nor gate is.
        reduction: ``"mean"`` (sum over rows / rows), ``"sum"``, or ``"none"`` (one value per row).
        avg_factor: replaces the number of rows in the mean: a number or a 0-d float32 tensor. A value of 0 or less
            gives 0.
        one_pass: whether the forward forms the gradient too, see :mod:`kdkernels.losses.one_pass`: True, False, or
            ``"auto"``: where it can (float32 or bfloat16, a loss that is reduced, not in a compiled graph, compiled
            kernels).

    Returns:
        A 0-d float32 tensor (float64 where either side is), or one value per row; both terms are summed over the four
        coordinates. The gradient, in the student's dtype, is :math:`\lambda \operatorname{clip}(d/\beta, -1, 1) + 2
        \nu g d` with :math:`d = s - y`; the gate is a step and passes none.

    Edge cases: no rows give 0, with a graph. At equality the gate is closed.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, a last dimension that is not 4, a negative
            beta, a teacher or target that requires a gradient.
        RuntimeError: one_pass=True where it cannot be had.

    Source: Chen et al. 2017, eq. 4-5. Published: nu 0.5, lambda 1.
    """
    return value(
        weighted(
            student,
            teacher,
            target,
            margin=margin,
            bound_weight=bound_weight,
            smooth_l1_weight=smooth_l1_weight,
            beta=beta,
            gate=gate,
            weight=weight,
            reduction=reduction,
            avg_factor=avg_factor,
            one_pass=one_pass,
        )
    )


class BoundedRegressionLoss(LossModule):
    """:func:`bounded_regression_loss` as a module: the same keywords, and ``loss_weight``, which multiplies
    the result.
    """

    function = staticmethod(bounded_regression_loss)
    weighted = staticmethod(weighted)
