"""Binary KL for sigmoid heads: the public function, the module, and the autograd Function over its ops."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..reference.binary_kl import binary_kl_loss as formula
from .arguments import (
    MEAN_OF_ELEMENTS,
    MEAN_OF_ROWS,
    NONE,
    SUM,
    Scalar,
    check_average,
    check_choice,
    check_logits,
    check_positive,
    check_row_weight,
    check_scalar,
    in_arithmetic,
    needs_formula,
)
from .module import LossModule
from .one_pass import Call, OnePass, Plan, check_one_pass, scaled, value
from .rows import fake_one_pass, fake_outputs, row_gradient, row_plan, rows_take_one_pass, saved_scalar

ops.LOSSES.append("binary_kl")
_REDUCTIONS = {"batchmean": MEAN_OF_ROWS, "mean": MEAN_OF_ELEMENTS, "sum": SUM, "none": NONE}


def _fake_forward(student, teacher, temperature, weight, reduction, avg_factor, avg_factor_tensor):
    return fake_outputs(student, reduction, 1)


def _fake_backward(grad_loss, student, teacher, temperature, coefficients, per_row):
    return torch.empty_like(student)


def _fake_one_pass(student, *options):
    return fake_one_pass(student)


_forward = ops.define(
    "binary_kl",
    "(Tensor student, Tensor teacher, float temperature, Tensor? weight, int reduction, float? avg_factor, "
    "Tensor? avg_factor_tensor) -> (Tensor, Tensor)",
    _fake_forward,
)
_backward = ops.define(
    "binary_kl_backward",
    "(Tensor grad_loss, Tensor student, Tensor teacher, float temperature, Tensor coefficients, bool per_row) "
    "-> Tensor",
    _fake_backward,
)
ops.define(
    "binary_kl_one_pass",
    "(Tensor student, Tensor teacher, float temperature, Tensor? weight, int reduction, float? avg_factor, "
    "Tensor? avg_factor_tensor, float loss_weight, Tensor? loss_weight_tensor) -> (Tensor, Tensor)",
    _fake_one_pass,
    module="binary_kl",
)


class _BinaryKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, student, teacher, temperature, weight, reduction, avg, avg_tensor):
        loss, coefficients = _forward[backend](
            student, teacher, temperature, weight, _REDUCTIONS[reduction], avg, avg_tensor
        )
        ops.save(ctx, student, teacher, coefficients, weight, avg_tensor)
        ctx.backend = backend
        ctx.options = (temperature, reduction, avg)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        student, teacher, coefficients, weight, avg_tensor = ops.saved(ctx)
        temperature, reduction, avg = ctx.options
        grad = row_gradient(
            grad_loss,
            student,
            lambda: ops.run_formula(
                formula,
                student,
                teacher,
                temperature=temperature,
                weight=weight,
                reduction=reduction,
                avg_factor=saved_scalar(avg, avg_tensor),
            ),
            lambda upstream, per_row: _backward[ctx.backend](
                upstream, student, teacher, temperature, coefficients, per_row
            ),
        )
        return None, grad, None, None, None, None, None, None


def weighted(
    student: Tensor,
    teacher: Tensor,
    *,
    one_pass: OnePass = "auto",
    loss_weight: Scalar = 1.0,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
    avg_factor: Scalar | None = None,
) -> Tensor | Plan:
    """:func:`binary_kl_loss` times `loss_weight`; maybe still a plan."""
    check_one_pass(one_pass)
    check_logits(student, teacher)
    check_row_weight(weight, student)
    temperature = check_positive("temperature", temperature)
    check_choice("reduction", reduction, tuple(_REDUCTIONS))
    avg, avg_tensor = check_average(avg_factor, reduction, student)
    backend = ops.backend_for("binary_kl", student, teacher, differentiable=needs_formula(weight, avg_factor))

    def by_formula(student, teacher):
        return ops.run_formula(
            formula,
            student,
            teacher,
            temperature=temperature,
            weight=weight,
            reduction=reduction,
            avg_factor=avg_factor,
        )

    if rows_take_one_pass(one_pass, "binary_kl_one_pass", backend, student, reduction):
        scale = check_scalar("loss_weight", loss_weight, student)

        def arguments(_):
            row_weight = in_arithmetic(weight, student)
            return student, teacher, temperature, row_weight, _REDUCTIONS[reduction], avg, avg_tensor, *scale

        call = Call("binary_kl_one_pass", backend, arguments)
        return row_plan(call, by_formula, student, teacher, loss_weight, weight, avg_factor)
    if backend == "reference":
        return scaled(by_formula(student, teacher), loss_weight)
    loss = _BinaryKL.apply(
        backend, student, teacher, temperature, in_arithmetic(weight, student), reduction, avg, avg_tensor
    )
    return scaled(loss, loss_weight)


def binary_kl_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
    avg_factor: Scalar | None = None,
    one_pass: OnePass = "auto",
) -> Tensor:
    r"""Kullback-Leibler divergence of independent Bernoulli distributions, one per class, from raw logits of a
    sigmoid head.

    .. math::
        L_r = T^2 \sum_c \Big[ p_c \log\frac{p_c}{q_c} + (1 - p_c) \log\frac{1 - p_c}{1 - q_c} \Big], \qquad
        p = \sigma(t / T), \; q = \sigma(s / T)

    Args:
        student: logits (..., C) of a sigmoid head (RPN, RetinaNet, FCOS, YOLO); rows are all leading dimensions.
            float32, bfloat16, float16, float64.
        teacher: the same shape; a constant. Alike in dtype or float32 for the compiled kernels; else the formula
            serves.
        temperature: T, above 0. The loss carries T^2.
        weight: one number per row, shaped like the rows. The numerator is weighted; the divisor is not.
        reduction: ``"batchmean"`` (sum over rows / rows), ``"mean"`` (sum / (rows x classes)), ``"sum"``, or
            ``"none"`` (one value per row, summed over classes).
        avg_factor: replaces the number of rows in a mean: a number or a 0-d float32 tensor, read on the device. A value
            of 0 or less gives 0.
        one_pass: whether the forward forms the gradient too, see :mod:`kdkernels.losses.one_pass`: True, False, or
            ``"auto"``: where it can (float32 or bfloat16, a loss that is reduced, not in a compiled graph, compiled
            kernels).

    Returns:
        A 0-d float32 tensor (float64 where either side is), or one value per row. The gradient, in the student's
        dtype and memory format, is :math:`T (\sigma(s/T) - \sigma(t/T))`, times the row's weight over the divisor.

    Edge cases: a probability of 0 on the teacher's side contributes 0 whatever the student has, so equal infinities
    give 0; an infinite student logit that rules out what the teacher has gives +inf. No rows: 0, with a graph. NaN
    stays in its row.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, no classes, a temperature that is not above
            0, a teacher that requires a gradient, avg_factor with a reduction that divides by nothing.
        RuntimeError: one_pass=True where it cannot be had.

    Source: the two-class case of Hinton et al. 2015: softmax of [0, z] is [1 - sigmoid(z), sigmoid(z)].
    """
    return value(
        weighted(
            student,
            teacher,
            temperature=temperature,
            weight=weight,
            reduction=reduction,
            avg_factor=avg_factor,
            one_pass=one_pass,
        )
    )


class BinaryKLLoss(LossModule):
    """:func:`binary_kl_loss` as a module: the same keywords, and ``loss_weight``, which multiplies the result."""

    function = staticmethod(binary_kl_loss)
    weighted = staticmethod(weighted)
