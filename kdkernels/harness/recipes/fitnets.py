"""FitNets: Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, equation 3 (stage 1).

Hints first: for the first steps the student learns nothing but its guided layers, half the squared difference to the
teacher's through a regressor; then the detector's own losses alone. The paper sums over a picture's elements; here it
is the mean, as in the papers after it, so that the size of a picture does not matter. Other recipes wait for the first
stage to end: the paper's second stage, with the teacher's class probabilities, is this recipe together with ``hinton``.

Keys: ``weight``, ``hint_steps`` or ``hint_epochs`` (none: a quarter of the steps), ``level`` (of the pairs, from 0;
none: all), ``adapter``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..step import Step
from .recipe import Recipe, Setup


@dataclass(frozen=True)
class Options:
    weight: float = 1.0
    hint_steps: int | None = None
    hint_epochs: int | None = None
    level: int | None = None
    adapter: Literal[True, False, "auto"] = True


class FitNets(Recipe):
    name = "fitnets"
    Options = Options

    def __init__(self, options: Options, setup: Setup) -> None:
        super().__init__(options, setup)
        if options.hint_steps is not None and options.hint_epochs is not None:
            raise ValueError("fitnets: hint_steps and hint_epochs say the same thing; give one of them")
        for key in ("hint_steps", "hint_epochs"):
            value = getattr(options, key)
            if value is not None and value < 1:
                raise ValueError(f"fitnets: {key}: expected at least 1, got {value}")
        pairs = setup.pairs()
        if options.level is not None and not 0 <= options.level < len(pairs):
            raise ValueError(f"fitnets: level: expected 0 to {len(pairs) - 1}, got {options.level}")
        self.pairs = pairs if options.level is None else [pairs[options.level]]
        self.neck_adapter = self.adapter(self.pairs, options.adapter)
        self.terms["masked_mse"] = {"foreground_weight": options.weight, "background_weight": 0.0}

    def hints(self, step: Step) -> bool:
        """Whether a step is one of the first stage."""
        options = self.options
        if options.hint_steps is not None:
            return step.index < options.hint_steps
        if options.hint_epochs is not None:
            return step.index < options.hint_epochs * step.epoch_steps
        return step.index < max(1, step.steps // 4)

    def exclusive(self, step: Step) -> bool:
        return self.hints(step)

    def factor(self, step: Step) -> float:
        return float(self.hints(step))

    def task_weight(self, loss: str, step: Step) -> float:
        return float(not self.hints(step))

    def inputs(self, step: Step) -> dict[str, Any]:
        return step.masked(self.pairs, self.neck_adapter, "all")
