"""Sau and Balasubramanian: Deep Model Compression: Distilling Knowledge from Noisy Teachers, 2016, equations 2 and 3.

The loss of ``logits`` towards a teacher whose logits are disturbed: z' = (1 + xi) z, xi normal with deviation sigma,
drawn for each logit, in rows that are chosen with a given probability. The draws come from a generator of the recipe's
own, seeded by the run.

Keys: ``weight``, ``sigma``, ``probability``, ``proposals`` (teacher, student).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..step import Step, head_kind
from .logits import squared
from .recipe import Recipe, Setup


@dataclass(frozen=True)
class Options:
    weight: float = 1.0
    sigma: float = 0.3
    probability: float = 0.5
    proposals: Literal["teacher", "student"] = "teacher"


class NoisyTeacher(Recipe):
    name = "noisy-teacher"
    Options = Options
    scenes = {"weight": 0.05}

    def __init__(self, options: Options, setup: Setup) -> None:
        super().__init__(options, setup)
        self.needs_dense = head_kind(setup.student, setup.teacher) == "dense"
        if options.sigma < 0:
            raise ValueError(f"noisy-teacher: sigma: expected a number of at least 0, got {options.sigma}")
        if not 0 <= options.probability <= 1:
            raise ValueError(f"noisy-teacher: probability: expected a number in [0, 1], got {options.probability}")
        self.random = torch.Generator(next(setup.student.parameters()).device).manual_seed(setup.seed)

    def extra(self, step: Step) -> dict[str, Tensor]:
        rows = step.class_rows(self.options.proposals)
        return {"logits": self.options.weight * squared(rows, self.disturbed(rows.teacher))}

    def disturbed(self, logits: Tensor) -> Tensor:
        """Logits (K, C) with noise in some of their rows."""
        how = {"generator": self.random, "device": logits.device}
        draw = torch.randn(logits.shape, **how)
        chosen = torch.rand((len(logits), 1), **how) < self.options.probability
        return logits * (1 + self.options.sigma * draw * chosen).to(logits)
