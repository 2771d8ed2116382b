"""Decoupled KL (DeFeat): the public function, the module, and the autograd Function over its ops."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..reference.decoupled_kl import decoupled_kl_loss as formula
from .arguments import (
    MEAN_OF_ROWS,
    NONE,
    SUM,
    Scalar,
    check_choice,
    check_device,
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

ops.LOSSES.append("decoupled_kl")
_REDUCTIONS = {"mean": MEAN_OF_ROWS, "sum": SUM, "none": NONE}


def _told(parts):
    return {"decoupled_kl/foreground": parts[0], "decoupled_kl/background": parts[1]}


def _fake_forward(student, teacher, foreground, fw, fw_tensor, bw, bw_tensor, ft, bt, weight, reduction):
    return fake_outputs(student, reduction, 6)


def _fake_backward(grad_loss, student, teacher, statistics, per_row):
    return torch.empty_like(student)


def _fake_one_pass(student, *options):
    loss, grad = fake_one_pass(student)
    return loss, loss.new_empty((2,)), grad


_forward = ops.define(
    "decoupled_kl",
    "(Tensor student, Tensor teacher, Tensor foreground, float foreground_weight, Tensor? foreground_weight_tensor, "
    "float background_weight, Tensor? background_weight_tensor, float foreground_temperature, "
    "float background_temperature, Tensor? weight, int reduction) -> (Tensor, Tensor)",
    _fake_forward,
)
_backward = ops.define(
    "decoupled_kl_backward",
    "(Tensor grad_loss, Tensor student, Tensor teacher, Tensor statistics, bool per_row) -> Tensor",
    _fake_backward,
)
ops.define(
    "decoupled_kl_one_pass",
    "(Tensor student, Tensor teacher, Tensor foreground, float foreground_weight, Tensor? "
    "foreground_weight_tensor, float background_weight, Tensor? background_weight_tensor, float "
    "foreground_temperature, float background_temperature, Tensor? weight, int reduction, float loss_weight, "
    "Tensor? loss_weight_tensor) -> (Tensor, Tensor, Tensor)",
    _fake_one_pass,
    module="decoupled_kl",
)


class _DecoupledKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, student, teacher, foreground, fw, fw_tensor, bw, bw_tensor, ft, bt, weight, reduction):
        loss, statistics = _forward[backend](
            student, teacher, foreground, fw, fw_tensor, bw, bw_tensor, ft, bt, weight, _REDUCTIONS[reduction]
        )
        ops.save(ctx, student, teacher, statistics, foreground, fw_tensor, bw_tensor, weight)
        ctx.backend = backend
        ctx.options = (fw, bw, ft, bt, reduction)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        student, teacher, statistics, foreground, fw_tensor, bw_tensor, weight = ops.saved(ctx)
        fw, bw, ft, bt, reduction = ctx.options
        grad = row_gradient(
            grad_loss,
            student,
            lambda: ops.run_formula(
                formula,
                student,
                teacher,
                foreground,
                foreground_weight=saved_scalar(fw, fw_tensor),
                background_weight=saved_scalar(bw, bw_tensor),
                foreground_temperature=ft,
                background_temperature=bt,
                weight=weight,
                reduction=reduction,
            ),
            lambda upstream, per_row: _backward[ctx.backend](upstream, student, teacher, statistics, per_row),
        )
        return (None, grad) + (None,) * 10


def weighted(
    student: Tensor,
    teacher: Tensor,
    foreground: Tensor,
    *,
    one_pass: OnePass = "auto",
    loss_weight: Scalar = 1.0,
    foreground_weight: Scalar = 1.0,
    background_weight: Scalar = 1.0,
    foreground_temperature: float = 1.0,
    background_temperature: float = 1.0,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor | Plan:
    """:func:`decoupled_kl_loss` times `loss_weight`; maybe still a plan."""
    check_one_pass(one_pass)
    check_logits(student, teacher)
    if not isinstance(foreground, Tensor):
        raise TypeError(f"foreground: expected a tensor, got {type(foreground).__name__}")
    if foreground.dtype != torch.bool:
        raise ValueError(f"foreground: expected bool, got {foreground.dtype}")
    if foreground.shape != student.shape[:-1]:
        raise ValueError(
            f"foreground: expected one value per row, {tuple(student.shape[:-1])}, got {tuple(foreground.shape)}"
        )
    check_device("foreground", foreground, student)
    check_row_weight(weight, student)
    fw, fw_tensor = check_scalar("foreground_weight", foreground_weight, student)
    bw, bw_tensor = check_scalar("background_weight", background_weight, student)
    ft = check_positive("foreground_temperature", foreground_temperature)
    bt = check_positive("background_temperature", background_temperature)
    check_choice("reduction", reduction, tuple(_REDUCTIONS))
    differentiable = needs_formula(weight, foreground_weight, background_weight)
    backend = ops.backend_for("decoupled_kl", student, teacher, differentiable=differentiable)

    def by_formula(student, teacher):
        return ops.run_formula(
            formula,
            student,
            teacher,
            foreground,
            foreground_weight=foreground_weight,
            background_weight=background_weight,
            foreground_temperature=ft,
            background_temperature=bt,
            weight=weight,
            reduction=reduction,
        )

    if rows_take_one_pass(one_pass, "decoupled_kl_one_pass", backend, student, reduction):
        scale = check_scalar("loss_weight", loss_weight, student)

        def arguments(_):
            regions = foreground.contiguous(), fw, fw_tensor, bw, bw_tensor, ft, bt
            return student, teacher, *regions, in_arithmetic(weight, student), _REDUCTIONS[reduction], *scale

        call = Call("decoupled_kl_one_pass", backend, arguments, _told)
        operands = foreground, foreground_weight, background_weight, weight
        return row_plan(call, by_formula, student, teacher, loss_weight, *operands)
    if backend == "reference":
        return scaled(by_formula(student, teacher), loss_weight)
    loss = _DecoupledKL.apply(
        backend,
        student,
        teacher,
        foreground.contiguous(),
        fw,
        fw_tensor,
        bw,
        bw_tensor,
        ft,
        bt,
        in_arithmetic(weight, student),
        reduction,
    )
    return scaled(loss, loss_weight)


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
    one_pass: OnePass = "auto",
) -> Tensor:
    r"""Temperature KL over proposals, foreground and background apart: each with its weight, temperature and count.

    .. math::
        L = \frac{w_f}{K_f} \sum_{r \in f} T_f^2 \, KL(p^{t,T_f}_r \| p^{s,T_f}_r) +
            \frac{w_b}{K_b} \sum_{r \in b} T_b^2 \, KL(p^{t,T_b}_r \| p^{s,T_b}_r)

    Args:
        student: logits (..., C), background included as a class where the head has one; rows are all leading
            dimensions. float32, bfloat16, float16, float64.
        teacher: the same shape, on the same proposals; a constant. Alike in dtype or float32 for the compiled kernels.
        foreground: bool, one per row: whether the row is a foreground proposal.
        foreground_weight, background_weight: a number, or a 0-d float32 tensor that is read on the device.
        foreground_temperature, background_temperature: above 0.
        weight: one number per row, shaped like the rows. The numerator is weighted; the counts are not.
        reduction: ``"mean"`` (each region divided by its own number of rows), ``"sum"`` (no division), or ``"none"``
            (one
            value per row: region weight, row weight and T^2 included, no division).
        one_pass: whether the forward forms the gradient too, see :mod:`kdkernels.losses.one_pass`: True, False, or
            ``"auto"``: where it can (float32 or bfloat16, a loss that is reduced, not in a compiled graph, compiled
            kernels).

    Returns:
        A 0-d float32 tensor (float64 where either side is), or one value per row. The gradient, in the student's
        dtype and memory format, is :math:`w_g T_g / K_g \, (p^s - p^t)` for a row of region g.

    Edge cases: a region without rows gives 0, with a graph; no rows at all likewise. Infinities as in
    :func:`temperature_kl_loss`.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, `foreground` that is not bool, no classes,
            temperatures that are not above 0, a teacher that requires a gradient.
        RuntimeError: one_pass=True where it cannot be had.

    Source: Guo et al. 2021 (DeFeat), eq. 6-9. Published weights: .05 (T = 3) and 2 (T = 1).
    """
    return value(
        weighted(
            student,
            teacher,
            foreground,
            foreground_weight=foreground_weight,
            background_weight=background_weight,
            foreground_temperature=foreground_temperature,
            background_temperature=background_temperature,
            weight=weight,
            reduction=reduction,
            one_pass=one_pass,
        )
    )


class DecoupledKLLoss(LossModule):
    """:func:`decoupled_kl_loss` as a module: the same keywords, and ``loss_weight``, which multiplies the result."""

    function = staticmethod(decoupled_kl_loss)
    weighted = staticmethod(weighted)
