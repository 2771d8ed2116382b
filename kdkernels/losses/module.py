"""The module form of a loss: its keywords kept, its function called."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .arguments import check_loss_weight
from .one_pass import Plan, foldable, value


class LossModule(nn.Module):
    """Keeps a loss function's keywords and calls it. Subclasses name the function in its two forms, and nothing else.

    Keywords that are tensors become buffers (they follow ``.to(device)``, and stay out of the state_dict). Keywords
    that belong to a call (a target, a row weight) may also be given to ``forward``, where they win.
    """

    function: Callable[..., Tensor]
    # The same with a loss_weight among its keywords; what it returns may still be a plan (one_pass.py).
    weighted: Callable[..., Tensor | Plan]

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
        for name, given in {**defaults, **keywords, "loss_weight": loss_weight}.items():
            if isinstance(given, torch.Tensor) and not isinstance(given, nn.Parameter):
                self.register_buffer(name, given, persistent=False)
            else:
                setattr(self, name, given)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LossModule:
        # Weights follow the module to its device, but stay as precise as they are: half a model is not half a weight.
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, x in before.items():
            moved = self._buffers[name]
            if x is not None and moved.dtype != x.dtype:
                self._buffers[name] = x.to(moved.device)
        return self

    def forward(self, student: Any, teacher: Any, *inputs: Any, **keywords: Any) -> Tensor:
        kept = {name: getattr(self, name) for name in self._names}
        check_loss_weight("loss_weight", self.loss_weight)
        call = functools.partial(type(self).weighted, student, teacher, *inputs, **{**kept, **keywords})
        first = next(iter(pytree.tree_leaves(student)), None)
        if isinstance(first, Tensor) and foldable(self.loss_weight, first):
            return value(call(loss_weight=self.loss_weight))
        return self.loss_weight * value(call())

    def extra_repr(self) -> str:
        shown = {name: getattr(self, name) for name in (*self._names, "loss_weight")}
        return ", ".join(f"{name}={value}" for name, value in shown.items())
