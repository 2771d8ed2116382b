"""What a case is, and what the cases are made of: values that are hard for a kernel, layouts that are hard for one.

Everything comes from a seeded generator in float64 and is rounded to the tested dtype last, so that every backend and
every dtype sees the same numbers. Memory that a view skips is NaN: a kernel that reads it cannot pass.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

Pair = tuple[torch.dtype, torch.dtype]  # student's, teacher's
Inputs = tuple[list[Any], dict[str, Any]]  # positional arguments, student first; keywords
Values = Callable[[Generator, Sequence[int], Pair], tuple[Tensor, Tensor]]
Layout = Callable[[Tensor], Tensor]


PAIRS: dict[str, Pair] = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float64": (torch.float64, torch.float64),
    "bfloat16-float32": (torch.bfloat16, torch.float32),
    "float16-float32": (torch.float16, torch.float32),
    "float64-float32": (torch.float64, torch.float32),
}
ALIKE = ("float32", "bfloat16", "float16", "float64")
MIXED = ("bfloat16-float32", "float16-float32", "float64-float32")
WIDE = ("float32", "float64")
LARGE = ("float32", "bfloat16")


@dataclass(frozen=True)
class Case:
    """One call of a loss. `length` is how many values the loss sums."""

    name: str
    make: Callable[[Generator, Pair], Inputs]
    length: int
    pairs: Sequence[str] = ALIKE
    slow: bool = False

    def inputs(self, pair: str) -> Inputs:
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        return self.make(generator, PAIRS[pair])


def product(shape: Sequence[int]) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)


def scalar(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float32)


def normal(generator: Generator, shape: Sequence[int], scale: float = 1.0, mean: float = 0.0) -> Tensor:
    return mean + scale * torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


def rounded(student: Tensor, teacher: Tensor, pair: Pair) -> tuple[Tensor, Tensor]:
    return student.to(pair[0]), teacher.to(pair[1])


def plain(scale: float = 3.0) -> Values:
    """Independent normal values on both sides."""
    return lambda g, shape, pair: rounded(normal(g, shape, scale), normal(g, shape, scale), pair)


# Logits.


def spiked(g: Generator, shape: Sequence[int], pair: Pair) -> tuple[Tensor, Tensor]:
    """One 1e4 in each row of either side, at the same class in every third row."""
    sides = [normal(g, shape, 3.0) for _ in range(2)]
    columns = [torch.randint(shape[-1], (*shape[:-1], 1), generator=g) for _ in range(2)]
    columns[1][::3] = columns[0][::3]
    return rounded(*(x.scatter(-1, c, 1e4) for x, c in zip(sides, columns)), pair)


def saturated(g: Generator, shape: Sequence[int], pair: Pair) -> tuple[Tensor, Tensor]:
    return rounded(normal(g, shape).sign() * 1e3, normal(g, shape).sign() * 1e3, pair)


def constant_rows(g: Generator, shape: Sequence[int], pair: Pair) -> tuple[Tensor, Tensor]:
    """Rows of one value: every third on the student's side, every second on the teacher's."""
    student, teacher = normal(g, shape, 3.0), normal(g, shape, 3.0)
    student[::3], teacher[::2] = 2.5, -7.25
    return rounded(student, teacher, pair)


def equal(g: Generator, shape: Sequence[int], pair: Pair) -> tuple[Tensor, Tensor]:
    student = normal(g, shape, 3.0).to(pair[0])
    return student, student.to(pair[1])


def nearly_equal(g: Generator, shape: Sequence[int], pair: Pair) -> tuple[Tensor, Tensor]:
    """Apart by about a hundredth (a few units in the last place of bfloat16), whose square is what the loss is."""
    teacher = normal(g, shape, 3.0)
    return rounded(teacher * (1 + normal(g, shape, 0.03 if pair[0] == torch.bfloat16 else 0.01)), teacher, pair)


def shifted(g: Generator, shape: Sequence[int], pair: Pair) -> tuple[Tensor, Tensor]:
    return rounded(normal(g, shape, 3.0, mean=1e4), normal(g, shape, 3.0, mean=-1e4), pair)


def very_negative(g: Generator, shape: Sequence[int], pair: Pair) -> tuple[Tensor, Tensor]:
    """Far below any softmax's underflow, and spread so widely that one class takes all."""
    return rounded(normal(g, shape, 1e3, mean=-3e4), normal(g, shape, 1e3, mean=-5e4), pair)


