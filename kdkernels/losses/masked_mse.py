"""Masked MSE (DeFeat, FGFI, TADF, Mimic): the public function, the module, and the autograd Function over its ops."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..masks import GroundTruth
from ..reference.masked_mse import masked_mse_loss as formula
from .arguments import (
    Features,
    Scalar,
    arithmetic_dtype,
    check_choice,
    check_device,
    check_features,
    check_pair,
    check_scalar,
    feature_levels,
    in_arithmetic,
    needs_formula,
)
from .feature_pass import NORMALIZERS, OP, MaskedMSETerm, plan
from .module import LossModule
from .one_pass import OnePass, Plan, check_one_pass, scaled, takes_one_pass, value

ops.LOSSES.append("masked_mse")


def _fake_forward(student, teacher, mask, fw, fw_tensor, bw, bw_tensor, normalizer, mean_levels):
    dtype = arithmetic_dtype(student[0])
    return student[0].new_empty((), dtype=dtype), student[0].new_empty((len(student), 2), dtype=dtype)


def _fake_backward(grad_loss, student, teacher, mask, scales, level_of):
    return [torch.empty_like(s) for s in student]


_forward = ops.define(
    "masked_mse",
    "(Tensor[] student, Tensor[] teacher, Tensor[] mask, float foreground_weight, Tensor? foreground_weight_tensor, "
    "float background_weight, Tensor? background_weight_tensor, int normalizer, bool mean_levels) -> (Tensor, Tensor)",
    _fake_forward,
)
_backward = ops.define(
    "masked_mse_backward",
    "(Tensor grad_loss, Tensor[] student, Tensor[] teacher, Tensor[] mask, Tensor scales, int[] level_of) -> Tensor[]",
    _fake_backward,
)


class _MaskedMSE(torch.autograd.Function):
    # Levels travel flat: autograd would lose the gradient of tensors inside a list.
    @staticmethod
    def forward(ctx, backend, fw, fw_tensor, bw, bw_tensor, normalizer, level_reduction, levels, *tensors):
        students, teachers, masks = tensors[:levels], tensors[levels : 2 * levels], tensors[2 * levels :]
        loss, scales = _forward[backend](
            students,
            teachers,
            masks,
            fw,
            fw_tensor,
            bw,
            bw_tensor,
            NORMALIZERS.index(normalizer),
            level_reduction == "mean",
        )
        ops.save(ctx, *tensors, scales, fw_tensor, bw_tensor)
        ctx.backend = backend
        ctx.options = (fw, bw, normalizer, level_reduction, levels)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        *tensors, scales, fw_tensor, bw_tensor = ops.saved(ctx)
        fw, bw, normalizer, level_reduction, levels = ctx.options
        students, teachers, masks = tensors[:levels], tensors[levels : 2 * levels], tensors[2 * levels :]
        wanted = [i for i in range(levels) if ctx.needs_input_grad[8 + i]]
        grads: list[Tensor | None] = [None] * levels
        if torch.is_grad_enabled():  # create_graph=True: the formula's gradient can be differentiated again
            students = ops.apart(students)
            found = ops.gradients_of_formula(
                lambda: ops.run_formula(
                    formula,
                    students,
                    teachers,
                    masks,
                    foreground_weight=fw if fw_tensor is None else fw_tensor,
                    background_weight=bw if bw_tensor is None else bw_tensor,
                    normalizer=normalizer,
                    level_reduction=level_reduction,
                ),
                [students[i] for i in wanted],
                grad_loss,
            )
        else:
            found = _backward[ctx.backend](
                grad_loss,
                [students[i] for i in wanted],
                [teachers[i] for i in wanted],
                [masks[i] for i in wanted],
                scales,
                wanted,
            )
        for i, grad in zip(wanted, found):
            grads[i] = grad
        return (None,) * 8 + tuple(grads) + (None,) * (2 * levels)


def _check_mask(i: int, mask: Tensor, student: Tensor) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask[{i}]: expected a tensor, got {type(mask).__name__}")
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise TypeError(f"mask[{i}]: expected bool or real numbers in [0, 1], got {mask.dtype}")
    if mask.layout != torch.strided:
        raise TypeError(f"mask[{i}]: expected a dense tensor, got layout {mask.layout}")
    n, _, h, w = student.shape
    if mask.shape != (n, h, w):
        raise ValueError(
            f"mask[{i}]: expected (N, H, W) = {(n, h, w)} for student[{i}] of shape {tuple(student.shape)}, "
            f"got {tuple(mask.shape)}"
        )
    check_device(f"mask[{i}]", mask, student)
    if mask.requires_grad:
        raise ValueError(f"mask[{i}]: it requires a gradient, but the mask is a constant here: detach it")
    readable = mask.device.type == "cpu" and not torch.compiler.is_compiling() and not ops.functorch_active()
    if readable and mask.dtype != torch.bool and mask.numel() and type(mask) in (Tensor, torch.nn.Parameter):
        low, high = (float(x) for x in mask.aminmax())
        if not (low >= 0 and high <= 1):
            raise ValueError(f"mask[{i}]: values must lie in [0, 1], found {low} to {high}")
    return mask


def check(
    student: Features,
    teacher: Features,
    mask: Features | GroundTruth,
    *,
    foreground_weight: Scalar = 1.0,
    background_weight: Scalar = 1.0,
    normalizer: str = "elements",
    level_reduction: str = "mean",
    loss_weight: Scalar = 1.0,
) -> tuple[list[Tensor], list[Tensor], MaskedMSETerm]:
    """Both sides' levels and the term, as :func:`masked_mse_loss` wants them."""
    students, teachers = check_features(student, teacher)
    both = isinstance(student, Mapping) and isinstance(mask, Mapping)
    drawn = isinstance(mask, GroundTruth)  # fits as it is
    masks = mask if drawn else feature_levels("mask", mask, list(student) if both else None)
    if len(masks) != len(students):
        raise ValueError(f"mask has {len(masks)} levels, student has {len(students)}")
    first = students[0]
    for i, (s, t) in enumerate(zip(students, teachers)):
        check_pair(s, t, f"[{i}]")
        check_device(f"student[{i}]", s, first)
    if not drawn:
        masks = [_check_mask(i, m, s) for i, (m, s) in enumerate(zip(masks, students))]
    check_scalar("foreground_weight", foreground_weight, first)
    check_scalar("background_weight", background_weight, first)
    check_choice("normalizer", normalizer, NORMALIZERS)
    check_choice("level_reduction", level_reduction, ("mean", "sum"))
    levels = range(len(students))
    term = MaskedMSETerm(levels, masks, foreground_weight, background_weight, normalizer, level_reduction, loss_weight)
    return students, teachers, term


