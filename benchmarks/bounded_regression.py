"""Teacher-bounded regression (Chen et al. 2017, eq. 4-5), gated per row, against the formula in plain PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from harness import Benchmark, kdkernels, main
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
    lambda student, teacher, target: kdkernels.bounded_regression_loss(student, teacher, target),
    eager,
    shapes=[(2048, 4), (200000, 4)],
    quick_shape=(64, 4),
    reads=3,
)

if __name__ == "__main__":
    sys.exit(main([BENCHMARK]))
