"""Binary KL (sigmoid heads) against the formula in plain PyTorch: the class logits of a dense detector."""

from __future__ import annotations

import sys
from functools import partial

import torch
import torch.nn.functional as F
from harness import Benchmark, kdkernels, main
from shapes import Shapes
from temperature_kl import inputs
from torch import Tensor

TEMPERATURE = 2.0


def eager(student: Tensor, teacher: Tensor) -> Tensor:
    """KL of two outcomes per class, summed over classes, over the number of rows, times T^2."""
    s, t = student / TEMPERATURE, teacher / TEMPERATURE
    p = torch.sigmoid(t)
    present = p * (F.logsigmoid(t) - F.logsigmoid(s))
    absent = (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))
    return (present + absent).sum() / student[..., 0].numel() * TEMPERATURE**2


ours = partial(kdkernels.binary_kl_loss, temperature=TEMPERATURE)
BENCHMARK = Benchmark(
    "binary_kl",
    inputs,
    ours,
    eager,
    Shapes(
        quick=(2, 64, 80),
        default=[(8, 16_800, 80), (2, 16_800, 80), (8, 900, 80), (3, 777, 91)],
        more=[(16, 16_800, 80), (8, 8400, 80), (16, 8400, 80), (2, 8400, 1203), (16, 300, 91)],
        large=[(64, 16_800, 80)],
        scaling=[(1, 16, 64), (1, 256, 64), (1, 4096, 64), (8, 4096, 64), (8, 16_384, 64), (8, 65_536, 64)],
    ),
    variants={"two passes": partial(ours, one_pass=False)},
)

if __name__ == "__main__":
    sys.exit(main([BENCHMARK]))
