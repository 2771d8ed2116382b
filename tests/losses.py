"""The seven losses in one table, with simple inputs, so that each promise is tested for all of them alike.

`LOSSES[name].inputs(size, dtype, variant)` gives a callable of the student's levels. A new loss is one `Loss` more.
Sizes are "small", "wide" (long rows or planes, past every block size) and "many" (levels or leading dimensions).
Variants are "numbers" (each keyword away from its default), "tensors" (weights as 0-d tensors, and one value per row)
and "rows" (reduction="none"; features have none and take "numbers").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels as kd

VARIANTS = ("numbers", "tensors", "rows")
SIZES = ("small", "wide", "many")
_LEVELS: dict[str, list[tuple[int, ...]]] = {
    "small": [(2, 3, 5, 7), (2, 4, 2, 3)],
    "wide": [(2, 5, 61, 71)],
    "many": [(2, 3, 17 - i, 9 + i) for i in range(12)],
}
_ROWS: dict[str, tuple[int, ...]] = {"small": (7, 11), "wide": (5, 4999), "many": (2, 3, 211, 17)}
_BOXES: dict[str, tuple[int, ...]] = {"small": (7, 4), "wide": (9001, 4), "many": (2, 3, 211, 4)}


@dataclass
class Inputs:
    """A loss with everything but the student's levels."""

    function: Callable[..., Tensor]
    students: list[Tensor]
    others: list[Any]
    keywords: dict[str, Any] = field(default_factory=dict)
    listed: bool = False

    def student(self, *students: Tensor) -> Any:
        """The levels as the function takes them."""
        return list(students) if self.listed else students[0]

    def __call__(self, *students: Tensor) -> Tensor:
        return self.function(self.student(*students), *self.others, **self.keywords)

    def leaves(self) -> list[Tensor]:
        """Fresh leaves of the student's levels, which keep their layout."""
        return [s.detach().clone().requires_grad_() for s in self.students]

    def to_layout(self, layout: Callable[[Tensor], Tensor]) -> Inputs:
        """The same values with student and teacher laid out otherwise."""
        teacher = [layout(t) for t in self.others[0]] if self.listed else layout(self.others[0])
        students = [layout(s) for s in self.students]
        return Inputs(self.function, students, [teacher, *self.others[1:]], self.keywords, self.listed)


@dataclass(frozen=True)
class Loss:
    """A loss: its function, its module, and its inputs."""

    name: str
    function: Callable[..., Tensor]
    module: type
    features: bool
    make: Callable[[Any, torch.dtype, str], tuple[Any, list[Any], dict[str, Any]]]
    sizes: dict[str, Any]
    scalars: tuple[str, ...]  # keywords that take a number or a 0-d tensor

    def inputs(self, size: str = "small", dtype: torch.dtype = torch.float32, variant: str = "numbers") -> Inputs:
        torch.manual_seed(3)
        student, others, keywords = self.make(self.sizes[size], dtype, variant)
        if variant == "tensors":
            keywords.update({k: torch.tensor(float(keywords[k])) for k in self.scalars})
        if self.features:
            return Inputs(self.function, student, others, keywords, listed=True)
        if variant == "tensors":
            keywords["weight"] = torch.rand(student.shape[:-1]) + 0.5
        if variant == "rows":
            keywords["reduction"] = "none"
            keywords.pop("avg_factor", None)
        return Inputs(self.function, [student], others, keywords)


def _levels(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.randn(s, dtype=dtype) for s in shapes], [torch.randn(s, dtype=dtype) for s in shapes]


def _masked_mse(shapes, dtype, variant):
    students, teachers = _levels(shapes, dtype)
    masks = [torch.rand(n, h, w) for n, _, h, w in shapes]
    return students, [teachers, masks], {"foreground_weight": 1.5, "background_weight": 0.25}


def _pearson(shapes, dtype, variant):
    students, teachers = _levels(shapes, dtype)
    return students, [teachers], {"level_reduction": "mean", "eps": 1e-5}


