"""Hinton, Vinyals and Dean: Distilling the Knowledge in a Neural Network, 2015, section 2.

alpha times the hard labels' loss plus 1 - alpha times T^2 KL(teacher, student) of class probabilities at temperature T:
the softmax of proposals or of SSDLite's anchors; of heads with a sigmoid per class (RetinaNet, FCOS) the KL of each
class's two outcomes. The hard labels' loss is the detector's own class loss. The paper asks for a small alpha and used
temperatures from 2.5 to 20; .5 and 2 are the usual choice.

Keys: ``alpha``, ``temperature``, ``proposals`` (teacher, student).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..step import Step, head_kind
from .recipe import CLASS_LOSSES, Recipe, Setup


@dataclass(frozen=True)
class Options:
    alpha: float = 0.5
    temperature: float = 2.0
    proposals: Literal["teacher", "student"] = "teacher"


class Hinton(Recipe):
    name = "hinton"
    Options = Options

    def __init__(self, options: Options, setup: Setup) -> None:
        super().__init__(options, setup)
        self.needs_dense = head_kind(setup.student, setup.teacher) == "dense"
        if not 0 <= options.alpha <= 1:
            raise ValueError(f"hinton: alpha: expected a number in [0, 1], got {options.alpha}")
        term = "temperature_kl" if setup.logits[0] == "softmax" else "binary_kl"
        self.terms[term] = {
            "temperature": options.temperature,
            "reduction": "sum",
            "loss_weight": 1 - options.alpha,
        }

    def task_weight(self, loss: str, step: Step) -> float:
        return self.options.alpha if loss in CLASS_LOSSES else 1.0

    def inputs(self, step: Step) -> dict[str, Any]:
        rows = step.class_rows(self.options.proposals)
        weight: Tensor = (rows.labels >= 0).float() / rows.average
        return {"student_logits": rows.student, "teacher_logits": rows.teacher, "row_weight": weight}
