"""What the self-test calls each loss with: a few ordinary inputs, the edges, one extreme, and one of a middling size.

Values come from a seeded generator in float64 and are rounded to the tested dtype last, so that every backend sees the
same numbers. Small on purpose: the tests of the repository have the large grid. A new loss is an entry of `LOSSES`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

import kdkernels as kd

Pair = tuple[torch.dtype, torch.dtype]  # student's, teacher's
Call = tuple[list[Any], dict[str, Any]]  # positional arguments, student first; keywords

PAIRS: dict[str, Pair] = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float64": (torch.float64, torch.float64),
    "bfloat16, teacher float32": (torch.bfloat16, torch.float32),
}


@dataclass(frozen=True)
class Case:
    """One call of a loss; `length` is how many values it sums."""

    name: str
    build: Callable[[Generator, Pair], Call]
    length: int

    def inputs(self, pair: Pair, device: str = "cpu") -> Call:
        """The call's arguments: the same values for every device."""
        arguments, keywords = self.build(Generator().manual_seed(zlib.crc32(self.name.encode())), pair)
        return moved(arguments, device), moved(keywords, device)


@dataclass(frozen=True)
class Loss:
    """A loss: who computes it, what it must equal (the same function, unless it is the objective), and its inputs."""

    function: Callable[..., Tensor]
    equals: Callable[..., Tensor]
    cases: Sequence[Case]
    middle: Case  # what is timed, and shared among threads


def moved(x: Any, device: str) -> Any:
    """Nested arguments on a device. Views stay views where they are there already, and keep their order of strides."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, (list, tuple)):
        return [moved(v, device) for v in x]
    if isinstance(x, dict):
        return {key: moved(v, device) for key, v in x.items()}
    return x


def _normal(g: Generator, shape: Sequence[int], scale: float = 1.0) -> Tensor:
    return scale * torch.randn(tuple(shape), generator=g, dtype=torch.float64)


def _both(g: Generator, shape: Sequence[int], pair: Pair, scale: float = 1.0) -> list[Tensor]:
    return [_normal(g, shape, scale).to(dtype) for dtype in pair]


def _inner(x: Tensor) -> Tensor:
    """The same values behind one column that is not theirs: rows are strided and start at odd addresses."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 1), float("nan"), dtype=x.dtype)
    wide[..., 1:] = x
    return wide[..., 1:]


# Features: levels of (N, C, H, W).

LEVELS = [(2, 16, 13, 21), (2, 16, 7, 11)]
_EMPTY = [(2, 4, 3, 5), (2, 4, 0, 5), (1, 4, 1, 1)]


def _uneven(student: Tensor, teacher: Tensor) -> list[Tensor]:
    """Sides of very different size; every second channel of the student has one value only."""
    student = student / 512
    student[:, ::2] = 0.3
    return [student, 30 * teacher]


def _features(masks: str | None, **keywords: Any) -> tuple[list[Case], Case]:
    def case(name: str, shapes: Sequence[Sequence[int]], change: Any = None, mask: str | None = masks) -> Case:
        def build(g: Generator, pair: Pair) -> Call:
            levels = [_both(g, shape, pair) for shape in shapes]
            if change:
                levels = [change(*level) for level in levels]
            arguments = [[level[side] for level in levels] for side in range(2)]
            if mask is not None:
                grown = [torch.rand(n, h, w, generator=g) for n, _, h, w in shapes]
                arguments.append([x * 0 for x in grown] if mask == "empty" else grown)
            return arguments, dict(keywords)

        return Case(name, build, sum(n * c * h * w for n, c, h, w in shapes))

    cases = [
        case("ordinary", LEVELS),
        case("channels_last", LEVELS, lambda *level: [x.to(memory_format=torch.channels_last) for x in level]),
        case("empty levels, empty masks", _EMPTY, mask=masks and "empty"),
        case("constant channels, sizes apart", LEVELS[:1], _uneven),
    ]
    return cases, case("middling", [(2, 128, 48, 64)])


# Rows of logits, and of four deltas.


