"""The library's whole objective: PKD and DeFeat on the pyramid, DeFeat's KL and Chen et al.'s bound on the heads.

Four losses for one read of the features. Published weights are the papers' own: ``pkd.py``, ``defeat.py``,
``chen2017.py`` (nu .5). For small scenes and AdamW they do worse than no distillation, as Adam hardly sees the scale of
a loss and a large feature term crowds out the task: hence the preset ``scenes``. Proposals are a matter of two stages:
between other detectors the features are what remains.

Keys: ``pearson``, ``mse_foreground``, ``mse_background``, ``kl_foreground``, ``kl_background``,
``foreground_temperature``, ``background_temperature``, ``bound``, ``margin``, ``adapter``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..step import Step
from .recipe import Recipe, Setup


@dataclass(frozen=True)
class Options:
    pearson: float = 6.0
    mse_foreground: float = 4.0
    mse_background: float = 16.0
    kl_foreground: float = 0.05
    kl_background: float = 2.0
    foreground_temperature: float = 3.0
    background_temperature: float = 1.0
    bound: float = 0.5
    margin: float = 0.0
    adapter: Literal[True, False, "auto"] = "auto"


class Combined(Recipe):
    name = "combined"
    Options = Options
    scenes = {
        "pearson": 2.0,
        "mse_foreground": 0.5,
        "mse_background": 0.5,
        "kl_foreground": 1.0,
        "kl_background": 1.0,
        "foreground_temperature": 2.0,
    }

    def __init__(self, options: Options, setup: Setup) -> None:
        super().__init__(options, setup)
        self.pairs = setup.pairs()
        self.neck_adapter = self.adapter(self.pairs, options.adapter)
        self.terms |= {
            "pearson": {"loss_weight": options.pearson},
            "masked_mse": {"foreground_weight": options.mse_foreground, "background_weight": options.mse_background},
        }
        self.head = hasattr(setup.student, "head") and hasattr(setup.teacher, "head")
        if self.head:
            self.terms |= {
                "decoupled_kl": {
                    "foreground_weight": options.kl_foreground,
                    "background_weight": options.kl_background,
                    "foreground_temperature": options.foreground_temperature,
                    "background_temperature": options.background_temperature,
                },
                # Smooth L1 is already among the detector's own losses. The divisor stays the number of all rows, as in
                # torchvision's box loss.
                "bounded_regression": {
                    "margin": options.margin,
                    "bound_weight": options.bound,
                    "smooth_l1_weight": 0.0,
                    "gate": "row",
                },
            }

    def inputs(self, step: Step) -> dict[str, Any]:
        features = step.masked(self.pairs, self.neck_adapter, "gt")
        return features | step.heads() if self.head else features
