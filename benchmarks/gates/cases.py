"""What the Triton kernels are compiled for: every loss at typical shapes, forward and backward, and the masks.

Planes and rows of a size that 16 divides, and of an odd one; planes and channels_last; rows that fit a tile and rows
that a program walks over. Nothing runs, so the tensors' values do not matter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import kdkernels as kd


@dataclass(frozen=True)
class Case:
    """`run(student, teacher)` calls an op for these dtypes. `dtypes`: whether they matter to it."""

    op: str
    name: str
    run: Callable[[torch.dtype, torch.dtype], Any]
    dtypes: bool = True


def _features(op: str, shape: tuple[int, ...], layout: torch.memory_format, student: torch.dtype, teacher: torch.dtype):
    n, _, h, w = shape
    s, t = (torch.zeros(shape, dtype=dtype).contiguous(memory_format=layout) for dtype in (student, teacher))
    mask = [torch.zeros(n, h, w)] if op == "masked_mse" else []
    getattr(kd, f"{op}_loss")(s.requires_grad_(), t, *mask).backward()


def _rows(op: str, shape: tuple[int, int], keywords: dict[str, Any], student: torch.dtype, teacher: torch.dtype):
    s, t = torch.zeros(shape, dtype=student, requires_grad=True), torch.zeros(shape, dtype=teacher)
    getattr(kd, f"{op}_loss")(s, t, **keywords).backward()


def _masks(name: str, student: torch.dtype, teacher: torch.dtype):
    sizes, strides = [(200, 336), (100, 168), (25, 41)], [4, 8, 32]
    getattr(kd.masks, f"{name}_masks")(torch.zeros(100, 5), sizes, strides, batch_size=2)


def _weighted(rows: int, columns: int) -> dict[str, Any]:
    return {"weight": torch.ones(rows), "avg_factor": torch.tensor(1.0)}


def _hard(rows: int, columns: int) -> dict[str, Any]:
    target = torch.zeros(rows, dtype=torch.int64)
    return {"class_weight": torch.ones(columns), "target": target, "hard_weight": 0.5, "weight": torch.ones(rows)}


def _foreground(rows: int, columns: int) -> dict[str, Any]:
    return {"foreground": torch.zeros(rows, dtype=torch.bool)}


def _plain(rows: int, columns: int) -> dict[str, Any]:
    return {}


_SHAPES = ((512, 80), (512, 81), (512, 1999), (512, 2048), (64, 50304), (64, 50257))


def _cases() -> list[Case]:
    found = []
    for op in ("masked_mse", "pearson"):
        for layout, suffix in ((torch.contiguous_format, ""), (torch.channels_last, " channels_last")):
            for c, h, w in ((256, 100, 168), (256, 25, 41), (255, 25, 41)):
                if c == 256 or suffix:
                    name = f"{h}x{w}{suffix}{'' if c == 256 else f' {c}'}"
                    found.append(Case(op, name, functools.partial(_features, op, (2, c, h, w), layout)))
    plain = {"temperature_kl": _plain, "binary_kl": _plain, "decoupled_kl": _foreground, "soft_cross_entropy": _plain}
    for op, keywords in plain.items():
        for shape in _SHAPES:
            found.append(Case(op, str(shape[1]), functools.partial(_rows, op, shape, keywords(*shape))))
    more = {"temperature_kl": _weighted, "binary_kl": _weighted, "soft_cross_entropy": _hard}
    for op, keywords in more.items():
        for shape in (_SHAPES[0], _SHAPES[-1]):
            name = f"{shape[1]} {keywords.__name__[1:]}"
            found.append(Case(op, name, functools.partial(_rows, op, shape, keywords(*shape))))
    boxes = {"target": torch.zeros(9001, 4)}
    found.append(Case("bounded_regression", "4", functools.partial(_rows, "bounded_regression", (9001, 4), boxes)))
    for name in ("ground_truth", "gaussian"):
        found.append(Case("masks", name, functools.partial(_masks, name), dtypes=False))
    return found


CASES = _cases()