def two_passes(backend: str, students: list[Tensor], teachers: list[Tensor], term: MaskedMSETerm) -> Tensor:
    """The weighted term with its graph, by the formula or by one op forward and one backward."""
    if backend == "reference":
        return scaled(term.formula(students, teachers), term.loss_weight)
    first = students[0]
    masks = [in_arithmetic(m, first) for m in term.masks]
    weights = (
        *check_scalar("foreground_weight", term.foreground_weight, first),
        *check_scalar("background_weight", term.background_weight, first),
    )
    loss = _MaskedMSE.apply(
        backend, *weights, term.normalizer, term.level_reduction, len(students), *students, *teachers, *masks
    )
    return scaled(loss, term.loss_weight)


def backend_of(students: list[Tensor], teachers: list[Tensor], term: MaskedMSETerm) -> str:
    """Which backend serves all levels."""
    differentiable = needs_formula(term.foreground_weight, term.background_weight)
    return ops.backend_for_levels("masked_mse", students, teachers, differentiable=differentiable)


def weighted(
    student: Features, teacher: Features, mask: Features, *, one_pass: OnePass = "auto", **keywords: Any
) -> Tensor | Plan:
    """:func:`masked_mse_loss` times `loss_weight`, which the keywords may have too; maybe still a plan."""
    check_one_pass(one_pass)
    students, teachers, term = check(student, teacher, mask, **keywords)
    backend = backend_of(students, teachers, term)
    if takes_one_pass(one_pass, OP, backend, students, "masked_mse"):
        return plan(backend, students, teachers, masked_mse=term)
    return two_passes(backend, students, teachers, term)


