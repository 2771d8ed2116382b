"""FGFI: Wang et al., Distilling Object Detectors with Fine-grained Feature Imitation, CVPR 2019, equations 1 to 3.

Masked MSE near the objects: cells with an anchor that overlaps an object by more than half of its best overlap.
Divided by twice the number of cells, as in its code. Published weight .01; adapters are 3 x 3 convolutions with a ReLU
that begin small. The anchors are the teacher's: both detectors need anchors of the same kind to mean the same.

Keys: ``weight``, ``threshold``, ``adapter``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..step import Step
from .recipe import Recipe, Setup


@dataclass(frozen=True)
class Options:
    weight: float = 0.01
    threshold: float = 0.5
    adapter: Literal[True, False, "auto"] = True


class FGFI(Recipe):
    name = "fgfi"
    Options = Options
    scenes = {"adapter": "auto"}

    def __init__(self, options: Options, setup: Setup) -> None:
        super().__init__(options, setup)
        if not hasattr(setup.teacher, "anchors"):
            raise ValueError(
                f"fgfi: its masks are drawn by anchors, and the teacher ({type(setup.teacher).__name__}) has none"
            )
        self.pairs = setup.pairs()
        self.neck_adapter = self.adapter(self.pairs, options.adapter, kernel_size=3, relu=True, init="small")
        self.terms["masked_mse"] = {
            "foreground_weight": options.weight,
            "background_weight": 0.0,
            "normalizer": "pixels",
        }

    def inputs(self, step: Step) -> dict[str, Any]:
        return step.masked(self.pairs, self.neck_adapter, "fine", self.options.threshold)
