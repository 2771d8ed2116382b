"""What changes over the steps of a training: the learning rate, the weight of the distillation; and the optimiser.

All of it is a function of the step alone, so that a run that goes on after step k needs no more than k.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import nn

from .settings import KdSettings, TrainSettings

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)


class Length(NamedTuple):
    """A number of steps, or of rounds through the pictures."""

    value: float
    epochs: bool

    @classmethod
    def parse(cls, text: str, *, epochs: bool = False) -> Length:
        """``"500"``, ``"500s"`` (steps) or ``"2e"`` (epochs); ``epochs`` says what a bare number is.

        Raises:
            ValueError: neither, or below 0.
        """
        unit, number = text[-1:], text[:-1]
        if unit not in ("e", "s"):
            unit, number = "e" if epochs else "s", text
        try:
            value = float(number) if unit == "e" else float(int(number))
        except ValueError:
            raise ValueError(f"expected steps, as in 500 or 500s, or epochs, as in 2e, got {text!r}") from None
        if not 0 <= value < 1e12:
            raise ValueError(f"must be at least 0, got {text!r}")
        return cls(value, unit == "e")

    def steps(self, epoch_steps: int) -> int:
        """In steps, of which ``epoch_steps`` are an epoch."""
        return round(self.value * epoch_steps) if self.epochs else int(self.value)


def warmup_steps(settings: TrainSettings) -> int:
    """Steps of the warm-up: those asked for, and at most a fifth of the run."""
    return min(settings.warmup, max(1, settings.steps // 5))


def learning_rate(step: int, settings: TrainSettings) -> float:
    """The factor on ``lr`` at ``step`` (from 0): linear warm-up, then a cosine down to ``final``, or steps down."""
    warmup = warmup_steps(settings)
    if step < warmup:
        return settings.warmup_factor + (1 - settings.warmup_factor) * ((step + 1) / warmup)
    if settings.scheduler == "multisteplr":
        return settings.lr_gamma ** sum(step >= milestone for milestone in settings.lr_steps)
    done = (step - warmup) / max(1, settings.steps - warmup)
    return settings.final + (1 - settings.final) * (1 + math.cos(math.pi * done)) / 2


def kd_weight(step: int, settings: KdSettings) -> float:
    """The factor on all of the distillation at ``step`` (from 0): 0 before ``start`` and from ``stop`` on, and linear
    over the ``warmup`` steps after ``start``.
    """
    if step < settings.start or (settings.stop is not None and step >= settings.stop):
        return 0.0
    return min(1.0, (step - settings.start + 1) / max(1, settings.warmup))


def optimizer_of(
    parameters: Iterable[nn.Parameter], detector: nn.Module, settings: TrainSettings
) -> torch.optim.Optimizer:
    """The optimiser of ``parameters``; the normalisations among ``detector``'s may have a weight decay of their own."""
    parameters = list(parameters)
    groups = [{"params": parameters}]
    if settings.norm_weight_decay is not None:
        norms = {id(p) for m in detector.modules() if isinstance(m, _NORMS) for p in m.parameters(recurse=False)}
        groups = [
            {"params": [p for p in parameters if id(p) not in norms]},
            {"params": [p for p in parameters if id(p) in norms], "weight_decay": settings.norm_weight_decay},
        ]
        groups = [group for group in groups if group["params"]]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)
