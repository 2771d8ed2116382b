"""The whole objective against the same formulas in plain PyTorch: five pyramid levels, and proposals with their boxes.

The shape names the finest level, and for the heads proposals x classes. Features are masked MSE and Pearson on five
levels of 256 channels; heads are decoupled KL and teacher-bounded regression.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import bounded_regression
import decoupled_kl
import masked_mse
import pearson
import torch
from harness import Benchmark, kdkernels, main
from shapes import Shapes
from torch import Tensor

TERMS = {
    "masked_mse": {"foreground_weight": 4.0, "background_weight": 16.0, "level_reduction": "sum"},
    "pearson": {},
    "decoupled_kl": {
        "foreground_weight": decoupled_kl.WEIGHTS[0],
        "background_weight": decoupled_kl.WEIGHTS[1],
        "foreground_temperature": decoupled_kl.TEMPERATURES[0],
        "background_temperature": decoupled_kl.TEMPERATURES[1],
    },
    "bounded_regression": {},
}
FEATURES, HEADS = ("masked_mse", "pearson"), ("decoupled_kl", "bounded_regression")
LEVELS, PROPOSALS = 5, (1024, 81)


def feature_inputs(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    """Students, teachers and masks of the levels, each half as large as the one before, rounded up."""
    n, c, h, w = shape
    levels = []
    for _ in range(LEVELS):
        student, teacher = pearson.inputs((n, c, h, w), dtype, generator)
        levels.append((student, teacher, masked_mse.inputs((n, 1, h, w), dtype, generator)[2]))
        h, w = (h + 1) // 2, (w + 1) // 2
    students, teachers, masks = (list(x) for x in zip(*levels))
    return students, teachers, masks


def head_inputs(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    """Logits and deltas of both sides, the rows of the foreground, and the targets."""
    student, teacher, foreground = decoupled_kl.inputs(shape, dtype, generator)
    deltas = bounded_regression.inputs((shape[0], 4), dtype, generator)
    return [student, deltas[0]], [teacher, deltas[1]], foreground, deltas[2]


def all_inputs(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> tuple[Any, ...]:
    """Both."""
    features = feature_inputs(shape, dtype, generator)
    heads = head_inputs(PROPOSALS, dtype, generator)
    return features[0] + heads[0], features[1] + heads[1], features[2], *heads[2:]


def objective(names: Sequence[str], **options: Any) -> Any:
    """The configured objective."""
    return kdkernels.DetectionDistillationLoss(**{name: TERMS[name] for name in names}, **options)


def ours_of_features(one_pass: Any) -> Any:
    fused = objective(FEATURES, one_pass=one_pass)

    def call(students: list[Tensor], teachers: list[Tensor], masks: list[Tensor]) -> Tensor:
        return fused(student_features=students, teacher_features=teachers, masks=masks).total

    return call


def ours_of_heads(one_pass: Any) -> Any:
    fused = objective(HEADS, one_pass=one_pass)

    def call(students: list[Tensor], teachers: list[Tensor], foreground: Tensor, target: Tensor) -> Tensor:
        return fused(**heads_of(students, teachers, foreground, target)).total

    return call


def heads_of(students: list[Tensor], teachers: list[Tensor], foreground: Tensor, target: Tensor) -> dict[str, Tensor]:
    return {
        "student_logits": students[0],
        "teacher_logits": teachers[0],
        "foreground": foreground,
        "student_deltas": students[1],
        "teacher_deltas": teachers[1],
        "target_deltas": target,
    }


def ours_of_all(one_pass: Any) -> Any:
    fused = objective([*FEATURES, *HEADS], one_pass=one_pass)

    def call(students: list[Tensor], teachers: list[Tensor], masks: list[Tensor], *rows: Tensor) -> Tensor:
        heads = heads_of(students[LEVELS:], teachers[LEVELS:], *rows)
        features = {"student_features": students[:LEVELS], "teacher_features": teachers[:LEVELS], "masks": masks}
        return fused(**features, **heads).total

    return call


def separate_features(students: list[Tensor], teachers: list[Tensor], masks: list[Tensor]) -> Tensor:
    """One call per loss."""
    loss = kdkernels.masked_mse_loss(students, teachers, masks, **TERMS["masked_mse"])
    return loss + kdkernels.pearson_loss(students, teachers)


def separate_heads(students: list[Tensor], teachers: list[Tensor], foreground: Tensor, target: Tensor) -> Tensor:
    """One call per loss."""
    loss = kdkernels.decoupled_kl_loss(students[0], teachers[0], foreground, **TERMS["decoupled_kl"])
    return loss + kdkernels.bounded_regression_loss(students[1], teachers[1], target)


def eager_features(students: list[Tensor], teachers: list[Tensor], masks: list[Tensor]) -> Tensor:
    """Each level by each published formula."""
    total = 0.0
    for student, teacher, mask in zip(students, teachers, masks):
        total = total + masked_mse.eager(student, teacher, mask) + pearson.eager(student, teacher)
    return total


def eager_heads(students: list[Tensor], teachers: list[Tensor], foreground: Tensor, target: Tensor) -> Tensor:
    """Both published formulas."""
    logits = decoupled_kl.eager(students[0], teachers[0], foreground)
    return logits + bounded_regression.eager(students[1], teachers[1], target)


def eager_all(students: list[Tensor], teachers: list[Tensor], masks: list[Tensor], *rows: Tensor) -> Tensor:
    """Everything by the published formulas."""
    features = eager_features(students[:LEVELS], teachers[:LEVELS], masks)
    return features + eager_heads(students[LEVELS:], teachers[LEVELS:], *rows)


def separate_all(students: list[Tensor], teachers: list[Tensor], masks: list[Tensor], *rows: Tensor) -> Tensor:
    """One call per loss."""
    features = separate_features(students[:LEVELS], teachers[:LEVELS], masks)
    return features + separate_heads(students[LEVELS:], teachers[LEVELS:], *rows)


def elements(shape: Sequence[int]) -> int:
    """The students' elements on all levels."""
    n, c, h, w = shape
    return n * c * sum(-(-h // 2**i) * -(-w // 2**i) for i in range(LEVELS))


def _benchmark(part: str, inputs: Any, ours: Any, separate: Any, eager: Any, shapes: Shapes, size: Any) -> Benchmark:
    return Benchmark(
        "detection_distillation" + part,
        inputs,
        ours("auto"),
        eager,
        shapes,
        tests="detection_distillation",
        variants={"two passes": ours(False), "separate calls": separate},
        elements=size,
    )


QUICK = (2, 8, 12, 20)
LARGE = [(8, 256, 200, 336), (16, 256, 200, 336)]
LADDER = [(1, 16, 24, 24), (1, 64, 32, 32), (1, 256, 64, 64), (2, 256, 100, 100), (2, 256, 128, 128)]
MORE = [(2, 256, 160, 160), (8, 256, 50, 84), (3, 255, 67, 101)]
ALL = Shapes(
    QUICK, [(2, 256, 200, 336), (2, 256, 80, 80)], [(8, 256, 80, 80), *MORE], LARGE, [*LADDER, (2, 256, 192, 192)]
)
ON_LEVELS = Shapes(QUICK, [(2, 256, 100, 168)], [(2, 256, 200, 336), *MORE], LARGE, LADDER)
ROWS = Shapes(
    (64, 81),
    default=[(512, 81), PROPOSALS, (2000, 1204)],
    more=[(512, 21), (2000, 81), (1024, 1204)],
    scaling=[(16, 64), (128, 64), (1024, 64), (8192, 64), (65_536, 64)],
)
BENCHMARKS = [
    _benchmark("", all_inputs, ours_of_all, separate_all, eager_all, ALL, elements),
    _benchmark("_features", feature_inputs, ours_of_features, separate_features, eager_features, ON_LEVELS, elements),
    _benchmark("_heads", head_inputs, ours_of_heads, separate_heads, eager_heads, ROWS, math.prod),
]

if __name__ == "__main__":
    sys.exit(main(BENCHMARKS))
