"""Temperature KL (Hinton) against kl_div(log_softmax, softmax): a classifier's logits, and a language model's."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from harness import Benchmark, kdkernels, main
from torch import Tensor

TEMPERATURE = 2.0


def inputs(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Logits of a student, and of a teacher who is surer."""
    student, noise = (torch.randn(shape, generator=generator) for _ in range(2))
    return student.mul(2).to(dtype), (2 * student + 2 * noise).to(dtype)


def eager(student: Tensor, teacher: Tensor) -> Tensor:
    """As copied everywhere."""
    log_p = F.log_softmax(student / TEMPERATURE, dim=-1)
    return F.kl_div(log_p, F.softmax(teacher / TEMPERATURE, dim=-1), reduction="batchmean") * TEMPERATURE**2


BENCHMARK = Benchmark(
    "temperature_kl",
    inputs,
    lambda student, teacher: kdkernels.temperature_kl_loss(student, teacher, temperature=TEMPERATURE),
    eager,
    shapes=[(4096, 1000), (64, 50257)],
    quick_shape=(16, 100),
)

if __name__ == "__main__":
    sys.exit(main([BENCHMARK]))
