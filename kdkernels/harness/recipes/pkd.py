"""PKD: Cao et al., General Distillation Framework for Object Detectors via Pearson Correlation Coefficient, NeurIPS
2022, equations 3 to 5.

Pearson-normalised features of the first four levels of the pyramid. Published weights: 6 for two-stage students, 10 for
one-stage ones. Student and teacher may be of different kinds: levels of equal stride are compared, and where their
grids differ in size the student's is resized. Without an adapter channels must agree, as in the paper.

Keys: ``weight`` (none: 6 or 10 by the student's kind), ``levels``, ``adapter``. The paper's neck swap, the teacher's
neck in the student and frozen, is ``--inherit fpn --freeze fpn``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..step import Step
from .recipe import Recipe, Setup


@dataclass(frozen=True)
class Options:
    weight: float | None = None
    levels: int = 4
    adapter: Literal[True, False, "auto"] = False


class PKD(Recipe):
    name = "pkd"
    Options = Options
    scenes = {"weight": 2.0, "levels": 5}

    def __init__(self, options: Options, setup: Setup) -> None:
        super().__init__(options, setup)
        if options.levels < 1:
            raise ValueError(f"pkd: levels: expected at least 1, got {options.levels}")
        self.pairs = setup.pairs()
        self.neck_adapter = self.adapter(self.pairs, options.adapter)
        weight = options.weight
        if weight is None:
            weight = 6.0 if hasattr(setup.student, "head") else 10.0
        self.terms["pearson"] = {"loss_weight": weight, "levels": [pair.name for pair in self.pairs[: options.levels]]}

    def inputs(self, step: Step) -> dict[str, Any]:
        matching = step.matching(self.pairs, self.neck_adapter)
        return {"student_features": matching.student, "teacher_features": matching.teacher}
