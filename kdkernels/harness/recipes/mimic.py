"""Mimic: Li et al., Mimicking Very Efficient Network for Object Detection, CVPR 2017, in the form that the papers after
it compare with: the whole feature map, every cell alike.

Masked MSE with a mask of ones: half the mean squared difference of a level, mean over levels. The paper has no weight
for this form; 1 here.

Keys: ``weight``, ``adapter``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..step import Step
from .recipe import Recipe, Setup


@dataclass(frozen=True)
class Options:
    weight: float = 1.0
    adapter: Literal[True, False, "auto"] = True


class Mimic(Recipe):
    name = "mimic"
    Options = Options
    scenes = {"adapter": "auto"}

    def __init__(self, options: Options, setup: Setup) -> None:
        super().__init__(options, setup)
        self.pairs = setup.pairs()
        self.neck_adapter = self.adapter(self.pairs, options.adapter)
        self.terms["masked_mse"] = {"foreground_weight": options.weight, "background_weight": 0.0}

    def inputs(self, step: Step) -> dict[str, Any]:
        return step.masked(self.pairs, self.neck_adapter, "all")
