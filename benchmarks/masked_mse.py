"""Masked MSE (DeFeat eq. 5) against the published formula with its mask given: the loop over boxes is in masks.py."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from harness import Benchmark, kdkernels, main
from shapes import FEATURES
from torch import Tensor


def inputs(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Features of one level, and a float32 mask with three boxes in every picture."""
    n, _, h, w = shape
    student, teacher = (torch.randn(shape, generator=generator) for _ in range(2))
    mask = torch.zeros(n, h, w)
    for top, left, height, width in [(0.1, 0.1, 0.4, 0.3), (0.3, 0.5, 0.2, 0.4), (0.7, 0.2, 0.2, 0.2)]:
        mask[:, int(top * h) : int((top + height) * h) + 1, int(left * w) : int((left + width) * w) + 1] = 1
    return student.to(dtype), teacher.to(dtype), mask


def ours(student: Tensor, teacher: Tensor, mask: Tensor, one_pass: Any = "auto") -> Tensor:
    """The fused loss."""
    weights = {"foreground_weight": 4.0, "background_weight": 16.0}
    return kdkernels.masked_mse_loss(student, teacher, mask, one_pass=one_pass, **weights)


def eager(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """As published: the mask repeated over the channels, and each region's sum over twice its number of elements."""
    inside = mask.unsqueeze(1).repeat(1, student.shape[1], 1, 1)
    outside = 1 - inside
    foreground = ((student - teacher).pow(2) * inside).sum() / (2 * inside.sum()).clamp(min=1)
    background = ((student - teacher).pow(2) * outside).sum() / (2 * outside.sum()).clamp(min=1)
    return 4.0 * foreground + 16.0 * background


BENCHMARK = Benchmark(
    "masked_mse", inputs, ours, eager, FEATURES, variants={"two passes": partial(ours, one_pass=False)}
)

if __name__ == "__main__":
    sys.exit(main([BENCHMARK]))
