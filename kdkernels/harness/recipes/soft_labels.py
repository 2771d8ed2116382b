"""Pictures without labels, taught by the teacher alone: Bucila, Caruana and Niculescu-Mizil, Model Compression, KDD
2006; Mehta and Ozturk, Object detection at 200 Frames Per Second, ECCV workshops 2018, section 3.3.

Each step takes a second batch, from ``--unlabeled-path``. On it the student learns the teacher's class probabilities
(cross-entropy; of sigmoid heads the KL of each class) and box deltas (smooth L1 where the teacher sees an object): of
two stages, on the teacher's proposals and on the RPN's anchors; of one stage, on all anchors, divided by the sum of the
teacher's objectness (``objectness.py``), at least 1. The batch with labels is not touched by this recipe.

Keys: ``weight``, ``boxes`` (on top of it).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import kdkernels as kd

from ..step import Step, head_kind
from .objectness import objectness
from .recipe import Recipe, Setup


@dataclass(frozen=True)
class Options:
    weight: float = 1.0
    boxes: float = 1.0


class SoftLabels(Recipe):
    name = "soft-labels"
    Options = Options
    needs_unlabeled = True

    def __init__(self, options: Options, setup: Setup) -> None:
        super().__init__(options, setup)
        if not setup.unlabeled:
            raise ValueError("soft-labels: needs pictures without labels; name their folder with --unlabeled-path")
        self.kind = head_kind(setup.student, setup.teacher)
        self.softmax = setup.logits[0] == "softmax"
        self.terms["soft_cross_entropy" if self.softmax else "binary_kl"] = {
            "reduction": "sum",
            "loss_weight": options.weight,
        }
        self.terms["bounded_regression"] = {
            "smooth_l1_weight": options.weight * options.boxes,
            "bound_weight": 0.0,
            "reduction": "sum",
        }

    def factor(self, step: Step) -> float:
        return float(step.unlabeled)

    def inputs(self, step: Step) -> dict[str, Any]:
        if self.kind == "proposals":
            rows = step.rows(labels="teacher")
            share = 1 / max(1, len(rows.labels))
            logits = (rows.student_logits, rows.teacher_logits)
            deltas = (rows.student_deltas, rows.teacher_deltas)
            weights = (
                torch.full_like(rows.labels, share, dtype=torch.float32),
                rows.foreground * share,
            )
        else:
            mine, theirs = step.dense()
            logits, deltas = ([x.flatten(0, 1) for x in pair] for pair in zip(mine[:2], theirs[:2], strict=True))
            sure = objectness(theirs).flatten()
            average = sure.sum().clamp(min=1)
            weights = ((1 / average).expand_as(sure).contiguous(), sure / average)
        return {
            "student_logits": logits[0],
            "teacher_logits": logits[1],
            "row_weight": weights[0],
            "student_deltas": deltas[0],
            "teacher_deltas": deltas[1],
            "target_deltas": deltas[1],
            "delta_weight": weights[1],
        }

    def extra(self, step: Step) -> dict[str, Tensor]:
        if self.kind != "proposals":
            return {}
        mine, theirs = step.dense()
        rows = [x.flatten(0, 1) for x in (mine.logits, theirs.logits, mine.deltas, theirs.deltas)]
        sure = objectness(theirs).flatten()
        average = sure.sum().clamp(min=1)
        boxes = kd.bounded_regression_loss(rows[2], rows[3], rows[3], bound_weight=0.0, weight=sure, avg_factor=average)
        return {
            "rpn_classes": self.options.weight * kd.binary_kl_loss(rows[0], rows[1], avg_factor=average),
            "rpn_boxes": self.options.weight * self.options.boxes * boxes,
        }
