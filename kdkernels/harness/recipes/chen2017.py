"""Chen et al., Learning Efficient Object Detection Models with Knowledge Distillation, NIPS 2017, equations 1 to 6.

The full objective of both stages: L = L_RPN + L_RCN + gamma L_hint, each stage's L = L_cls + lambda L_reg, with
L_cls = mu hard + (1 - mu) soft, the soft part a cross-entropy whose background counts 1.5 times, and
L_reg = smooth L1 + nu bound. Published: lambda 1, gamma .5, nu .5, background weight 1.5, temperature 1; mu and the
margin are not given, .5 and 0 here. It takes the place of the detector's own four losses. The RPN's one sigmoid logit z
is the two-class softmax of [0, z]. The hint is the mean squared (or absolute) difference over all levels of the
pyramid, through an adapter that is there whether channels differ or not.

Rows are the teacher's proposals and the ground truth, and, of the RPN, ``rpn_batch`` anchors of each picture drawn at
random, up to half of them positive. Levels of the RPN that have no partner of the same stride, as a student of
half-size pictures has, are not trained by it.

Keys: ``mu``, ``lambda``, ``gamma``, ``nu``, ``margin``, ``temperature``, ``background``; the paper's ablations
``classes`` (weighted, plain, hard: without the teacher), ``boxes`` (bounded, l2: to the teacher's deltas, none) and
``hint`` (adapter, plain, none), ``hint_loss`` (l2, l1); ``rpn_batch``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import kdkernels as kd

from ..step import Step, head_kind
from .recipe import BOX_LOSSES, CLASS_LOSSES, RPN_LOSSES, Recipe, Setup


@dataclass(frozen=True)
class Options:
    mu: float = 0.5
    lambda_: float = 1.0
    gamma: float = 0.5
    nu: float = 0.5
    margin: float = 0.0
    temperature: float = 1.0
    background: float = 1.5
    classes: Literal["weighted", "plain", "hard"] = "weighted"
    boxes: Literal["bounded", "l2", "none"] = "bounded"
    hint: Literal["adapter", "plain", "none"] = "adapter"
    hint_loss: Literal["l2", "l1"] = "l2"
    rpn_batch: int = 256


class Chen2017(Recipe):
    name = "chen2017"
    Options = Options
    scenes = {"rpn_batch": 64}
    needs_dense = True

    def __init__(self, options: Options, setup: Setup) -> None:
        super().__init__(options, setup)
        if head_kind(setup.student, setup.teacher) != "proposals":
            raise ValueError("chen2017: the objective is that of two stages, and these detectors have one")
        if not 0 <= options.mu <= 1:
            raise ValueError(f"chen2017: mu: expected a number in [0, 1], got {options.mu}")
        if options.rpn_batch < 1:
            raise ValueError(f"chen2017: rpn_batch: expected at least 1, got {options.rpn_batch}")
        self.random = torch.Generator().manual_seed(setup.seed)
        self.hard = 1.0 if options.classes == "hard" else options.mu
        self.bound = options.nu if options.boxes == "bounded" else 0.0
        self.terms["soft_cross_entropy"] = self._classes(setup.logits[1])
        self.terms["bounded_regression"] = {
            "smooth_l1_weight": options.lambda_,
            "bound_weight": options.lambda_ * self.bound,
            "margin": options.margin,
        }
        self.pairs, self.hint_adapter = [], None
        if options.hint != "none":
            self.pairs = setup.pairs()
            self.hint_adapter = self.adapter(self.pairs, options.hint == "adapter")
            if options.hint_loss == "l2":  # the mean of squares is twice the masked MSE of a mask of ones
                self.terms["masked_mse"] = {"foreground_weight": 2 * options.gamma, "background_weight": 0.0}

    def _classes(self, count: int) -> dict[str, Any]:
        weight = None
        if self.options.classes == "weighted":
            weight = torch.ones(count)
            weight[0] = self.options.background
        return {"class_weight": weight, "temperature": self.options.temperature, "hard_weight": self.hard}

    def task_weight(self, loss: str, step: Step) -> float:
        return 0.0 if loss in (*CLASS_LOSSES, *BOX_LOSSES, *RPN_LOSSES) else 1.0

    def inputs(self, step: Step) -> dict[str, Any]:
        rows = step.heads(with_truth=True)
        return rows | step.masked(self.pairs, self.hint_adapter, "all") if "masked_mse" in self.terms else rows

    def extra(self, step: Step) -> dict[str, Tensor]:
        options = self.options
        found = self._rpn(step)
        if options.boxes == "l2":
            rows = step.heads(with_truth=True)
            share = _to_teacher(rows["student_deltas"], rows["teacher_deltas"], rows["delta_weight"], None)
            found["l2"] = (options.lambda_ * options.nu) * share
        if self.pairs and options.hint_loss == "l1":
            matching = step.matching(self.pairs, self.hint_adapter)
            levels = [F.l1_loss(x.float(), matching.teacher[name].float()) for name, x in matching.student.items()]
            found["hint"] = options.gamma * sum(levels) / len(levels)
        return found

    def _rpn(self, step: Step) -> dict[str, Tensor]:
        options = self.options
        mine, theirs = step.dense()
        matched = step.matched()
        labels = drawn(matched.labels, options.rpn_batch, self.random)
        flat = labels.flatten()
        student, teacher = (
            torch.stack([torch.zeros_like(x), x], dim=-1).flatten(0, 1)
            for x in (mine.logits[..., 0], theirs.logits[..., 0])
        )
        how = self._classes(2)
        if how["class_weight"] is not None:
            how["class_weight"] = how["class_weight"].to(student.device)
        count = (flat >= 0).sum().clamp(min=1).to(torch.float32)
        weight = (flat > 0).to(torch.float32)
        deltas = [x.flatten(0, 1) for x in (mine.deltas, theirs.deltas, matched.deltas)]
        found = {
            "rpn_classes": kd.soft_cross_entropy_loss(student, teacher, target=flat, ignore_index=-1, **how),
            "rpn_boxes": kd.bounded_regression_loss(
                *deltas,
                margin=options.margin,
                smooth_l1_weight=options.lambda_,
                bound_weight=options.lambda_ * self.bound,
                weight=weight,
                avg_factor=count,
            ),
        }
        if options.boxes == "l2":
            share = _to_teacher(deltas[0], deltas[1], weight, count)
            found["rpn_l2"] = (options.lambda_ * options.nu) * share
        return found


def _to_teacher(student: Tensor, teacher: Tensor, weight: Tensor, average: Tensor | None) -> Tensor:
    """The squared distance to the teacher's deltas: the bound with the teacher as target, whose gate only closes where
    there is nothing left to learn.
    """
    return kd.bounded_regression_loss(
        student, teacher, teacher, smooth_l1_weight=0.0, bound_weight=1.0, weight=weight, avg_factor=average
    )


def drawn(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Labels (N, A) of ``count`` anchors of each picture at random, up to half of them positive; -1 for the others."""
    draw = torch.rand(labels.shape, generator=generator).to(labels.device)
    positive, negative = labels > 0, labels == 0
    kept = positive & (_place(positive, draw) < count // 2)
    rest = count - kept.sum(1, keepdim=True)
    kept = kept | (negative & (_place(negative, draw) < rest))
    return torch.where(kept, labels.clamp(max=1), -1)


def _place(among: Tensor, draw: Tensor) -> Tensor:
    return torch.where(among, draw, 2.0).argsort(1).argsort(1)