def _rows(
    width: int, extra: Callable[[Generator, Tensor], Call], extreme: Any, large: Sequence[int]
) -> tuple[list[Case], Case]:
    def case(name: str, shape: Sequence[int], change: Any = None, **more: Any) -> Case:
        def build(g: Generator, pair: Pair) -> Call:
            sides = _both(g, shape, pair, 1.0 if width == 4 else 3.0)
            arguments, keywords = extra(g, sides[0])
            return [*(change(*sides) if change else sides), *arguments], {**keywords, **more}

        return Case(name, build, max(1, torch.Size(shape).numel()))

    cases = [
        case("ordinary", (77, width)),
        case("strided", (23, width), lambda *sides: [_inner(x) for x in sides]),
        case("no rows", (0, width)),
        case("extreme", (12, width), extreme, reduction="none"),
    ]
    if width != 4:
        cases.append(case("wide rows", (31, 1031)))
    return cases, case("middling", large)


def _spiked(student: Tensor, teacher: Tensor) -> list[Tensor]:
    """One logit of 1e4 in each row of either side, at the same class in every third row; a row that is all -inf."""
    for i in range(student.shape[0]):
        student[i, 5 * i], teacher[i, 5 * i + i % 3] = 1e4, 1e4
    student[1] = float("-inf")
    return [student, teacher]


def _far(student: Tensor, teacher: Tensor) -> list[Tensor]:
    student[::3], teacher[1::3] = 1e4, -1e4
    return [student, teacher]


def _weight(g: Generator, student: Tensor) -> Tensor:
    """Some rows have the weight 0."""
    return (torch.randn(student.shape[:-1], generator=g).abs() - 0.3).clamp(min=0)


def _kl(g: Generator, student: Tensor) -> Call:
    return [], {"temperature": 2.5, "weight": _weight(g, student)}


def _decoupled(g: Generator, student: Tensor) -> Call:
    foreground = torch.rand(student.shape[:-1], generator=g) < 0.3
    return [foreground], {"foreground_weight": 0.5, "background_weight": 2.0, "foreground_temperature": 3.0}


def _no_foreground(g: Generator, pair: Pair) -> Call:
    sides = _both(g, (12, 81), pair, 3.0)
    return [*sides, torch.zeros(12, dtype=torch.bool)], {"foreground_temperature": 3.0}


def _soft(g: Generator, student: Tensor) -> Call:
    rows, classes = student.shape[:-1], student.shape[-1]
    target = torch.randint(classes, rows, generator=g)
    target = torch.where(torch.rand(rows, generator=g) < 0.2, -100, target)
    class_weight = 0.5 + torch.rand(classes, generator=g)
    return [], {"target": target, "hard_weight": 0.3, "temperature": 2.0, "class_weight": class_weight}


def _bounded(g: Generator, student: Tensor) -> Call:
    target = _normal(g, student.shape, 0.7).to(student.dtype)
    return [target], {"bound_weight": 0.3, "margin": 0.1, "weight": _weight(g, student)}


def boxes() -> tuple[Tensor, dict[str, Any]]:
    """Boxes of two pictures and of none, on every level, over borders, reversed and not a number; keywords."""
    g = Generator().manual_seed(11)
    low = torch.rand(60, 2, generator=g) * 120 - 10
    rows = torch.cat([torch.arange(60.0)[:, None] % 3 - 1, low, low + 128 * torch.rand(60, 2, generator=g) ** 3], 1)
    rows[0, 3], rows[7, 1], rows[11, 4] = rows[0, 1] - 1, float("nan"), float("inf")
    sizes = [(26, 33), (13, 17), (7, 9)]
    return rows, {"sizes": sizes, "strides": [4, 8, 16], "base_size": 16, "batch_size": 2}


# The objective: all terms, which must equal the sum of the single functions.

