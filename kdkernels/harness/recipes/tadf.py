"""TADF: Sun et al., Distilling Object Detectors with Task Adaptive Regularization, 2020 (arXiv 2006.13108).

Masked MSE under Gaussian masks of the objects; class logits of the positive proposals (KL); box deltas where the
teacher is the better of the two. The weights of the three parts are not settled by the paper's text; 1 here. Its
decline of the weights over the training is ``decay``.

Keys: ``features``, ``classes``, ``boxes`` (weights), ``temperature``, ``decay``, ``adapter``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..step import Step
from .recipe import Recipe, Setup


@dataclass(frozen=True)
class Options:
    features: float = 1.0
    classes: float = 1.0
    boxes: float = 1.0
    temperature: float = 1.0
    decay: Literal["none", "linear"] = "linear"
    adapter: Literal[True, False, "auto"] = True


class TADF(Recipe):
    name = "tadf"
    Options = Options
    scenes = {"adapter": "auto", "boxes": 0.5}

    def __init__(self, options: Options, setup: Setup) -> None:
        super().__init__(options, setup)
        self.pairs = setup.pairs()
        self.neck_adapter = self.adapter(self.pairs, options.adapter)
        self.terms["masked_mse"] = {"foreground_weight": options.features, "background_weight": 0.0}
        # Positive proposals are a matter of two stages; of other pairs the features are what remains.
        self.head = hasattr(setup.student, "head") and hasattr(setup.teacher, "head")
        if self.head:
            self.terms["decoupled_kl"] = {
                "foreground_weight": options.classes,
                "background_weight": 0.0,
                "foreground_temperature": options.temperature,
            }
            self.terms["bounded_regression"] = {"smooth_l1_weight": 0.0, "bound_weight": options.boxes, "gate": "row"}

    def factor(self, step: Step) -> float:
        return 1 - step.index / step.steps if self.options.decay == "linear" else 1.0

    def inputs(self, step: Step) -> dict[str, Any]:
        features = step.masked(self.pairs, self.neck_adapter, "gaussian")
        return features | step.heads() if self.head else features
