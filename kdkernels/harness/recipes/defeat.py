"""DeFeat: Guo et al., Distilling Object Detectors via Decoupled Features, CVPR 2021, equations 5 to 9.

Objects and background of the features apart (masked MSE), and positive and negative proposals apart (KL). Published
weights: COCO 4 and 16 for objects and background of the neck (its code's VOC configuration: 3 and 12), .05 at
temperature 3 and 2 at temperature 1 for positive and negative proposals. The neck's adapters are 3 x 3 convolutions,
the backbone's have a ReLU; both begin small. Its code takes the proposals' labels from the student's own sampling,
whose rows are others; here they are the proposals' own.

Keys: ``neck``, ``backbone`` and ``head`` choose the parts; ``masks``, ``region``, ``proposals`` and ``rows`` are the
paper's ablations: which mask, which region, whose proposals, which of them ("subneg": as many negative ones, at random,
as there are positive ones).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

import kdkernels as kd

from ..step import Matching, Step
from .recipe import Recipe, Setup


@dataclass(frozen=True)
class Options:
    neck: bool = True
    backbone: bool = False
    head: bool = True
    foreground: float = 4.0
    background: float = 16.0
    kl_foreground: float = 0.05
    kl_background: float = 2.0
    foreground_temperature: float = 3.0
    background_temperature: float = 1.0
    masks: Literal["gt", "fine", "gaussian", "random", "all"] = "gt"
    region: Literal["both", "fg", "bg"] = "both"
    proposals: Literal["teacher", "student"] = "teacher"
    rows: Literal["all", "pos", "neg", "subneg"] = "all"
    adapter: Literal[True, False, "auto"] = True


class DeFeat(Recipe):
    name = "defeat"
    Options = Options
    scenes = {
        "foreground": 0.5,
        "background": 0.5,
        "kl_foreground": 1.0,
        "kl_background": 1.0,
        "foreground_temperature": 2.0,
        "adapter": "auto",
    }

    def __init__(self, options: Options, setup: Setup) -> None:
        super().__init__(options, setup)
        if not (options.neck or options.backbone or options.head):
            raise ValueError("defeat: one of neck, backbone and head must be true")
        if options.masks == "fine" and options.backbone:
            raise ValueError("defeat: masks=fine needs anchors, which the stages of a backbone have none of")
        # One-stage detectors have no proposals: there the paper distils features alone.
        self.head = options.head and hasattr(setup.student, "head") and hasattr(setup.teacher, "head")
        if options.head and not self.head and (options.proposals, options.rows) != ("teacher", "all"):
            raise ValueError("defeat: proposals= and rows= are for two detectors of two stages")
        if not (options.neck or options.backbone or self.head):
            raise ValueError("defeat: head=true alone needs two detectors of two stages, which have proposals")
        self.needs_stages = options.backbone
        self.random = torch.Generator().manual_seed(setup.seed)
        regions = {
            "foreground_weight": 0.0 if options.region == "bg" else options.foreground,
            "background_weight": 0.0 if options.region == "fg" else options.background,
        }
        self.regions = regions
        if options.neck:
            self.pairs = setup.pairs()
            self.neck_adapter = self.adapter(self.pairs, options.adapter, kernel_size=3, init="small")
            self.terms["masked_mse"] = regions
        if options.backbone:
            # Its code's default: without the first stage.
            self.stage_pairs = setup.pairs("stages")[-3:]
            self.stage_adapter = self.adapter(self.stage_pairs, options.adapter, kernel_size=3, relu=True, init="small")
        if self.head:
            self.terms["decoupled_kl"] = {
                "foreground_weight": 0.0 if options.rows == "neg" else options.kl_foreground,
                "background_weight": 0.0 if options.rows == "pos" else options.kl_background,
                "foreground_temperature": options.foreground_temperature,
                "background_temperature": options.background_temperature,
            }

    def inputs(self, step: Step) -> dict[str, Any]:
        given: dict[str, Any] = {}
        if self.options.neck:
            matching = step.matching(self.pairs, self.neck_adapter)
            masks = self._masks(step, matching)
            given |= {"student_features": matching.student, "teacher_features": matching.teacher, "masks": masks}
        if self.head:
            given |= step.heads(self.options.proposals)
            if self.options.rows == "subneg":
                given["row_weight"] = self._sampled(given["foreground"])
        return given

    def extra(self, step: Step) -> dict[str, Tensor]:
        if not self.options.backbone:
            return {}
        matching = step.matching(self.stage_pairs, self.stage_adapter, "stages")
        # All boxes on every stage, whatever their size.
        masks = self._masks(step, matching, assign="all")
        return {"backbone": kd.masked_mse_loss(matching.student, matching.teacher, masks, **self.regions)}

    def _masks(self, step: Step, matching: Matching, assign: str = "scale") -> dict[str, Tensor]:
        if self.options.masks != "random":
            return step.masks(matching, self.options.masks, assign)
        drawn = step.masks(matching, "gt", assign)
        return {name: random_cells(mask, self.random) for name, mask in drawn.items()}

    def _sampled(self, foreground: Tensor) -> Tensor:
        """A weight per row: of the background as many rows at random as the foreground has, at least one, which stand
        for all of it.
        """
        draw = torch.rand(foreground.shape, generator=self.random).to(foreground.device)
        place = torch.where(foreground, 2.0, draw).argsort().argsort()
        kept = ~foreground & (place < foreground.sum().clamp(min=1))
        share = (~foreground).sum() / kept.sum().clamp(min=1)
        return torch.where(foreground, 1.0, kept * share)


def random_cells(mask: Tensor, generator: torch.Generator) -> Tensor:
    """As many cells of each picture as the mask marks, at random places."""
    marked = mask.flatten(1).sum(1, keepdim=True)
    place = torch.rand(mask.flatten(1).shape, generator=generator).to(mask.device).argsort(1).argsort(1)
    return (place < marked).to(mask.dtype).view_as(mask)
