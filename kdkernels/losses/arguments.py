"""Argument checks that the losses share. Each raises TypeError or ValueError that names the argument and what was
wrong.

All of them look at shapes, dtypes and devices only: nothing here reads a tensor on the host, except the mask's range
on the CPU, where that synchronises nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Features = Tensor | Sequence[Tensor] | Mapping[Any, Tensor]
Scalar = float | Tensor

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


# csrc/arguments.h: RowReduction. What "mean" divides by depends on the loss.
NONE, SUM, MEAN_OF_ROWS, MEAN_OF_ELEMENTS = range(4)


def arithmetic_dtype(student: Tensor) -> torch.dtype:
    """What a kernel computes, and returns its loss, in: float32, or float64 for a float64 student."""
    return torch.float64 if student.dtype == torch.float64 else torch.float32


def in_arithmetic(x: Tensor | None, student: Tensor) -> Tensor | None:
    """A small operand (a mask, a weight) as kernels read it: contiguous, in the dtype of the arithmetic."""
    return None if x is None else x.to(arithmetic_dtype(student)).contiguous()


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def check_float(name: str, x: Any) -> Tensor:
    """A floating-point tensor, or TypeError."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {x.dtype}")
    if x.layout != torch.strided or x.is_nested:
        raise TypeError(f"{name}: expected a dense tensor, got layout {'nested' if x.is_nested else x.layout}")
    return x


def check_pair(student: Tensor, teacher: Tensor, where: str = "") -> None:
    """Student and teacher: floating point, equal shapes, one device, no gradient asked of the teacher."""
    check_float(f"student{where}", student)
    check_float(f"teacher{where}", teacher)
    if teacher.requires_grad:
        raise ValueError(f"teacher{where}: it requires a gradient, but the teacher is a constant here: detach it")
    if student.shape != teacher.shape:
        raise ValueError(f"student{where} and teacher{where} differ in shape: {_shape(student)} and {_shape(teacher)}")
    check_device(f"teacher{where}", teacher, student)


def check_device(name: str, x: Tensor, student: Tensor) -> None:
    """`x` on the student's device."""
    if x.device != student.device:
        raise ValueError(f"{name}: on {x.device}, but student is on {student.device}")


def feature_levels(name: str, x: Features, keys: Sequence[Any] | None = None) -> list[Tensor]:
    """One tensor, or a list, tuple or dict of pyramid levels, as a list. A dict gives its values in the order
    of `keys`.
    """
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, Mapping):
        if keys is not None and set(keys) != set(x):
            raise ValueError(f"{name}: levels {list(x)} differ from student's {list(keys)}")
        return [x[key] for key in (keys if keys is not None else x)]
    if isinstance(x, (list, tuple)):
        return list(x)
    raise TypeError(f"{name}: expected a tensor or a list, tuple or dict of tensors, got {type(x).__name__}")


def check_features(student: Features, teacher: Features) -> tuple[list[Tensor], list[Tensor]]:
    """Both sides as lists of (N, C, H, W) levels that agree in number, dtype class, N and C."""
    both = isinstance(student, Mapping) and isinstance(teacher, Mapping)
    students = feature_levels("student", student)
    teachers = feature_levels("teacher", teacher, list(student) if both else None)
    if not students:
        raise ValueError("student: no levels")
    if len(students) != len(teachers):
        raise ValueError(f"student has {len(students)} levels, teacher has {len(teachers)}")
    for i, (s, t) in enumerate(zip(students, teachers)):
        for name, x in (("student", s), ("teacher", t)):
            check_float(f"{name}[{i}]", x)
            if x.dim() != 4:
                raise ValueError(f"{name}[{i}]: expected (N, C, H, W), got shape {_shape(x)}")
    return students, teachers


def check_row_weight(weight: Tensor | None, student: Tensor) -> Tensor | None:
    """One real number per row, shaped like the rows."""
    if weight is None:
        return None
    check_float("weight", weight)
    if weight.shape != student.shape[:-1]:
        raise ValueError(f"weight: expected one value per row, {_shape(student)[:-1]}, got {_shape(weight)}")
    check_device("weight", weight, student)
    return weight


def check_logits(student: Tensor, teacher: Tensor) -> None:
    """A pair of (..., C) with at least one class."""
    check_pair(student, teacher)
    if student.dim() < 1:
        raise ValueError("student: expected (..., C), got a 0-d tensor")
    if student.shape[-1] == 0:
        raise ValueError(f"student: no classes, shape {_shape(student)}")


def check_scalar(name: str, x: Scalar | None, student: Tensor) -> tuple[float, Tensor | None]:
    """A weight as (number, None) or (0.0, 0-d float32 tensor on the student's device)."""
    if isinstance(x, Tensor):
        if x.dim() != 0 or not x.dtype.is_floating_point:
            raise ValueError(f"{name}: expected a number or a 0-d float tensor, got shape {_shape(x)}, {x.dtype}")
        check_device(name, x, student)
        return 0.0, x if x.dtype == torch.float32 else x.float()
    if isinstance(x, bool) or not isinstance(x, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: expected a number or a 0-d tensor, got {type(x).__name__}")
    return float(x), None


def check_loss_weight(name: str, x: Any) -> Any:
    """What multiplies a loss: a number, or a 0-d real tensor."""
    if isinstance(x, Tensor):
        if x.dim() != 0 or x.dtype not in _FLOATS:
            raise ValueError(f"{name}: expected a number or a 0-d float tensor, got shape {_shape(x)}, {x.dtype}")
    elif isinstance(x, bool) or not isinstance(x, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: expected a number or a 0-d tensor, got {type(x).__name__}")
    return x


def check_positive(name: str, x: float) -> float:
    """A finite number above 0."""
    if isinstance(x, (bool, Tensor)) or not isinstance(x, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}")
    if not 0 < x < float("inf"):
        raise ValueError(f"{name}: expected a finite number above 0, got {x}")
    return float(x)


def check_number(name: str, x: float) -> float:
    """A finite number."""
    if isinstance(x, (bool, Tensor)) or not isinstance(x, (int, float, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{name}: expected a number, got {type(x).__name__}")
    if not float("-inf") < x < float("inf"):
        raise ValueError(f"{name}: expected a finite number, got {x}")
    return float(x)


def check_choice(name: str, x: str | None, choices: Sequence[str | None]) -> Any:
    """One of `choices`."""
    if x not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {x!r}")
    return x


def check_average(avg_factor: Scalar | None, reduction: str, student: Tensor) -> tuple[float | None, Tensor | None]:
    """`avg_factor` replaces the divisor of a mean; other reductions have none. As (number, None) or (None, tensor)."""
    if avg_factor is None:
        return None, None
    if reduction in ("none", "sum"):
        raise ValueError(f"avg_factor: reduction={reduction!r} divides by nothing, so it cannot be used")
    number, tensor = check_scalar("avg_factor", avg_factor, student)
    return (number, None) if tensor is None else (None, tensor)


def needs_formula(*tensors: Tensor | Scalar | None) -> bool:
    """Whether a weight asks for a gradient: kernels give one to the student alone."""
    return any(isinstance(x, Tensor) and x.requires_grad for x in tensors)
