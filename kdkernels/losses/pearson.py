"""Pearson-normalised feature loss (PKD): the public function, the module, and the autograd Function over its ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..reference.pearson import pearson_loss as formula
from ..reference.pearson import resize_levels
from .arguments import (
    Features,
    Scalar,
    arithmetic_dtype,
    check_choice,
    check_device,
    check_features,
    check_number,
    check_pair,
)
from .feature_pass import OP, PearsonTerm, plan
from .module import LossModule
from .one_pass import OnePass, Plan, check_one_pass, scaled, takes_one_pass, value

ops.LOSSES.append("pearson")


def _fake_forward(student, teacher, eps, mean_levels, zero_on_constant):
    dtype = arithmetic_dtype(student[0])
    channels = sum(s.shape[1] for s in student)
    return student[0].new_empty((), dtype=dtype), student[0].new_empty((channels, 8), dtype=dtype)


def _fake_backward(grad_loss, student, teacher, statistics, first_channel):
    return [torch.empty_like(s) for s in student]


_forward = ops.define(
    "pearson",
    "(Tensor[] student, Tensor[] teacher, float eps, bool mean_levels, bool zero_on_constant) -> (Tensor, Tensor)",
    _fake_forward,
)
_backward = ops.define(
    "pearson_backward",
    "(Tensor grad_loss, Tensor[] student, Tensor[] teacher, Tensor statistics, int[] first_channel) -> Tensor[]",
    _fake_backward,
)


class _Pearson(torch.autograd.Function):
    # Levels travel flat: autograd would lose the gradient of tensors inside a list.
    @staticmethod
    def forward(ctx, backend, eps, level_reduction, on_constant, levels, *tensors):
        students, teachers = tensors[:levels], tensors[levels:]
        loss, statistics = _forward[backend](students, teachers, eps, level_reduction == "mean", on_constant == "zero")
        ops.save(ctx, *tensors, statistics)
        ctx.backend = backend
        ctx.options = (eps, level_reduction, on_constant, levels)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        *tensors, statistics = ops.saved(ctx)
        eps, level_reduction, on_constant, levels = ctx.options
        students, teachers = tensors[:levels], tensors[levels:]
        wanted = [i for i in range(levels) if ctx.needs_input_grad[5 + i]]
        grads: list[Tensor | None] = [None] * levels
        if torch.is_grad_enabled():  # create_graph=True: the formula's gradient can be differentiated again
            students = ops.apart(students)
            found = ops.gradients_of_formula(
                lambda: ops.run_formula(
                    formula, students, teachers, eps=eps, level_reduction=level_reduction, on_constant=on_constant
                ),
                [students[i] for i in wanted],
                grad_loss,
            )
        else:
            first_channel = [sum(s.shape[1] for s in students[:i]) for i in wanted]
            found = _backward[ctx.backend](
                grad_loss, [students[i] for i in wanted], [teachers[i] for i in wanted], statistics, first_channel
            )
        for i, grad in zip(wanted, found):
            grads[i] = grad
        return (None,) * 5 + tuple(grads) + (None,) * levels


def check(
    student: Features,
    teacher: Features,
    *,
    eps: float = 1e-6,
    level_reduction: str = "sum",
    on_constant: str = "zero",
    resize: str | None = "student",
    loss_weight: Scalar = 1.0,
) -> tuple[list[Tensor], list[Tensor], PearsonTerm]:
    """Both sides' levels, resized where need be, and the term, as :func:`pearson_loss` wants them."""
    students, teachers = check_features(student, teacher)
    eps = check_number("eps", eps)
    if eps < 0:
        raise ValueError(f"eps: expected a number of at least 0, got {eps}")
    check_choice("level_reduction", level_reduction, ("mean", "sum"))
    check_choice("on_constant", on_constant, ("zero", "reference"))
    check_choice("resize", resize, ("student", "teacher", None))
    for i, (s, t) in enumerate(zip(students, teachers)):
        check_device(f"teacher[{i}]", t, s)
        check_device(f"student[{i}]", s, students[0])
        if s.shape[:2] != t.shape[:2]:
            raise ValueError(f"student[{i}] and teacher[{i}] differ in N or C: {tuple(s.shape)} and {tuple(t.shape)}")
    given, given_teachers = students, teachers
    students, teachers = resize_levels(students, teachers, resize)
    for i, (s, t) in enumerate(zip(students, teachers)):
        check_pair(s, t, f"[{i}]")
        if s is not given[i] and not ops.kernel_dtypes(s.dtype, t.dtype):  # kernels have no narrower teacher
            teachers[i] = t.to(s.dtype)
    copies = [x for x, g in zip([*students, *teachers], [*given, *given_teachers]) if x is not g]
    term = PearsonTerm(range(len(students)), eps, level_reduction, on_constant, loss_weight, copies)
    return students, teachers, term


