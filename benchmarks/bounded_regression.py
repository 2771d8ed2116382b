"""Teacher-bounded regression (Chen et al. 2017, eq. 4-5), gated per row, against the formula in plain PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from harness import Benchmark, kdkernels, main
from shapes import Shapes
from torch import Tensor


def inputs(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Box deltas, targets, and a teacher who is clearly better in half the rows and clearly worse in the others.

    Where both are equally good the gate is a matter of rounding, and so would be the gradient in bfloat16.
    """
    student, target = (torch.randn(shape, generator=generator) for _ in range(2))
    better = torch.rand(shape[0], 1, generator=generator) < 0.5
    teacher = target + (student - target) * torch.where(better, 0.5, 1.5)
    return student.to(dtype), teacher.to(dtype), target.to(dtype)


def eager(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Smooth L1, and half the squared error of the rows in which the student is not better than the teacher."""
    error = (student - target).pow(2).sum(-1)
    bound = torch.where(error > (teacher - target).pow(2).sum(-1), error, torch.zeros_like(error))
    smooth = F.smooth_l1_loss(student, target, reduction="none").sum(-1)
    return (smooth + 0.5 * bound).mean()


BENCHMARK = Benchmark(
    "bounded_regression",
    inputs,
    kdkernels.bounded_regression_loss,
    eager,
    Shapes(
        quick=(64, 4),
        default=[(512, 4), (2048, 4), (16_384, 4), (200_000, 4)],
        more=[(777, 4), (2000, 4), (134_400, 4)],
        large=[(16_000_000, 4)],
        scaling=[(16, 4), (256, 4), (4096, 4), (65_536, 4), (1_048_576, 4), (4_194_304, 4)],
    ),
    reads=3,
    variants={"two passes": partial(kdkernels.bounded_regression_loss, one_pass=False)},
)

if __name__ == "__main__":
    sys.exit(main([BENCHMARK]))