def extreme(g: Generator, shape: Sequence[int], pair: Pair) -> tuple[Tensor, Tensor]:
    """The largest finite values of the dtype: differences overflow."""
    return tuple(normal(g, shape).sign().to(dtype) * torch.finfo(dtype).max for dtype in pair)  # type: ignore[return-value]


LOGITS: dict[str, Values] = {
    "spiked": spiked,
    "saturated": saturated,
    "constant rows": constant_rows,
    "shifted 1e4": shifted,
    "very negative": very_negative,
}


# Features, (N, C, H, W).


def large_mean(g: Generator, shape: Sequence[int], pair: Pair) -> tuple[Tensor, Tensor]:
    return rounded(normal(g, shape, 1e-2, mean=1e4), normal(g, shape, 1e-2, mean=1e4), pair)


def outlier_first(g: Generator, shape: Sequence[int], pair: Pair) -> tuple[Tensor, Tensor]:
    """The value that a shifted variance shifts by is the one that misleads it most."""
    student, teacher = normal(g, shape), normal(g, shape)
    student[0, :, 0, 0], teacher[0, :, 0, 0] = 1e3, -1e3
    return rounded(student, teacher, pair)


def small_student(g: Generator, shape: Sequence[int], pair: Pair) -> tuple[Tensor, Tensor]:
    return rounded(normal(g, shape, 1e-3), normal(g, shape), pair)


def constant_channels(*sides: int) -> Values:
    """Every second channel has one value, on the sides named (0 student, 1 teacher)."""

    def make(g: Generator, shape: Sequence[int], pair: Pair) -> tuple[Tensor, Tensor]:
        both = [normal(g, shape), normal(g, shape)]
        for side in sides:
            both[side][:, ::2] = 0.3 + side
        return rounded(*both, pair)

    return make


FEATURES: dict[str, Values] = {
    "outlier first": outlier_first,
    "scale mismatch": small_student,
    "nearly equal": nearly_equal,
    "constant student": constant_channels(0),
    "constant teacher": constant_channels(1),
    "constant both": constant_channels(0, 1),
}


# Layouts: the same values, elsewhere in memory.


def contiguous(x: Tensor) -> Tensor:
    return x


def sliced(dim: int, step: int = 1, start: int = 1) -> Layout:
    """x as ``buffer[..., start::step, ...]`` along `dim`."""

    def place(x: Tensor) -> Tensor:
        shape = list(x.shape)
        shape[dim] = start + step * shape[dim]
        index = [slice(None)] * x.dim()
        index[dim] = slice(start, None, step)
        view = torch.full(shape, float("nan"), dtype=x.dtype)[tuple(index)]
        assert view.shape == x.shape
        return view.copy_(x)

    return place


def permuted(*dims: int) -> Layout:
    """x whose memory has the dimensions in the order `dims`."""

    def place(x: Tensor) -> Tensor:
        back = [dims.index(d) for d in range(x.dim())]
        return x.permute(dims).contiguous().permute(back)

    return place


def misaligned(x: Tensor) -> Tensor:
    """Starts one element behind an aligned address."""
    return torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype)[1:].view(x.shape).copy_(x)


def expanded(*dims: int) -> Layout:
    """The first slice along `dims` stands for all of them (stride 0), in the exact answer as well."""

    def place(x: Tensor) -> Tensor:
        for dim in dims:
            x = x.narrow(dim, 0, 1)
        return x

    def spread(x: Tensor) -> Tensor:
        return place(x).clone().expand(x.shape)

    return spread


def channels_last(x: Tensor) -> Tensor:
    return permuted(0, 2, 3, 1)(x)
