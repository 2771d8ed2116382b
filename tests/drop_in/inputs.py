"""What the lines of docs/drop-in.md are executed on: small tensors of unlike sizes, and numbers unlike 1.

Every count (pictures, channels, height, width, rows, classes, foreground) differs from every other, so that a line that
divides by the wrong one is seen.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import Library, Row

NUMBERS = {
    # temperatures and weights, under every name that the libraries have for them
    **dict.fromkeys(("tau", "T", "temperature"), 2.5),
    **dict.fromkeys(("w", "loss_weight", "dis", "ilw"), 0.7),
    **{"alpha": 0.3, "beta": 0.6, "fg_w": 3.0, "bg_w": 12.0, "margin": 0.2, "nu": 0.4},
    # large: mmdet adds 1.2e-7 to it
    "avg_factor": 250.0,
    **{"num_classes": 11, "num_items_in_batch": 13, "batch_size": 6, "num_pos": 9.0},
}
SHAPES = {
    "rows": (24, 11),
    "maps": (3, 5, 6, 7),
    "tokens": (3, 8, 11),
    "boxes": (10, 4),
    "levels": [(3, 5, 8, 9), (3, 5, 4, 7)],
    "taller": [(3, 5, 8, 9), (3, 5, 6, 7)],  # the student of "unequal": its second level is smaller
}


def _draw(shape: Any, generator: torch.Generator) -> Any:
    if isinstance(shape, list):
        return [_draw(level, generator) for level in shape]
    return 1.5 * torch.randn(shape, generator=generator)


def _boxes(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and target where the margin decides: of some rows, and of the batch, alone."""
    directions = F.normalize(torch.randn(2, 10, 4, generator=generator), dim=-1)
    squared = torch.linspace(0.6, 4, 10)
    ratio = torch.tensor([0.9, 1.2, 0.5, 0.95, 1.3, 0.4, 0.97, 1.1, 0.6, 0.9])
    gt = torch.randn(10, 4, generator=generator)
    student, teacher = gt + directions * torch.stack([squared * ratio, squared]).sqrt()[..., None]
    return student, teacher, gt


def draw(kind: str) -> dict[str, Any]:
    """Inputs by the names of this house: student, teacher, and what else the rows of a kind mention. float32."""
    g = torch.Generator().manual_seed(7)
    shape = SHAPES["levels" if kind == "unequal" else kind]
    student = _draw(shape, g)
    teacher = _draw(SHAPES["taller"] if kind == "unequal" else shape, g)
    if kind == "rows" or kind == "tokens":
        rows = student.shape[:-1]
        labels = torch.randint(0, 11, rows, generator=g)
        labels.view(-1)[[0, 5, 6, 11, 20]] = -100
        pos = torch.zeros(rows, dtype=torch.bool)
        pos.view(-1)[2:9] = True
        more = {"labels": labels, "targets": labels.clamp(min=0), "pos": pos, "weight": torch.rand(rows, generator=g)}
        more["class_weight"] = torch.tensor([1.5] + 10 * [1.0])
    elif kind == "boxes":
        student, teacher, gt = _boxes(g)
        more = {"gt": gt}
    else:
        levels = teacher if isinstance(teacher, list) else [teacher]
        boxes = [(torch.rand(x.shape[0], *x.shape[2:], generator=g) < 0.3).float() for x in levels]
        scores = [torch.rand(x.shape[0], *x.shape[2:], generator=g) for x in levels]
        more = {"masks": boxes, "mask": boxes[0], "scores": scores}
    return {"student": student, "teacher": teacher, **more}


def convert(x: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in nested values, as new tensors of `dtype`."""
    if isinstance(x, Tensor):
        return x.to(dtype, copy=True) if x.is_floating_point() else x
    if isinstance(x, list):
        return [convert(item, dtype) for item in x]
    return x


def namespace(library: Library, row: Row, dtype: torch.dtype, swapped: bool = False) -> tuple[dict[str, Any], list]:
    """What a row's lines see, and the student's leaves in it. `swapped` gives each side the other's values."""
    import kdkernels as kd

    given = {name: convert(value, dtype) for name, value in draw(row.kind).items()}
    student, teacher = given.pop("student"), given.pop("teacher")
    if swapped:
        student, teacher = teacher, student
    leaves = [x.requires_grad_() for x in (student if isinstance(student, list) else [student])]
    sides = {row.student or library.student: student, row.teacher or library.teacher: teacher}
    code = {"kd": kd, "torch": torch, "nn": torch.nn, "F": F}
    return {**code, **NUMBERS, **library.names, **given, **sides}, leaves
