"""Ba and Caruana: Do Deep Nets Really Need to be Deep?, NIPS 2014, equation 1.

Half the squared difference of the logits, summed over classes, divided by the number of rows (``Step.class_rows`` says
which). In plain PyTorch: there is nothing to fuse.

Keys: ``weight``, ``proposals`` (teacher, student).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ..step import ClassRows, Step, head_kind
from .recipe import Recipe, Setup


@dataclass(frozen=True)
class Options:
    weight: float = 1.0
    proposals: Literal["teacher", "student"] = "teacher"


class Logits(Recipe):
    name = "logits"
    Options = Options
    scenes = {"weight": 0.05}

    def __init__(self, options: Options, setup: Setup) -> None:
        super().__init__(options, setup)
        self.needs_dense = head_kind(setup.student, setup.teacher) == "dense"

    def extra(self, step: Step) -> dict[str, Tensor]:
        rows = step.class_rows(self.options.proposals)
        return {"logits": self.options.weight * squared(rows, self.taught(rows.teacher))}

    def taught(self, logits: Tensor) -> Tensor:
        """What the teacher's logits (K, C) become before they are learnt."""
        return logits


def squared(rows: ClassRows, teacher: Tensor) -> Tensor:
    """The paper's loss towards given logits of the teacher."""
    apart = (rows.student.float() - teacher.float()).square().sum(1) / 2
    return (apart * (rows.labels >= 0)).sum() / rows.average