def masked_mse_loss(
    student: Features,
    teacher: Features,
    mask: Features,
    *,
    foreground_weight: Scalar = 1.0,
    background_weight: Scalar = 1.0,
    normalizer: str = "elements",
    level_reduction: str = "mean",
    one_pass: OnePass = "auto",
) -> Tensor:
    r"""Squared difference of features in two regions, each divided by twice its own size.

    .. math::
        L = \operatorname{reduce}_l \Big[
            \frac{w_f}{\max(1, 2 n_f)} \sum_{n,c,h,w} M_{nhw} (S_{nchw} - T_{nchw})^2 +
            \frac{w_b}{\max(1, 2 n_b)} \sum_{n,c,h,w} (1 - M_{nhw}) (S_{nchw} - T_{nchw})^2 \Big]

    with :math:`n_f = C \sum M` and :math:`n_b = C \sum (1 - M)` over the batch (``normalizer="elements"``).

    Args:
        student: features (N, C, H, W), or a list, tuple or dict of pyramid levels. float32, bfloat16, float16, float64.
        teacher: the same shapes; a constant. Alike in dtype or float32 for the compiled kernels; else the formula
            serves.
        mask: (N, H, W) per level, bool or real in [0, 1]; dicts are matched by key. See :mod:`kdkernels.masks`.
        foreground_weight, background_weight: a number, or a 0-d float32 tensor that is read on the device. A background
            weight of 0 switches the background off (FGFI and TADF have none).
        normalizer: what a region's sum is divided by, beside the 2: ``"elements"`` (pixels x channels over the batch:
            DeFeat's code), ``"pixels"`` (pixels over the batch: FGFI's code) or ``"batch"`` (N).
        level_reduction: ``"mean"`` (levels with an empty region count: DeFeat) or ``"sum"``.
        one_pass: whether the forward forms the gradient too, see :mod:`kdkernels.losses.one_pass`: True, False, or
            ``"auto"``: where it can (float32 or bfloat16, not in a compiled graph, compiled kernels).

    Returns:
        A 0-d float32 tensor (float64 where either side is). The gradient has each student level's dtype and memory
        format: :math:`2 (S - T) [w_f M / \max(1, 2 n_f) + w_b (1 - M) / \max(1, 2 n_b)]`, divided by the number of
            levels for "mean".

    Edge cases: no foreground, no background, empty levels: that term is 0, with a graph. NaN or infinity in a feature
    reaches the loss even where the mask is 0, as in the formula.

    Raises:
        TypeError, ValueError: shapes, dtypes, devices or numbers of levels that do not fit; a teacher or mask that
            requires a gradient; mask values outside [0, 1] (seen on the CPU, in eager mode).
        RuntimeError: one_pass=True where it cannot be had.

    Sources: Guo et al. 2021 (DeFeat), eq. 5; Wang et al. 2019 (FGFI); Li et al. 2017 (Mimic, with a mask of ones).
    """
    return value(
        weighted(
            student,
            teacher,
            mask,
            foreground_weight=foreground_weight,
            background_weight=background_weight,
            normalizer=normalizer,
            level_reduction=level_reduction,
            one_pass=one_pass,
        )
    )


class MaskedMSELoss(LossModule):
    """:func:`masked_mse_loss` as a module: the same keywords, and ``loss_weight``, which multiplies the result."""

    function = staticmethod(masked_mse_loss)
    weighted = staticmethod(weighted)
