"""Pearson (PKD) against the published formula (mmrazor): standardise per channel, then half the mean squared error."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from harness import Benchmark, kdkernels, main
from shapes import FEATURES
from torch import Tensor


def inputs(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Features of one level that correlate, with channels of different mean and scale."""
    c = shape[1]
    student, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    scale = torch.rand(1, c, 1, 1, generator=generator) + 0.5
    teacher = (0.6 * student + 0.8 * noise) * scale + torch.randn(1, c, 1, 1, generator=generator)
    return student.to(dtype), teacher.to(dtype)


def _standardised(x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    x = x.permute(1, 0, 2, 3).reshape(c, -1)
    x = (x - x.mean(dim=-1, keepdim=True)) / (x.std(dim=-1, keepdim=True) + 1e-6)
    return x.reshape(c, n, h, w).permute(1, 0, 2, 3)


def eager(student: Tensor, teacher: Tensor) -> Tensor:
    """As published."""
    return F.mse_loss(_standardised(student), _standardised(teacher)) / 2


BENCHMARK = Benchmark(
    "pearson",
    inputs,
    kdkernels.pearson_loss,
    eager,
    FEATURES,
    variants={"two passes": partial(kdkernels.pearson_loss, one_pass=False)},
)

if __name__ == "__main__":
    sys.exit(main([BENCHMARK]))
