"""Masks drawn from boxes against DeFeat's loop over boxes in Python, alone and in front of masked MSE on five levels.

Alone, a shape is pictures x boxes per picture x height x width, and there is no gradient: masks are drawn and compared
cell by cell. In front of the loss it names the finest level (stride 4), with 20 boxes in every picture; both sides draw
their masks within the time that is measured. `torch.compile` has no part in the loop, whose numbers are Python's: it is
given the loss behind it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import masked_mse
import torch
from harness import Benchmark, kdkernels, main
from shapes import Shapes
from torch import Tensor

STRIDES = (4, 8, 16, 32, 64)
BOXES = 20


def levels_of(height: int, width: int) -> list[tuple[int, int]]:
    """Rows and columns of the pyramid's levels over a picture."""
    return [(math.ceil(height / s), math.ceil(width / s)) for s in STRIDES]


def boxes_of(pictures: int, count: int, height: int, width: int, generator: torch.Generator) -> list[Tensor]:
    """Boxes within the picture, of every scale alike: those for which DeFeat's code marks what it means to."""
    found = []
    for _ in range(pictures):
        scale = torch.rand(count, 2, generator=generator)
        sides = 3 * (torch.tensor([width, height]) / 3) ** scale
        corner = torch.rand(count, 2, generator=generator) * (torch.tensor([width, height]) - sides - 1).clamp(min=0)
        found.append(torch.cat([corner, corner + sides - 1], dim=1))
    return found


def inputs(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    """Boxes of every picture, and the levels' sizes."""
    return boxes_of(*shape, generator), levels_of(*shape[2:])


def ours(boxes: list[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """All pictures and levels at once."""
    return kdkernels.masks.ground_truth_masks(boxes, sizes, STRIDES)


def eager(boxes: list[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Picture by picture and box by box. In float32, where the published code has float64, which is slower."""
    masks = [torch.zeros(len(boxes), h, w, device=boxes[0].device) for h, w in sizes]
    for picture, own in enumerate(boxes):
        scale = torch.sqrt((own[:, 2] - own[:, 0] + 1) * (own[:, 3] - own[:, 1] + 1))
        levels = torch.floor(torch.log2(scale / 56 + 1e-6)).clamp(min=0, max=len(sizes) - 1).long()
        for i in range(len(own)):
            level = int(levels[i])
            (h, w), stride = sizes[level], STRIDES[level]
            left, top = max(int(own[i, 0] / stride), 0), max(int(own[i, 1] / stride), 0)
            right, bottom = min(int(own[i, 2] / stride), w), min(int(own[i, 3] / stride), h)
            if left == right or top == bottom:
                masks[level][picture, top, left] = 1
            else:
                masks[level][picture, top:bottom, left:right] = 1
    return masks


def loss_inputs(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    """Students and teachers of the levels, and the boxes of every picture."""
    n, c, h, w = shape
    sizes = levels_of(4 * h, 4 * w)
    pairs = [[torch.randn(n, c, *size, generator=generator).to(dtype) for _ in range(2)] for size in sizes]
    students, teachers = (list(side) for side in zip(*pairs))
    return students, teachers, boxes_of(n, BOXES, 4 * h, 4 * w, generator)


def _sizes(features: list[Tensor]) -> list[tuple[int, int]]:
    return [(x.shape[-2], x.shape[-1]) for x in features]


def our_loss(one_pass: Any) -> Callable[..., Tensor]:
    """Both calls."""
    weights = {"foreground_weight": 4.0, "background_weight": 16.0, "level_reduction": "sum", "one_pass": one_pass}

    def call(students: list[Tensor], teachers: list[Tensor], boxes: list[Tensor]) -> Tensor:
        return kdkernels.masked_mse_loss(students, teachers, ours(boxes, _sizes(students)), **weights)

    return call


def _levels(students: list[Tensor], teachers: list[Tensor], masks: list[Tensor]) -> Tensor:
    return sum(masked_mse.eager(*level) for level in zip(students, teachers, masks))


def behind_the_loop(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Masks by the loop, then the loss of all levels."""

    def call(students: list[Tensor], teachers: list[Tensor], boxes: list[Tensor]) -> Tensor:
        return loss(students, teachers, eager(boxes, _sizes(students)))

    return call


BENCHMARKS = [
    Benchmark(
        "masks",
        inputs,
        ours,
        eager,
        Shapes(
            quick=(2, 3, 64, 96),
            default=[(2, n, 800, 1344) for n in (0, 1, 10, 100, 500)] + [(16, 10, 800, 1344), (8, 20, 640, 640)],
            more=[(8, 100, 800, 1344), (16, 500, 800, 1344), (2, 20, 640, 640), (16, 20, 640, 640), (3, 7, 801, 1203)],
            scaling=[
                *[(1, 20, 64, 64), (1, 20, 160, 160), (1, 20, 416, 416), (2, 20, 832, 832), (8, 20, 1024, 1024)],
                (32, 20, 1344, 1344),
            ],
        ),
        compiling=None,
        elements=lambda shape: shape[0] * sum(h * w for h, w in levels_of(*shape[2:])),
        gradient=False,
        dtypes=("float32",),
    ),
    Benchmark(
        "masked_mse_boxes",
        loss_inputs,
        our_loss("auto"),
        behind_the_loop(_levels),
        Shapes(
            quick=(2, 8, 12, 20),
            default=[(2, 256, 200, 336), (8, 256, 50, 84)],
            more=[(2, 256, 160, 160), (8, 256, 100, 168), (8, 256, 80, 80)],
            large=[(8, 256, 200, 336), (16, 256, 200, 336)],
            scaling=[
                *[(1, 16, 16, 16), (1, 64, 32, 32), (1, 256, 64, 64), (2, 256, 100, 100), (2, 256, 128, 128)],
                (2, 256, 192, 192),
            ],
        ),
        tests="masked_mse",
        variants={"two passes": our_loss(False)},
        compiling=lambda compile, _: behind_the_loop(compile(_levels)),
        elements=lambda shape: shape[0] * shape[1] * sum(h * w for h, w in levels_of(4 * shape[2], 4 * shape[3])),
    ),
]

if __name__ == "__main__":
    sys.exit(main(BENCHMARKS))
