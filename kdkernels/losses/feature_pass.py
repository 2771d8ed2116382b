"""Masked MSE and Pearson on the same features in one pass: the op of the objective and of both single functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..masks import GroundTruth
from ..reference.masked_mse import masked_mse_loss
from ..reference.pearson import pearson_loss
from .arguments import Scalar, check_scalar, in_arithmetic
from .one_pass import Call, Plan, scaled

# csrc/arguments.h: FeatureValue, the columns of the op's values. A row per level, and the last for their sum.
FOREGROUND, BACKGROUND, MASKED_MSE, PEARSON, MASKED_MSE_NORM, PEARSON_NORM, COLUMNS = range(7)
NORMALIZERS = ("elements", "pixels", "batch")  # csrc/math/masked_mse.h: Normalizer

OP = "detection_distillation_features"
JOINT = "detection_distillation"  # joint_pass.py: the op that takes this pass and the heads
DRAW = "ground_truth_masks"  # ../masks.py


def _fake(student, teacher, mask, mask_of, pearson, wanted, *options):
    values = student[0].new_empty((len(student) + 1, COLUMNS), dtype=torch.float32)
    return student[0].new_empty((), dtype=torch.float32), values, [torch.empty_like(student[i]) for i in wanted]


_op = ops.define(
    OP,
    "(Tensor[] student, Tensor[] teacher, Tensor[] mask, int[] mask_of, int[] pearson, int[] wanted, "
    "float foreground_weight, Tensor? foreground_weight_tensor, float background_weight, "
    "Tensor? background_weight_tensor, int normalizer, bool masked_mse_mean, float eps, bool pearson_mean, "
    "bool zero_on_constant, float masked_mse_weight, Tensor? masked_mse_weight_tensor, float pearson_weight, "
    "Tensor? pearson_weight_tensor, bool norms) -> (Tensor, Tensor, Tensor[])",
    _fake,
)


@dataclass
class MaskedMSETerm:
    """Masked MSE's part of a pass. `levels` has its levels, in the order of `masks`, which may still be boxes."""

    levels: Sequence[int]
    masks: Sequence[Tensor]
    foreground_weight: Scalar = 1.0
    background_weight: Scalar = 1.0
    normalizer: str = "elements"
    level_reduction: str = "mean"
    loss_weight: Scalar = 1.0

    def formula(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """The unweighted term by the formula."""
        return ops.run_formula(
            masked_mse_loss,
            [students[i] for i in self.levels],
            [teachers[i] for i in self.levels],
            list(self.masks),
            foreground_weight=self.foreground_weight,
            background_weight=self.background_weight,
            normalizer=self.normalizer,
            level_reduction=self.level_reduction,
        )


@dataclass
class PearsonTerm:
    """Pearson's part of a pass."""

    levels: Sequence[int]
    eps: float = 1e-6
    level_reduction: str = "sum"
    on_constant: str = "zero"
    loss_weight: Scalar = 1.0
    copies: Sequence[Tensor] = ()  # resized or cast: nobody else keeps them

    def formula(self, students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
        """The unweighted term by the formula."""
        return ops.run_formula(
            pearson_loss,
            [students[i] for i in self.levels],
            [teachers[i] for i in self.levels],
            eps=self.eps,
            level_reduction=self.level_reduction,
            on_constant=self.on_constant,
        )


_NO_MASKED_MSE, _NO_PEARSON = MaskedMSETerm((), ()), PearsonTerm(())


def feature_pass(
    backend: str,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    wanted: Sequence[int],
    masked_mse: MaskedMSETerm | None = None,
    pearson: PearsonTerm | None = None,
    norms: bool = False,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The weighted loss, (levels + 1, COLUMNS) values, and the loss's gradients for the wanted levels."""
    return _op[backend](*_arguments(students, teachers, wanted, masked_mse, pearson, norms))


def _arguments(students, teachers, wanted, masked_mse, pearson, norms, drawn_there=False):
    m, p = masked_mse or _NO_MASKED_MSE, pearson or _NO_PEARSON
    mask_of = [-1] * len(students)
    for i, level in enumerate(m.levels):
        mask_of[level] = m.masks.places[i] if drawn_there else i
    like = students[0]
    return (
        list(students),
        list(teachers),
        [] if drawn_there else [in_arithmetic(mask, like) for mask in m.masks],
        mask_of,
        list(p.levels),
        list(wanted),
        *check_scalar("foreground_weight", m.foreground_weight, like),
        *check_scalar("background_weight", m.background_weight, like),
        NORMALIZERS.index(m.normalizer),
        m.level_reduction == "mean",
        p.eps,
        p.level_reduction == "mean",
        p.on_constant == "zero",
        *check_scalar("masked_mse.loss_weight", m.loss_weight, like),
        *check_scalar("pearson.loss_weight", p.loss_weight, like),
        norms,
    )


def plan(
    backend: str,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    masked_mse: MaskedMSETerm | None = None,
    pearson: PearsonTerm | None = None,
    norms: bool = False,
) -> Plan:
    """The pass as an autograd node to be."""
    terms = [term for term in (masked_mse, pearson) if term is not None]

    def arguments(wanted):
        return _arguments(students, teachers, wanted, masked_mse, pearson, norms)

    def formula(students, teachers):
        return sum(scaled(term.formula(students, teachers), term.loss_weight) for term in terms)

    boxes = masked_mse.masks if masked_mse and isinstance(masked_mse.masks, GroundTruth) else None
    if boxes is not None and not ops.has_kernel(JOINT, backend):
        masked_mse.masks, boxes = list(boxes), None

    def packed(wanted):
        features = _arguments(students, teachers, wanted, masked_mse, pearson, norms, drawn_there=True)
        return [(DRAW, boxes.arguments()), (OP, features)]

    operands = [*(masked_mse.masks if masked_mse and boxes is None else ()), *(pearson.copies if pearson else ())]
    operands += [] if boxes is None else [boxes.boxes]
    weights = [masked_mse.foreground_weight, masked_mse.background_weight] if masked_mse else []
    operands += [x for x in [*weights, *(term.loss_weight for term in terms)] if isinstance(x, Tensor)]
    call = Call(OP, backend, arguments, lambda values: {"features": values}, packed if boxes is not None else None)
    return Plan(backend, students, teachers, call, formula, operands)
