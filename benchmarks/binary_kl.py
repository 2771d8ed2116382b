"""Binary KL (sigmoid heads) against the formula in plain PyTorch: the class logits of a dense detector."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from harness import Benchmark, kdkernels, main
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


BENCHMARK = Benchmark(
    "binary_kl",
    inputs,
    lambda student, teacher: kdkernels.binary_kl_loss(student, teacher, temperature=TEMPERATURE),
    eager,
    shapes=[(8, 16800, 80)],
    quick_shape=(2, 64, 80),
)

if __name__ == "__main__":
    sys.exit(main([BENCHMARK]))
