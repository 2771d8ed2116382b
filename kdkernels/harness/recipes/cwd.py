"""CWD: Shu et al., Channel-wise Knowledge Distillation for Dense Prediction, ICCV 2021, equations 3 and 4.

The softmax of each channel over its positions, as rows of a temperature KL: tau^2 / (N C) times the sum, of each level.
Published weight 10 (its code's port for detectors, each level) at temperature 1. Adapters where channels differ.

Keys: ``weight``, ``temperature``, ``adapter``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

import kdkernels as kd

from ..step import Step
from .recipe import Recipe, Setup


@dataclass(frozen=True)
class Options:
    weight: float = 10.0
    temperature: float = 1.0
    adapter: Literal[True, False, "auto"] = "auto"


class CWD(Recipe):
    name = "cwd"
    Options = Options
    scenes = {"weight": 1.0}

    def __init__(self, options: Options, setup: Setup) -> None:
        super().__init__(options, setup)
        if not options.temperature > 0:
            raise ValueError(f"cwd: temperature: expected a positive number, got {options.temperature}")
        self.pairs = setup.pairs()
        self.neck_adapter = self.adapter(self.pairs, options.adapter)

    def extra(self, step: Step) -> dict[str, Tensor]:
        matching = step.matching(self.pairs, self.neck_adapter)
        how = {"temperature": self.options.temperature, "reduction": "batchmean"}
        levels = (
            kd.temperature_kl_loss(student.flatten(2), matching.teacher[name].flatten(2), **how)
            for name, student in matching.student.items()
        )
        return {"channels": self.options.weight * sum(levels)}
