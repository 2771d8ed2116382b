"""Temperature KL (Hinton): the public function, the module, and the autograd Function over its ops."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..reference.temperature_kl import temperature_kl_loss as formula
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

ops.LOSSES.append("temperature_kl")
_REDUCTIONS = {"batchmean": MEAN_OF_ROWS, "mean": MEAN_OF_ELEMENTS, "sum": SUM, "none": NONE}


def _fake_forward(student, teacher, temperature, weight, reduction, avg_factor, avg_factor_tensor):
    return fake_outputs(student, reduction, 6)


def _fake_backward(grad_loss, student, teacher, statistics, per_row):
    return torch.empty_like(student)


def _fake_one_pass(student, *options):
    return fake_one_pass(student)


_forward = ops.define(
    "temperature_kl",
    "(Tensor student, Tensor teacher, float temperature, Tensor? weight, int reduction, float? avg_factor, "
    "Tensor? avg_factor_tensor) -> (Tensor, Tensor)",
    _fake_forward,
)
_backward = ops.define(
    "temperature_kl_backward",
    "(Tensor grad_loss, Tensor student, Tensor teacher, Tensor statistics, bool per_row) -> Tensor",
    _fake_backward,
)
ops.define(
    "temperature_kl_one_pass",
    "(Tensor student, Tensor teacher, float temperature, Tensor? weight, int reduction, float? avg_factor, "
    "Tensor? avg_factor_tensor, float loss_weight, Tensor? loss_weight_tensor) -> (Tensor, Tensor)",
    _fake_one_pass,
    module="temperature_kl",
)


class _TemperatureKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, student, teacher, temperature, weight, reduction, avg, avg_tensor):
        loss, statistics = _forward[backend](
            student, teacher, temperature, weight, _REDUCTIONS[reduction], avg, avg_tensor
        )
        ops.save(ctx, student, teacher, statistics, weight, avg_tensor)
        ctx.backend = backend
        ctx.options = (temperature, reduction, avg)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        student, teacher, statistics, weight, avg_tensor = ops.saved(ctx)
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
            lambda upstream, per_row: _backward[ctx.backend](upstream, student, teacher, statistics, per_row),
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
    """:func:`temperature_kl_loss` times `loss_weight`; maybe still a plan."""
    check_one_pass(one_pass)
    check_logits(student, teacher)
    check_row_weight(weight, student)
    temperature = check_positive("temperature", temperature)
    check_choice("reduction", reduction, tuple(_REDUCTIONS))
    avg, avg_tensor = check_average(avg_factor, reduction, student)
    backend = ops.backend_for("temperature_kl", student, teacher, differentiable=needs_formula(weight, avg_factor))

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

    if rows_take_one_pass(one_pass, "temperature_kl_one_pass", backend, student, reduction):
        scale = check_scalar("loss_weight", loss_weight, student)

        def arguments(_):
            row_weight = in_arithmetic(weight, student)
            return student, teacher, temperature, row_weight, _REDUCTIONS[reduction], avg, avg_tensor, *scale

        call = Call("temperature_kl_one_pass", backend, arguments)
        return row_plan(call, by_formula, student, teacher, loss_weight, weight, avg_factor)
    if backend == "reference":
        return scaled(by_formula(student, teacher), loss_weight)
    loss = _TemperatureKL.apply(
        backend, student, teacher, temperature, in_arithmetic(weight, student), reduction, avg, avg_tensor
    )
    return scaled(loss, loss_weight)


def temperature_kl_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "batchmean",
    avg_factor: Scalar | None = None,
    one_pass: OnePass = "auto",
) -> Tensor:
    r"""Kullback-Leibler divergence of softened softmax distributions, from raw logits.

    .. math::
        L_r = T^2 \sum_c p^t_c \log (p^t_c / p^s_c), \qquad p = \operatorname{softmax}(z / T)

    Args:
        student: logits (..., C); rows are all leading dimensions. float32, bfloat16, float16, float64.
        teacher: the same shape; a constant. Alike in dtype or float32 for the compiled kernels; else the formula
            serves.
        temperature: T, above 0. The loss carries T^2, so gradients keep their size across temperatures.
        weight: one number per row, shaped like the rows. The numerator is weighted; the divisor is not.
        reduction: ``"batchmean"`` (sum over rows / rows), ``"mean"`` (sum / (rows x classes): mmdet), ``"sum"``, or
            ``"none"`` (one value per row).
        avg_factor: replaces the number of rows in a mean: a number or a 0-d float32 tensor, read on the device. A value
            of 0 or less gives 0.
        one_pass: whether the forward forms the gradient too, see :mod:`kdkernels.losses.one_pass`: True, False, or
            ``"auto"``: where it can (float32 or bfloat16, a loss that is reduced, not in a compiled graph, compiled
            kernels).

    Returns:
        A 0-d float32 tensor (float64 where either side is), or one value per row. The gradient, in the student's
        dtype and memory format, is :math:`T (p^s - p^t)` per row, times the row's weight over the divisor.

    Channel-wise distillation (CWD, Shu et al. 2021) is this loss with each channel's positions as classes:
    ``temperature_kl_loss(s.flatten(2), t.flatten(2), temperature=tau)``.

    Edge cases: :math:`p^t_c = 0` contributes 0 whatever the student has, both logits -inf included; a student logit
    of -inf where :math:`p^t_c > 0` gives +inf; a row that is all -inf on either side gives 0 with gradient 0 and is
    still counted. No rows: 0, with a graph. NaN stays in its row.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, no classes, a temperature that is not above
            0, a teacher that requires a gradient, avg_factor with a reduction that divides by nothing.
        RuntimeError: one_pass=True where it cannot be had.

    Source: Hinton, Vinyals, Dean 2015, section 2.
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


class TemperatureKLLoss(LossModule):
    """:func:`temperature_kl_loss` as a module: the same keywords, and ``loss_weight``, which multiplies the result."""

    function = staticmethod(temperature_kl_loss)
    weighted = staticmethod(weighted)