def two_passes(backend: str, students: list[Tensor], teachers: list[Tensor], term: PearsonTerm) -> Tensor:
    """The weighted term with its graph, by the formula or by one op forward and one backward."""
    if backend == "reference":
        return scaled(term.formula(students, teachers), term.loss_weight)
    loss = _Pearson.apply(
        backend, term.eps, term.level_reduction, term.on_constant, len(students), *students, *teachers
    )
    return scaled(loss, term.loss_weight)


def weighted(student: Features, teacher: Features, *, one_pass: OnePass = "auto", **keywords: Any) -> Tensor | Plan:
    """:func:`pearson_loss` times `loss_weight`, which the keywords may have too; maybe still a plan."""
    check_one_pass(one_pass)
    students, teachers, term = check(student, teacher, **keywords)
    backend = ops.backend_for_levels("pearson", students, teachers)
    if takes_one_pass(one_pass, OP, backend, students, "pearson"):
        return plan(backend, students, teachers, pearson=term)
    return two_passes(backend, students, teachers, term)


def pearson_loss(
    student: Features,
    teacher: Features,
    *,
    eps: float = 1e-6,
    level_reduction: str = "sum",
    on_constant: str = "zero",
    resize: str | None = "student",
    one_pass: OnePass = "auto",
) -> Tensor:
    r"""Mean squared difference of features that are standardised per channel, over batch and space.

    .. math::
        L = \operatorname{reduce}_l \frac{1}{2 C m} \sum_c \sum_{i=1}^m (\hat s_{ci} - \hat t_{ci})^2, \qquad
        \hat x = \frac{x - \operatorname{mean}(x)}{\operatorname{sd}(x) + \varepsilon}

    with :math:`m = N H W` samples per channel and the unbiased deviation. It is :math:`(m-1)/m \, (1 - \bar r)` for
    the mean Pearson correlation :math:`\bar r`, up to eps: the scale and shift of either side do not matter.

    Args:
        student: features (N, C, H, W), or a list, tuple or dict of pyramid levels. float32, bfloat16, float16, float64.
        teacher: the same N and C; a constant. Alike in dtype or float32 for the compiled kernels; else the formula
            serves.
        eps: added to the deviation, at least 0.
        level_reduction: ``"sum"`` (mmrazor) or ``"mean"``.
        on_constant: what a student channel without any variation gets as gradient: ``"zero"``, or ``"reference"``
            for the published :math:`-\hat t_i / (C m \varepsilon)`, which is about a million times larger than usual.
        resize: which side is resized to the other where H or W differ: ``"student"``, ``"teacher"``, or None to
            refuse. Bilinear, align_corners=False: a float32 copy, the only one that this loss makes
            (and a float32 copy of a 16-bit teacher beside a student that was resized).
        one_pass: whether the forward forms the gradient too, see :mod:`kdkernels.losses.one_pass`: True, False, or
            ``"auto"``: where it can (float32 or bfloat16, not in a compiled graph, compiled kernels).

    Returns:
        A 0-d float32 tensor (float64 where either side is). The gradient has each student level's dtype and memory
        format.

    Edge cases: fewer than two samples per channel, and empty levels: 0 with gradient 0. A constant channel on one
    side has the value (m-1)/(2m)/C, on both sides 0.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or numbers of levels that do not fit; sizes that differ with
            resize=None; a teacher that requires a gradient.
        RuntimeError: one_pass=True where it cannot be had.

    Source: Cao et al. 2022 (PKD), eq. 4-6, normalised as its published code does.
    """
    return value(
        weighted(
            student,
            teacher,
            eps=eps,
            level_reduction=level_reduction,
            on_constant=on_constant,
            resize=resize,
            one_pass=one_pass,
        )
    )


class PearsonLoss(LossModule):
    """:func:`pearson_loss` as a module: the same keywords, and ``loss_weight``, which multiplies the result."""

    function = staticmethod(pearson_loss)
    weighted = staticmethod(weighted)
