"""Sau and Balasubramanian: Deep Model Compression: Distilling Knowledge from Noisy Teachers, 2016, equations 2 and 3.

The loss of ``logits`` towards a teacher whose logits are disturbed: z' = (1 + xi) z, xi normal with deviation sigma,
drawn for each logit, in rows that are chosen with a given probability. The draws come from a generator of the recipe's
own, seeded by the run.

Keys: ``weight``, ``sigma``, ``probability``, ``proposals`` (teacher, student).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import logits
from .recipe import Setup


@dataclass(frozen=True)
class Options(logits.Options):
    sigma: float = 0.3
    probability: float = 0.5


class NoisyTeacher(logits.Logits):
    name = "noisy-teacher"
    Options = Options

    def __init__(self, options: Options, setup: Setup) -> None:
        super().__init__(options, setup)
        if not 0 <= options.probability <= 1:
            raise ValueError(f"noisy-teacher: probability: expected a number in [0, 1], got {options.probability}")
        self.random = torch.Generator(next(setup.student.parameters()).device).manual_seed(setup.seed)

    def taught(self, logits: Tensor) -> Tensor:
        """With noise in some of the rows."""
        how = {"generator": self.random, "device": logits.device}
        draw = torch.randn(logits.shape, **how)
        chosen = torch.rand((len(logits), 1), **how) < self.options.probability
        return logits * (1 + self.options.sigma * draw * chosen).to(logits)
