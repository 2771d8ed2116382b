"""Soft cross-entropy (Chen et al. 2017, eq. 2-3) with class weights and hard labels, against plain PyTorch."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from harness import Benchmark, kdkernels, main
from shapes import HEADS
from temperature_kl import inputs as logits
from torch import Tensor


def inputs(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Logits, labels, and the paper's weight of 1.5 for the background, here the last class."""
    class_weight = torch.ones(shape[-1])
    class_weight[-1] = 1.5
    return *logits(shape, dtype, generator), torch.randint(shape[-1], shape[:1], generator=generator), class_weight


def ours(student: Tensor, teacher: Tensor, target: Tensor, class_weight: Tensor, one_pass: Any = "auto") -> Tensor:
    """The fused loss."""
    return kdkernels.soft_cross_entropy_loss(
        student, teacher, class_weight=class_weight, target=target, hard_weight=0.5, one_pass=one_pass
    )


def eager(student: Tensor, teacher: Tensor, target: Tensor, class_weight: Tensor) -> Tensor:
    """Half the labels' cross-entropy, half the teacher's."""
    soft = -(class_weight * F.softmax(teacher, dim=-1) * F.log_softmax(student, dim=-1)).sum(-1).mean()
    return 0.5 * F.cross_entropy(student, target) + 0.5 * soft


BENCHMARK = Benchmark(
    "soft_cross_entropy", inputs, ours, eager, HEADS, variants={"two passes": partial(ours, one_pass=False)}
)

if __name__ == "__main__":
    sys.exit(main([BENCHMARK]))
