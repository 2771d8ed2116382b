"""Temperature KL (Hinton) against kl_div(log_softmax, softmax): a classifier's logits, and a language model's.

Peers: the form of mmrazor and many others (eager), mmdet's, which means over classes first, and on a GPU Liger's KL.
Liger's JSD is left out: there is none here, so it would be another loss's time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from harness import Benchmark, kdkernels, main
from shapes import Shapes
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


def mmdet(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over classes and rows; times the classes, so that the number is the same."""
    target = F.softmax(teacher / TEMPERATURE, dim=1).detach()
    rows = F.kl_div(F.log_softmax(student / TEMPERATURE, dim=1), target, reduction="none").mean(1)
    return (rows * (TEMPERATURE * TEMPERATURE)).mean() * student.shape[1]


def liger() -> Callable[..., Tensor]:
    """Their kernel wants log-probabilities and probabilities: both softmaxes are the user's part of the work."""
    from liger_kernel.transformers.kl_div import LigerKLDIVLoss

    divergence = LigerKLDIVLoss(reduction="batchmean")

    def call(student: Tensor, teacher: Tensor) -> Tensor:
        log_p = F.log_softmax(student / TEMPERATURE, dim=-1)
        return divergence(log_p, F.softmax(teacher / TEMPERATURE, dim=-1)) * TEMPERATURE**2

    return call


ours = partial(kdkernels.temperature_kl_loss, temperature=TEMPERATURE)
BENCHMARK = Benchmark(
    "temperature_kl",
    inputs,
    ours,
    eager,
    Shapes(
        quick=(16, 100),
        default=[
            *[(512, 81), (1024, 1000), (4096, 1000), (64, 50_257), (512, 32_000), (128, 128_256), (128, 151_936)],
        ],
        more=[(777, 1203), (2048, 32_000), (512, 50_257), (512, 128_256), (512, 151_936)],
        large=[
            *[(1_048_576, 80), (131_072, 1000), (8192, 16_384), (8192, 32_000), (8192, 50_257), (4096, 128_256)],
            *[(4096, 151_936), (512, 262_144)],
        ],
        scaling=[(8, 64), (64, 256), (256, 1024), (1024, 2048), (2048, 4096), (4096, 8192)],
    ),
    variants={"two passes": partial(ours, one_pass=False)},
    peers={"mmdet": mmdet},
    liger=liger,
)

if __name__ == "__main__":
    sys.exit(main([BENCHMARK]))