_TERMS: dict[str, dict[str, Any]] = {
    "masked_mse": {"foreground_weight": 3.0, "background_weight": 0.5, "loss_weight": 2.0},
    "pearson": {"loss_weight": 5.0},
    "decoupled_kl": {"foreground_temperature": 2.0, "loss_weight": 0.5},
    "temperature_kl": {"temperature": 3.0, "loss_weight": 1.5},
    "soft_cross_entropy": {"hard_weight": 0.4, "loss_weight": 0.7},
    "binary_kl": {"temperature": 2.0, "loss_weight": 0.1},
    "bounded_regression": {"bound_weight": 0.8, "loss_weight": 3.0},
}


def _objective(
    students: list[Tensor], teachers: list[Tensor], masks: list[Tensor], rows: list[Tensor], *, one_pass: Any = "auto"
) -> Tensor:
    """All losses in one call; the last two of the students are logits and deltas."""
    result = kd.DetectionDistillationLoss(**_TERMS, one_pass=one_pass)(
        student_features=students[:-2],
        teacher_features=teachers[:-2],
        masks=masks,
        student_logits=students[-2],
        teacher_logits=teachers[-2],
        foreground=rows[0],
        target=rows[1],
        student_deltas=students[-1],
        teacher_deltas=teachers[-1],
        target_deltas=rows[2],
    )
    return result.total


def _sum_of_parts(
    students: list[Tensor], teachers: list[Tensor], masks: list[Tensor], rows: list[Tensor], *, one_pass: Any = "auto"
) -> Tensor:
    """The same by one call per loss."""
    features, logits = (students[:-2], teachers[:-2]), (students[-2], teachers[-2])
    calls = {
        "masked_mse": [*features, masks],
        "pearson": features,
        "decoupled_kl": [*logits, rows[0]],
        "bounded_regression": [students[-1], teachers[-1], rows[2]],
    }
    total = 0.0
    for name, keywords in _TERMS.items():
        keywords = {"one_pass": one_pass, **keywords, **({"target": rows[1]} if name == "soft_cross_entropy" else {})}
        weight = keywords.pop("loss_weight")
        total = total + weight * getattr(kd, f"{name}_loss")(*calls.get(name, logits), **keywords)
    return total


def _all_inputs(name: str, shapes: Sequence[Sequence[int]], rows: tuple[int, int]) -> Case:
    def build(g: Generator, pair: Pair) -> Call:
        levels = [_both(g, shape, pair) for shape in shapes]
        sides = [*levels, _both(g, rows, pair, 3.0), _both(g, (rows[0], 4), pair)]
        masks = [torch.rand(n, h, w, generator=g) for n, _, h, w in shapes]
        foreground = torch.rand(rows[0], generator=g) < 0.3
        target = torch.randint(rows[1], rows[:1], generator=g)
        more = [foreground, target, _normal(g, (rows[0], 4)).to(pair[0])]
        return [[s for s, _ in sides], [t for _, t in sides], masks, more], {}

    return Case(name, build, sum(n * c * h * w for n, c, h, w in shapes))


def _losses() -> dict[str, Loss]:
    logits = (2048, 256)
    table = {
        "masked_mse": _features("real", foreground_weight=3.0, background_weight=0.4),
        "pearson": _features(None),
        "temperature_kl": _rows(81, _kl, _spiked, logits),
        "decoupled_kl": _rows(81, _decoupled, _spiked, logits),
        "soft_cross_entropy": _rows(81, _soft, _spiked, logits),
        "binary_kl": _rows(81, _kl, _spiked, logits),
        "bounded_regression": _rows(4, _bounded, _far, (65536, 4)),
    }
    table["decoupled_kl"][0].append(Case("no foreground", _no_foreground, 12 * 81))
    losses = {}
    for name, (cases, middle) in table.items():
        function = getattr(kd, f"{name}_loss")
        losses[name] = Loss(function, function, cases, middle)
    cases = [_all_inputs("all terms", LEVELS, (50, 21)), _all_inputs("all terms, no rows", LEVELS[1:], (0, 21))]
    middle = _all_inputs("middling", [(2, 64, 48, 64), (2, 64, 24, 32)], (1024, 81))
    losses["detection_distillation"] = Loss(_objective, _sum_of_parts, cases, middle)
    return losses


LOSSES = _losses()