def _logits(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return 3 * torch.randn(shape, dtype=dtype), 3 * torch.randn(shape, dtype=dtype)


def _kl(shape, dtype, variant):
    student, teacher = _logits(shape, dtype)
    return student, [teacher], {"temperature": 2.5, "avg_factor": 5.0, "reduction": "mean"}


def _decoupled(shape, dtype, variant):
    student, teacher = _logits(shape, dtype)
    keywords = {"foreground_weight": 0.5, "background_weight": 2.0, "foreground_temperature": 3.0}
    return student, [teacher, torch.rand(shape[:-1]) < 0.4], keywords


def _soft(shape, dtype, variant):
    student, teacher = _logits(shape, dtype)
    target = torch.randint(0, shape[-1], shape[:-1])
    target.view(-1)[::5] = -100
    keywords = {"class_weight": torch.rand(shape[-1]) + 0.5, "temperature": 2.0, "target": target}
    return student, [teacher], {**keywords, "hard_weight": 0.3, "avg_factor": 5.0}


def _bounded(shape, dtype, variant):
    student, teacher, target = (torch.randn(shape, dtype=dtype) for _ in range(3))
    keywords = {"margin": 0.1, "bound_weight": 0.7, "smooth_l1_weight": 1.3, "beta": 0.8, "avg_factor": 5.0}
    return student, [teacher, target], keywords


_WEIGHTS = ("foreground_weight", "background_weight")
LOSSES: dict[str, Loss] = {
    loss.name: loss
    for loss in (
        Loss("masked_mse", kd.masked_mse_loss, kd.MaskedMSELoss, True, _masked_mse, _LEVELS, _WEIGHTS),
        Loss("pearson", kd.pearson_loss, kd.PearsonLoss, True, _pearson, _LEVELS, ()),
        Loss("temperature_kl", kd.temperature_kl_loss, kd.TemperatureKLLoss, False, _kl, _ROWS, ("avg_factor",)),
        Loss("binary_kl", kd.binary_kl_loss, kd.BinaryKLLoss, False, _kl, _ROWS, ("avg_factor",)),
        Loss("decoupled_kl", kd.decoupled_kl_loss, kd.DecoupledKLLoss, False, _decoupled, _ROWS, _WEIGHTS),
        Loss(
            "soft_cross_entropy",
            kd.soft_cross_entropy_loss,
            kd.SoftCrossEntropyLoss,
            False,
            _soft,
            _ROWS,
            ("hard_weight", "avg_factor"),
        ),
        Loss(
            "bounded_regression",
            kd.bounded_regression_loss,
            kd.BoundedRegressionLoss,
            False,
            _bounded,
            _BOXES,
            ("bound_weight", "smooth_l1_weight", "avg_factor"),
        ),
    )
}
FEATURES = [name for name, loss in LOSSES.items() if loss.features]
ROWS = [name for name, loss in LOSSES.items() if not loss.features]


def loss_and_gradients(inputs: Inputs, upstream: float = 1.0) -> tuple[Tensor, list[Tensor]]:
    """The loss and the levels' gradients; `upstream` times a ramp where there is one loss per row."""
    students = inputs.leaves()
    loss = inputs(*students)
    ramp = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape) if loss.dim() else 1.0
    loss.backward(torch.full_like(loss, upstream) * ramp)
    return loss.detach(), [s.grad for s in students]


class OpCalls(TorchDispatchMode):
    """Records each call of an op of this library: (op, arguments, outputs)."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.namespace == "kdkernels":
            constants = pytree.tree_map_only(Tensor, Tensor.detach, args)
            self.calls.append((func, constants, result))
        return result


def in_form(inputs: Inputs, one_pass: bool) -> Inputs:
    """The same call with its form chosen."""
    return replace(inputs, keywords={**inputs.keywords, "one_pass": one_pass})


def op_calls(inputs: Inputs, one_pass: bool = False) -> list[tuple[Any, tuple[Any, ...], Any]]:
    """The ops that forward and backward call, with the arguments that the loss gives them: two in two passes."""
    with OpCalls() as recorded:
        loss_and_gradients(in_form(inputs, one_pass), 0.75)
    return recorded.calls
