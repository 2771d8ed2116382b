"""Class-weighted soft cross-entropy (Chen et al. 2017): the public function, the module, and the autograd Function."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..reference.soft_cross_entropy import soft_cross_entropy_loss as formula
from .arguments import (
    MEAN_OF_ROWS,
    NONE,
    SUM,
    Scalar,
    check_average,
    check_choice,
    check_device,
    check_float,
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

ops.LOSSES.append("soft_cross_entropy")
_REDUCTIONS = {"mean": MEAN_OF_ROWS, "sum": SUM, "none": NONE}


def _fake_forward(
    s, t, class_weight, temperature, target, hard, hard_tensor, ignore, weight, reduction, avg, avg_tensor
):
    return fake_outputs(s, reduction, 8)


def _fake_backward(grad_loss, student, teacher, class_weight, temperature, target, statistics, per_row):
    return torch.empty_like(student)


def _fake_one_pass(student, *options):
    return fake_one_pass(student)


_forward = ops.define(
    "soft_cross_entropy",
    "(Tensor student, Tensor teacher, Tensor? class_weight, float temperature, Tensor? target, float hard_weight, "
    "Tensor? hard_weight_tensor, int ignore_index, Tensor? weight, int reduction, float? avg_factor, "
    "Tensor? avg_factor_tensor) -> (Tensor, Tensor)",
    _fake_forward,
)
_backward = ops.define(
    "soft_cross_entropy_backward",
    "(Tensor grad_loss, Tensor student, Tensor teacher, Tensor? class_weight, float temperature, Tensor? target, "
    "Tensor statistics, bool per_row) -> Tensor",
    _fake_backward,
)
ops.define(
    "soft_cross_entropy_one_pass",
    "(Tensor student, Tensor teacher, Tensor? class_weight, float temperature, Tensor? target, float hard_weight, "
    "Tensor? hard_weight_tensor, int ignore_index, Tensor? weight, int reduction, float? avg_factor, Tensor? "
    "avg_factor_tensor, float loss_weight, Tensor? loss_weight_tensor) -> (Tensor, Tensor)",
    _fake_one_pass,
    module="soft_cross_entropy",
)


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        backend,
        student,
        teacher,
        class_weight,
        temperature,
        target,
        hard,
        hard_tensor,
        ignore,
        weight,
        reduction,
        avg,
        avg_tensor,
    ):
        loss, statistics = _forward[backend](
            student,
            teacher,
            class_weight,
            temperature,
            target,
            hard,
            hard_tensor,
            ignore,
            weight,
            _REDUCTIONS[reduction],
            avg,
            avg_tensor,
        )
        ops.save(ctx, student, teacher, statistics, class_weight, target, hard_tensor, weight, avg_tensor)
        ctx.backend = backend
        ctx.options = (temperature, hard, ignore, reduction, avg)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        student, teacher, statistics, class_weight, target, hard_tensor, weight, avg_tensor = ops.saved(ctx)
        temperature, hard, ignore, reduction, avg = ctx.options
        grad = row_gradient(
            grad_loss,
            student,
            lambda: ops.run_formula(
                formula,
                student,
                teacher,
                class_weight=class_weight,
                temperature=temperature,
                target=target,
                hard_weight=saved_scalar(hard, hard_tensor),
                ignore_index=ignore,
                weight=weight,
                reduction=reduction,
                avg_factor=saved_scalar(avg, avg_tensor),
            ),
            lambda upstream, per_row: _backward[ctx.backend](
                upstream, student, teacher, class_weight, temperature, target, statistics, per_row
            ),
        )
        return (None, grad) + (None,) * 11


def _check_class_weight(class_weight: Tensor | None, student: Tensor) -> None:
    if class_weight is None:
        return
    check_float("class_weight", class_weight)
    if class_weight.shape != student.shape[-1:]:
        raise ValueError(
            f"class_weight: expected one value per class, {tuple(student.shape[-1:])}, got {tuple(class_weight.shape)}"
        )
    check_device("class_weight", class_weight, student)


def _check_target(target: Tensor | None, student: Tensor) -> None:
    if target is None:
        return
    if not isinstance(target, Tensor):
        raise TypeError(f"target: expected a tensor, got {type(target).__name__}")
    if target.dtype != torch.int64:
        raise TypeError(f"target: expected int64 labels, got {target.dtype}")
    if target.shape != student.shape[:-1]:
        raise ValueError(f"target: expected one label per row, {tuple(student.shape[:-1])}, got {tuple(target.shape)}")
    check_device("target", target, student)


def weighted(
    student: Tensor,
    teacher: Tensor,
    *,
    one_pass: OnePass = "auto",
    loss_weight: Scalar = 1.0,
    class_weight: Tensor | None = None,
    temperature: float = 1.0,
    target: Tensor | None = None,
    hard_weight: Scalar = 0.0,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: str = "mean",
    avg_factor: Scalar | None = None,
) -> Tensor | Plan:
    """:func:`soft_cross_entropy_loss` times `loss_weight`; maybe still a plan."""
    check_one_pass(one_pass)
    check_logits(student, teacher)
    _check_class_weight(class_weight, student)
    temperature = check_positive("temperature", temperature)
    _check_target(target, student)
    hard, hard_tensor = check_scalar("hard_weight", hard_weight, student)
    if target is None and (hard_tensor is not None or hard != 0):
        raise ValueError(
            f"hard_weight: {'a tensor' if hard_tensor is not None else hard} needs a target, and target is None"
        )
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")
    check_row_weight(weight, student)
    check_choice("reduction", reduction, tuple(_REDUCTIONS))
    avg, avg_tensor = check_average(avg_factor, reduction, student)
    differentiable = needs_formula(weight, class_weight, hard_weight, avg_factor)
    backend = ops.backend_for("soft_cross_entropy", student, teacher, differentiable=differentiable)

    def by_formula(student, teacher):
        return ops.run_formula(
            formula,
            student,
            teacher,
            class_weight=class_weight,
            temperature=temperature,
            target=target,
            hard_weight=hard_weight,
            ignore_index=ignore_index,
            weight=weight,
            reduction=reduction,
            avg_factor=avg_factor,
        )

    if rows_take_one_pass(one_pass, "soft_cross_entropy_one_pass", backend, student, reduction):
        scale = check_scalar("loss_weight", loss_weight, student)

        def arguments(_):
            labels = None if target is None else target.contiguous()
            mixed = in_arithmetic(class_weight, student), temperature, labels, hard, hard_tensor, ignore_index
            rows = in_arithmetic(weight, student), _REDUCTIONS[reduction], avg, avg_tensor
            return student, teacher, *mixed, *rows, *scale

        call = Call("soft_cross_entropy_one_pass", backend, arguments)
        operands = class_weight, target, hard_weight, weight, avg_factor
        return row_plan(call, by_formula, student, teacher, loss_weight, *operands)
    if backend == "reference":
        return scaled(by_formula(student, teacher), loss_weight)
    loss = _SoftCrossEntropy.apply(
        backend,
        student,
        teacher,
        in_arithmetic(class_weight, student),
        temperature,
        None if target is None else target.contiguous(),
        hard,
        hard_tensor,
        ignore_index,
        in_arithmetic(weight, student),
        reduction,
        avg,
        avg_tensor,
    )
    return scaled(loss, loss_weight)


def soft_cross_entropy_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    class_weight: Tensor | None = None,
    temperature: float = 1.0,
    target: Tensor | None = None,
    hard_weight: Scalar = 0.0,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: str = "mean",
    avg_factor: Scalar | None = None,
    one_pass: OnePass = "auto",
) -> Tensor:
    r"""Cross-entropy against the teacher's softened distribution, weighted by class, mixed with the hard labels' own.

    .. math::
        L_r = -(1 - \mu) \sum_c w_c \, p^t_c \log p^s_c \; - \; \mu \log \operatorname{softmax}(s)_{y}, \qquad
        p = \operatorname{softmax}(z / T)

    Args:
        student: logits (..., C); rows are all leading dimensions. float32, bfloat16, float16, float64.
        teacher: the same shape; a constant. Alike in dtype or float32 for the compiled kernels; else the formula
            serves.
        class_weight: w, (C,), on the soft part alone. Chen et al. use 1.5 for the background, 1 elsewhere.
        temperature: T of the soft part, above 0. There is no T^2: the paper has none.
        target: labels y, int64, one per row. Rows whose label is ``ignore_index`` give 0 in both parts and do not
            count in the mean, as in :func:`torch.nn.functional.cross_entropy`. A label out of range makes its row NaN.
        hard_weight: mu, a number or a 0-d float32 tensor that is read on the device. Needs a target unless it is 0.
        weight: one number per row, shaped like the rows. The numerator is weighted; the divisor is not.
        reduction: ``"mean"`` (sum over rows / rows that are not ignored), ``"sum"``, or ``"none"`` (one value per row).
        avg_factor: replaces the divisor of the mean: a number or a 0-d float32 tensor. A value of 0 or less gives 0.
        one_pass: whether the forward forms the gradient too, see :mod:`kdkernels.losses.one_pass`: True, False, or
            ``"auto"``: where it can (float32 or bfloat16, a loss that is reduced, not in a compiled graph, compiled
            kernels).

    Returns:
        A 0-d float32 tensor (float64 where either side is), or one value per row. The gradient, in the student's
        dtype and memory format, is :math:`(1-\mu)/T \, (p^s \sum_c w_c p^t_c - w p^t) + \mu
        (\operatorname{softmax}(s) - 1_y)`. With class weights its zero is not the teacher's distribution but the one
        proportional to :math:`w p^t`.

    Edge cases: :math:`p^t_c = 0` contributes 0 whatever the student has; a student logit of -inf where
    :math:`w_c p^t_c > 0`, or at the label, gives +inf; a row all -inf on either side gives 0 with gradient 0 and is
    still counted. No rows, all ignored: 0, with a graph.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit, no classes, a temperature that is not above
            0, a hard weight without a target, a teacher that requires a gradient.
        RuntimeError: one_pass=True where it cannot be had.

    Source: Chen et al. 2017, eq. 2 and 3. The paper gives no mu: it is the caller's choice.
    """
    return value(
        weighted(
            student,
            teacher,
            class_weight=class_weight,
            temperature=temperature,
            target=target,
            hard_weight=hard_weight,
            ignore_index=ignore_index,
            weight=weight,
            reduction=reduction,
            avg_factor=avg_factor,
            one_pass=one_pass,
        )
    )


class SoftCrossEntropyLoss(LossModule):
    """:func:`soft_cross_entropy_loss` as a module: the same keywords, and ``loss_weight``, which multiplies
    the result.
    """

    function = staticmethod(soft_cross_entropy_loss)
    weighted = staticmethod(weighted)
