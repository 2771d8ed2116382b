"""Decoupled KL (DeFeat eq. 6-9) against the published form, which selects each region's rows with a boolean index."""

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

WEIGHTS, TEMPERATURES = (0.05, 2.0), (3.0, 1.0)  # foreground, background: the paper's best


def inputs(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Proposals of a two-stage head, a quarter of them foreground."""
    return *logits(shape, dtype, generator), torch.rand(shape[0], generator=generator) < 0.25


def ours(student: Tensor, teacher: Tensor, foreground: Tensor, one_pass: Any = "auto") -> Tensor:
    """The fused loss."""
    return kdkernels.decoupled_kl_loss(
        student,
        teacher,
        foreground,
        foreground_weight=WEIGHTS[0],
        background_weight=WEIGHTS[1],
        foreground_temperature=TEMPERATURES[0],
        background_temperature=TEMPERATURES[1],
        one_pass=one_pass,
    )


def eager(student: Tensor, teacher: Tensor, foreground: Tensor) -> Tensor:
    """As published, with a temperature for each region as the paper has it."""
    loss = 0.0
    for rows, weight, temperature in zip((foreground, ~foreground), WEIGHTS, TEMPERATURES):
        log_p = F.log_softmax(student / temperature, dim=-1)[rows]
        divergence = F.kl_div(log_p, F.softmax(teacher / temperature, dim=-1)[rows], reduction="sum")
        loss = loss + weight * temperature**2 * divergence / rows.sum()
    return loss


BENCHMARK = Benchmark(
    "decoupled_kl", inputs, ours, eager, HEADS, variants={"two passes": partial(ours, one_pass=False)}
)

if __name__ == "__main__":
    sys.exit(main([BENCHMARK]))
