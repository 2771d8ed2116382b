"""The module form of a loss: its keywords kept, its function called."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class LossModule(nn.Module):
    """Keeps a loss function's keywords and calls it. Subclasses name the function and nothing else.

    Keywords that are tensors become buffers (they follow ``.to(device)``, and stay out of the state_dict). Keywords
    that belong to a call (a target, a row weight) may also be given to ``forward``, where they win.
    """

    function: Callable[..., Tensor]

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        parameters = list(inspect.signature(cls.function).parameters.values())
        keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        weight = inspect.Parameter("loss_weight", inspect.Parameter.KEYWORD_ONLY, default=1.0, annotation="Scalar")
        cls.__signature__ = inspect.Signature([*keywords, weight])

    def __init__(self, *, loss_weight: float | Tensor = 1.0, **keywords: Any):
        super().__init__()
        allowed = [name for name in type(self).__signature__.parameters if name != "loss_weight"]
        for name in keywords:
            if name not in allowed:
                raise TypeError(
                    f"{type(self).__name__}: no keyword {name!r}; expected {', '.join(allowed)}, loss_weight"
                )
        # Every keyword becomes an attribute, defaults included: a schedule that sets one later takes effect.
        defaults = {name: p.default for name, p in type(self).__signature__.parameters.items()}
        self._names = tuple(allowed)
        for name, value in {**defaults, **keywords, "loss_weight": loss_weight}.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value, persistent=False)
            else:
                setattr(self, name, value)

    def forward(self, student: Any, teacher: Any, *inputs: Any, **keywords: Any) -> Tensor:
        kept = {name: getattr(self, name) for name in self._names}
        return self.loss_weight * type(self).function(student, teacher, *inputs, **{**kept, **keywords})

    def extra_repr(self) -> str:
        shown = {name: getattr(self, name) for name in (*self._names, "loss_weight")}
        return ", ".join(f"{name}={value}" for name, value in shown.items())
