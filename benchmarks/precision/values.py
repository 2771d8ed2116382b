"""What a case of the page on numerics is, and the values that cases are made of.

A case makes its numbers in float64 and rounds them to the dtype last, so the exact answer is that of the very numbers
that everybody is given. Its seed comes from its name.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

INF = float("inf")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Sides = Callable[[Generator, Sequence[int], torch.dtype], tuple[Tensor, Tensor]]  # float64: student, teacher
More = Callable[[Generator, Sequence[int]], tuple[Any, ...]]  # what a loss takes after student and teacher


@dataclass(frozen=True)
class Case:
    """One kind of input. `keywords` are our function's; `constants` are set in the eager formula's file for the call.

    `large` ones are left to the CPU's kernels: emulators would take minutes.
    """

    loss: str
    name: str
    what: str
    shape: Sequence[int]
    sides: Sides
    more: More
    keywords: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    large: bool = False

    def inputs(self, dtype: str) -> tuple[Any, ...]:
        """Student, teacher and the rest, the first two rounded to the dtype."""
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.loss} {self.name}".encode()))
        student, teacher = self.sides(generator, self.shape, DTYPES[dtype])
        more = self.more(generator, self.shape)
        if self.loss == "bounded_regression":  # sides are errors about a target that is rounded like them
            (target,) = more
            student, teacher, more = student + target, teacher + target, (target.to(DTYPES[dtype]),)
        return student.to(DTYPES[dtype]), teacher.to(DTYPES[dtype]), *more


def normal(g: Generator, shape: Sequence[int], scale: float = 1.0, mean: float = 0.0) -> Tensor:
    return mean + scale * torch.randn(tuple(shape), generator=g, dtype=torch.float64)


def independent(scale: float) -> Sides:
    return lambda g, shape, dtype: (normal(g, shape, scale), normal(g, shape, scale))


STANDARD = independent(1.0)


def ordinary(g: Generator, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Logits of a student, and of a teacher who agrees by half and is surer."""
    student = normal(g, shape, 2.0)
    return student, student + normal(g, shape, 2.0)


def offset(g: Generator, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    spread = max(2.0, 2e3 * torch.finfo(dtype).eps)  # else rounding leaves one value
    return normal(g, shape, spread, 1e3), normal(g, shape, spread, -1e3)


def close(g: Generator, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    teacher = normal(g, shape, 2.0)
    return teacher + max(1e-4, 4 * torch.finfo(dtype).eps) * normal(g, shape), teacher


def huge(g: Generator, shape: Sequence[int], dtype: torch.dtype, most: float = 1e30) -> tuple[Tensor, Tensor]:
    most = min(most, 6e4 if dtype == torch.float16 else INF)
    return tuple(normal(g, shape).clamp(-3, 3) * most / 3 for _ in range(2))  # type: ignore[return-value]


def largest(g: Generator, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return tuple(normal(g, shape).sign() * torch.finfo(dtype).max for _ in range(2))  # type: ignore[return-value]


def changed(change: Callable[[Tensor, Tensor], None], sides: Sides = ordinary) -> Sides:
    """Sides whose elements `change` overwrites in place."""

    def make(g: Generator, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        student, teacher = sides(g, shape, dtype)
        change(student, teacher)
        return student, teacher

    return make


def one_hot(student: Tensor, teacher: Tensor) -> None:
    teacher.zero_()[:, 3] = 400.0


def ruled_out(*sides: int, value: float = -INF) -> Callable[[Tensor, Tensor], None]:
    def change(*both: Tensor) -> None:
        for side in sides:
            both[side][:, 1::5] = value

    return change


def certain(*sides: int) -> Callable[[Tensor, Tensor], None]:
    def change(*both: Tensor) -> None:
        for side in sides:
            both[side][:, 1::5], both[side][:, 2::5] = -INF, INF

    return change


def empty_rows(student: Tensor, teacher: Tensor) -> None:
    student[0], teacher[1], student[2], teacher[2] = -INF, -INF, -INF, -INF


def nearly_constant(g: Generator, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    spread = max(1e-2, 2e3 * torch.finfo(dtype).eps)
    return tuple(normal(g, shape, spread, 1e3) for _ in range(2))  # type: ignore[return-value]


def constant(*sides: int) -> Callable[[Tensor, Tensor], None]:
    def change(*both: Tensor) -> None:
        for side in sides:
            both[side][:, ::2] = 0.3

    return change


def outlier(student: Tensor, teacher: Tensor) -> None:
    student[0, :, 0, 0], teacher[0, :, 0, 0] = 1e3, -1e3


def deltas(g: Generator, shape: Sequence[int], dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Errors: the teacher is clearly better in half of the rows, clearly worse in the others. Ties are luck."""
    student = normal(g, shape, scale)
    better = torch.rand((*shape[:-1], 1), generator=g) < 0.5
    return student, student * torch.where(better, 0.5, 1.5)
