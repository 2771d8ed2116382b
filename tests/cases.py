"""The grid that every backend runs: per loss, named cases that make its inputs from a seed and a pair of dtypes.

No case knows a backend or a device, so kernels to come run the same grid unchanged. A case's `length` is how many
values its loss sums. To add a case, add a line; to add a loss, add a builder and an entry to `CASES`.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from case_inputs import (
    FEATURES,
    LOGITS,
    Layout,
    Pair,
    Values,
    channels_last,
    contiguous,
    equal,
    expanded,
    large_mean,
    misaligned,
    nearly_equal,
    normal,
    permuted,
    plain,
    sliced,
)
from torch import Generator, Tensor

import kdkernels as kd

PAIRS: dict[str, Pair] = {
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "float64": (torch.float64, torch.float64),
    "bfloat16-float32": (torch.bfloat16, torch.float32),
    "float16-float32": (torch.float16, torch.float32),
    "float64-float32": (torch.float64, torch.float32),
}
ALIKE = ("float32", "bfloat16", "float16", "float64")
MIXED = ("bfloat16-float32", "float16-float32", "float64-float32")
WIDE = ("float32", "float64")
LARGE = ("float32", "bfloat16")

Inputs = tuple[list[Any], dict[str, Any]]  # positional arguments, student first; keywords


@dataclass(frozen=True)
class Case:
    """One call of a loss."""

    name: str
    make: Callable[[Generator, Pair], Inputs]
    length: int
    pairs: Sequence[str] = ALIKE
    slow: bool = False

    def inputs(self, pair: str) -> Inputs:
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()))
        return self.make(generator, PAIRS[pair])


def product(shape: Sequence[int]) -> int:
    return functools.reduce(lambda a, b: a * b, shape, 1)


# Row losses. `extra(generator, student)` makes what a loss takes besides student and teacher.

Extra = Callable[[Generator, Tensor], Inputs]

SHAPES = [(0, 80), (1, 1), (3, 1), (1, 2), (3, 4), (3, 17), (77, 80), (77, 81), (289, 4), (289, 81), (77, 400), (3, 1000)]
SHAPES += [(17,), (2, 3, 17), (2, 0, 5), (2, 5, 3, 81), (3, 2047), (3, 2048), (3, 2049), (3, 5001)]
LAYOUTS: list[tuple[str, Sequence[int], Layout, Layout]] = [
    ("columns from 1", (7, 81), sliced(-1), sliced(-1)),
    ("every second column", (7, 81), sliced(-1, 2), contiguous),
    ("every second column, long", (3, 2500), sliced(-1, 2), sliced(-1, 3)),
    ("every third row", (7, 81), sliced(0, 3), sliced(0, 2)),
    ("classes strided", (3, 9, 20), permuted(0, 2, 1), permuted(0, 2, 1)),
    ("only the teacher's classes strided", (3, 9, 20), contiguous, permuted(0, 2, 1)),
    ("classes outermost", (5, 6, 7, 20), permuted(3, 0, 1, 2), permuted(0, 3, 1, 2)),
    ("expanded teacher", (7, 81), contiguous, expanded(0)),
    ("teacher expanded over classes", (7, 81), contiguous, expanded(1)),
    ("expanded student", (7, 81), expanded(0), contiguous),
    ("misaligned", (7, 81), misaligned, misaligned),
    ("misaligned teacher", (7, 64), contiguous, misaligned),
]


def row_case(
    name: str,
    shape: Sequence[int],
    extra: Extra,
    values: Values,
    layouts: tuple[Layout, Layout] = (contiguous, contiguous),
    **options: Any,
) -> Case:
    def make(g: Generator, pair: Pair) -> Inputs:
        student, teacher = values(g, shape, pair)
        more, keywords = extra(g, student)
        return [layouts[0](student), layouts[1](teacher), *more], keywords

    return Case(name, make, max(1, product(shape)), **options)


def logit_cases(extra: Extra, **keyword_cases: Extra) -> list[Case]:
    def each_row(g: Generator, student: Tensor) -> Inputs:
        """Judged row by row: of one sum that cancels, any error is an accident, the formula's as well."""
        more, keywords = extra(g, student)
        return more, {**keywords, "reduction": "none"}

    values = plain()
    cases = [row_case("x".join(map(str, shape)), shape, extra, values) for shape in SHAPES]
    cases += [row_case(n, shape, extra, values, (s, t)) for n, shape, s, t in LAYOUTS]
    cases += [row_case(name, (12, 81), extra, kind) for name, kind in LOGITS.items()]
    cases += [row_case("nearly equal", (40, 81), each_row, nearly_equal)]
    cases += [row_case(f"{name}, long", (3, 4097), extra, LOGITS[name], pairs=LARGE) for name in ("spiked", "shifted 1e4")]
    cases += [row_case(name.replace("_", " "), (23, 81), other, values) for name, other in keyword_cases.items()]
    cases += [row_case("mixed dtypes", (23, 81), extra, values, pairs=MIXED)]
    cases += [row_case("mixed dtypes, 2049", (3, 2049), extra, values, pairs=MIXED)]
    cases += [row_case("2x50257", (2, 50257), extra, values, pairs=LARGE)]
    cases += [row_case("1x200000", (1, 200000), extra, values, pairs=LARGE)]
    cases += [row_case("64x50257", (64, 50257), extra, values, pairs=LARGE, slow=True)]
    return cases + [row_case("4096x1000", (4096, 1000), extra, values, slow=True)]


def row_weight(g: Generator, student: Tensor) -> Tensor:
    """Some rows have the weight 0."""
    return (normal(g, student.shape[:-1]).abs() - 0.3).clamp(min=0).float()


def scalar(x: float) -> Tensor:
    return torch.tensor(x, dtype=torch.float32)


def just(**keywords: Any) -> Extra:
    return lambda g, student: ([], dict(keywords))


def weighted(**keywords: Any) -> Extra:
    return lambda g, student: ([], {"weight": row_weight(g, student), **keywords})


KL_KEYWORDS = {
    "temperature_half": just(temperature=0.5),
    "temperature_10": just(temperature=10.0),
    "sum": just(reduction="sum", temperature=2.0),
    "mean": just(reduction="mean"),
    "none": just(reduction="none", temperature=3.0),
    "row_weight": weighted(),
    "row_weight_none": weighted(reduction="none"),
    "row_weight_sum": weighted(reduction="sum"),
    "avg_factor": just(avg_factor=7.5),
    "avg_factor_mean_tensor": weighted(avg_factor=scalar(7.5), reduction="mean", temperature=2.0),
    "avg_factor_zero": weighted(avg_factor=0.0),
    "avg_factor_negative_tensor": just(avg_factor=scalar(-1.0)),
}


def foreground_rows(share: float = 0.3, **keywords: Any) -> Extra:
    def make(g: Generator, student: Tensor) -> Inputs:
        rows = torch.rand(student.shape[:-1], generator=g) < share
        if keywords.get("weight") is True:
            return [rows], {**keywords, "weight": row_weight(g, student)}
        return [rows], dict(keywords)

    return make


_DEFEAT = dict(foreground_weight=0.05, background_weight=2.0, foreground_temperature=3.0)
DECOUPLED_KEYWORDS = {
    "defaults": foreground_rows(),
    "weights_as_tensors": foreground_rows(foreground_weight=scalar(0.05), background_weight=scalar(2.0)),
    "one_weight_a_tensor": foreground_rows(foreground_weight=scalar(0.05), background_weight=0.5),
    "background_temperature": foreground_rows(background_temperature=4.0),
    "no_background_weight": foreground_rows(background_weight=0.0),
    "sum": foreground_rows(reduction="sum", **_DEFEAT),
    "none": foreground_rows(reduction="none", **_DEFEAT),
    "row_weight": foreground_rows(weight=True, **_DEFEAT),
    "row_weight_none": foreground_rows(weight=True, reduction="none", **_DEFEAT),
    "no_foreground": foreground_rows(0.0, **_DEFEAT),
    "no_background": foreground_rows(1.0, **_DEFEAT),
}


def labelled(*, ignored: float = 0.2, classes: bool = True, weight: bool = False, **keywords: Any) -> Extra:
    def make(g: Generator, student: Tensor) -> Inputs:
        count, rows = student.shape[-1], student.shape[:-1]
        target = torch.randint(count, rows, generator=g)
        target = torch.where(torch.rand(rows, generator=g) < ignored, keywords.get("ignore_index", -100), target)
        found: dict[str, Any] = {"target": target, **keywords}
        if classes:
            found["class_weight"] = 0.5 + torch.rand(count, generator=g)
        if weight:
            found["weight"] = row_weight(g, student)
        return [], found

    return make


def class_weighted(**keywords: Any) -> Extra:
    return lambda g, s: ([], {"class_weight": 0.5 + torch.rand(s.shape[-1], generator=g), **keywords})


SOFT_KEYWORDS = {
    "defaults": just(),
    "temperature": just(temperature=4.0),
    "class_weight": class_weighted(temperature=2.0),
    "only_hard": labelled(hard_weight=1.0),
    "only_soft_with_target": labelled(hard_weight=0.0, temperature=0.5),
    "temperature_1_mixed": labelled(hard_weight=0.3),
    "hard_weight_tensor": labelled(hard_weight=scalar(0.3), temperature=3.0),
    "ignore_index": labelled(hard_weight=0.4, ignore_index=3, ignored=0.5),
    "all_ignored": labelled(hard_weight=0.4, ignored=2.0),
    "sum": labelled(hard_weight=0.4, reduction="sum"),
    "none": labelled(hard_weight=0.4, reduction="none", temperature=2.0),
    "row_weight": labelled(hard_weight=0.4, weight=True),
    "row_weight_none": labelled(hard_weight=0.4, weight=True, reduction="none"),
    "avg_factor": labelled(hard_weight=0.4, avg_factor=7.5),
    "avg_factor_tensor": labelled(hard_weight=0.4, weight=True, avg_factor=scalar(7.5)),
    "avg_factor_zero": labelled(hard_weight=0.4, avg_factor=scalar(0.0)),
}


# Box deltas: rows of four. Here the teacher is nearer to the target than the student, but not always.


def deltas(**keywords: Any) -> Extra:
    def make(g: Generator, student: Tensor) -> Inputs:
        target = (0.7 * normal(g, student.shape)).to(student.dtype)
        if keywords.get("weight") is True:
            return [target], {**keywords, "weight": row_weight(g, student)}
        return [target], dict(keywords)

    return make


def _outliers(g: Generator, shape: Sequence[int], pair: Pair) -> tuple[Tensor, Tensor]:
    student, teacher = plain(1.0)(g, shape, pair)
    student[::3], teacher[1::3] = 1e4, -1e4
    return student, teacher


def _small(g: Generator, shape: Sequence[int], pair: Pair) -> tuple[Tensor, Tensor]:
    return plain(1e-3)(g, shape, pair)


DELTA_KEYWORDS = {
    "gate_element": deltas(gate="element"),
    "gate_batch": deltas(gate="batch"),
    "gate_batch_closed": deltas(gate="batch", margin=-100.0),
    "gate_element_margin": deltas(gate="element", margin=0.3),
    "margin": deltas(margin=0.6),
    "margin_negative": deltas(margin=-0.6),
    "beta_ninth": deltas(beta=1 / 9),
    "beta_0": deltas(beta=0.0),
    "only_bound": deltas(smooth_l1_weight=0.0, bound_weight=1.0),
    "only_smooth_l1": deltas(bound_weight=0.0),
    "weights_as_tensors": deltas(smooth_l1_weight=scalar(0.7), bound_weight=scalar(0.3)),
    "sum": deltas(reduction="sum"),
    "none": deltas(reduction="none"),
    "row_weight": deltas(weight=True),
    "row_weight_none": deltas(weight=True, reduction="none", gate="batch"),
    "avg_factor": deltas(avg_factor=7.5),
    "avg_factor_tensor": deltas(weight=True, avg_factor=scalar(7.5)),
    "avg_factor_zero": deltas(avg_factor=0),
}


def delta_cases() -> list[Case]:
    values, extra = plain(1.0), deltas(bound_weight=0.3)
    shapes = [(0, 4), (1, 4), (3, 4), (77, 4), (289, 4), (4,), (2, 3, 4), (2, 0, 4), (5001, 4)]
    cases = [row_case("x".join(map(str, shape)), shape, extra, values) for shape in shapes]
    cases += [row_case(n, (*shape[:-1], 4), extra, values, (s, t)) for n, shape, s, t in LAYOUTS]
    cases += [row_case(name, (30, 4), extra, kind) for name, kind in (("outliers", _outliers), ("small", _small))]
    cases += [row_case("nearly equal", (30, 4), deltas(gate="element"), nearly_equal)]
    cases += [row_case("equal", (30, 4), extra, equal)]
    cases += [row_case(name.replace("_", " "), (77, 4), other, values) for name, other in DELTA_KEYWORDS.items()]
    return cases + [row_case("mixed dtypes", (77, 4), extra, values, pairs=MIXED)]


# Features: levels of (N, C, H, W).

PYRAMID = [(2, 32, 25, 42), (2, 32, 13, 21), (2, 32, 7, 11), (2, 32, 4, 6), (2, 32, 2, 3)]
LARGE_PYRAMID = [(2, 256, 100, 152), (2, 256, 50, 76), (2, 256, 25, 38), (2, 256, 13, 19), (2, 256, 7, 10)]
FEATURE_SHAPES = [(1, 3, 1, 1), (2, 5, 1, 1), (1, 1, 7, 9), (3, 7, 5, 11), (2, 64, 13, 17), (2, 63, 5, 7), (2, 65, 5, 7)]
FEATURE_SHAPES += [(1, 300, 3, 5), (1, 2, 23, 89), (1, 2, 32, 64), (1, 2, 3, 683), (2, 3, 45, 67), (0, 4, 5, 5), (2, 4, 0, 5)]
FEATURE_LAYOUTS: list[tuple[str, Layout, Layout]] = [
    ("channels_last", channels_last, channels_last),
    ("student channels_last", channels_last, contiguous),
    ("teacher channels_last", contiguous, channels_last),
    ("every second row", sliced(2, 2, 0), sliced(2, 2, 0)),
    ("columns from 1", sliced(3), sliced(3)),
    ("every second column", sliced(3, 2), contiguous),
    ("every second channel", sliced(1, 2), sliced(1, 3)),
    ("channels_last, channels from 1", lambda x: permuted(0, 2, 3, 1)(x), lambda x: sliced(1)(x)),
    ("every second picture", sliced(0, 2), sliced(0, 3)),
    ("height and width swapped", permuted(0, 1, 3, 2), contiguous),
    ("pictures innermost", permuted(1, 2, 3, 0), permuted(1, 2, 3, 0)),
    ("teacher expanded over pictures", contiguous, expanded(0)),
    ("teacher expanded over channels", contiguous, expanded(1)),
    ("misaligned", misaligned, misaligned),
]


def masks(kind: str = "real") -> Callable[[Generator, Tensor], Tensor]:
    def make(g: Generator, student: Tensor) -> Tensor:
        n, _, h, w = student.shape
        x = torch.rand((n, h, w), generator=g)
        if kind == "bool":
            return x < 0.3
        if kind == "sparse":  # real, with zeros and ones
            return (3 * x - 1).clamp(0, 1)
        return {"real": x, "ones": torch.ones_like(x), "zeros": torch.zeros_like(x)}[kind]

    return make


def feature_case(
    name: str,
    shapes: Sequence[Sequence[int]],
    values: Values,
    mask: Callable[[Generator, Tensor], Tensor] | None,
    layouts: tuple[Layout, Layout] = (contiguous, contiguous),
    keywords: dict[str, Any] | None = None,
    **options: Any,
) -> Case:
    def make(g: Generator, pair: Pair) -> Inputs:
        levels = [values(g, shape, pair) for shape in shapes]
        arguments = [[layouts[0](s) for s, _ in levels], [layouts[1](t) for _, t in levels]]
        if mask is not None:
            arguments.append([mask(g, s) for s, _ in levels])
        return arguments, dict(keywords or {})

    return Case(name, make, max(1, sum(map(product, shapes))), **options)


def feature_cases(mask: Callable[[Generator, Tensor], Tensor] | None, keywords: dict[str, Any]) -> list[Case]:
    def case(name: str, *shapes: Sequence[int], values: Values = plain(1.0), **options: Any) -> Case:
        return feature_case(name, shapes, values, mask, keywords=keywords, **options)

    cases = [case("x".join(map(str, shape)), shape) for shape in FEATURE_SHAPES]
    cases += [case(name, (3, 9, 6, 10), layouts=(s, t)) for name, s, t in FEATURE_LAYOUTS]
    cases += [case(f"{name}, 70 channels", (2, 70, 9, 15), layouts=(s, t)) for name, s, t in FEATURE_LAYOUTS[:3]]
    cases += [case(name, (2, 8, 9, 15), values=values) for name, values in FEATURES.items()]
    cases += [case("large mean", (2, 8, 9, 15), values=large_mean, pairs=WIDE)]
    channels_inner = dict(layouts=(channels_last, channels_last))
    cases += [case(f"{name}, channels_last", (2, 8, 9, 15), values=FEATURES[name], **channels_inner) for name in FEATURES]
    cases += [case("large mean, channels_last", (2, 8, 9, 15), values=large_mean, pairs=WIDE, **channels_inner)]
    cases += [case("pyramid", *PYRAMID), case("pyramid, channels_last", *PYRAMID, **channels_inner)]
    cases += [case("empty levels among others", (2, 4, 3, 5), (2, 4, 0, 2), (2, 4, 1, 1), (0, 4, 2, 2))]
    cases += [case("levels of different N and C", (2, 4, 3, 5), (1, 7, 2, 2), (3, 1, 1, 4))]
    cases += [case("mixed dtypes", (2, 8, 9, 15), (2, 8, 4, 7), pairs=MIXED)]
    cases += [case("mixed dtypes, channels_last", (2, 8, 9, 15), pairs=MIXED, **channels_inner)]
    return cases + [case("large pyramid", *LARGE_PYRAMID, pairs=LARGE, slow=True)]


def masked_mse_cases() -> list[Case]:
    weights = dict(foreground_weight=3.0, background_weight=0.4)
    cases = feature_cases(masks(), weights)
    for kind in ("bool", "sparse", "ones", "zeros"):
        cases.append(feature_case(f"mask {kind}", PYRAMID[2:], plain(1.0), masks(kind), keywords=weights))
    keywords: list[dict[str, Any]] = [dict(normalizer=n) for n in ("elements", "pixels", "batch")]
    keywords += [dict(level_reduction="sum"), dict(normalizer="pixels", level_reduction="sum")]
    keywords += [dict(background_weight=0.0), dict(foreground_weight=scalar(3.0), background_weight=scalar(0.4))]
    keywords += [dict(foreground_weight=scalar(3.0), background_weight=0.0)]
    for k in keywords:
        name = ", ".join(f"{key} {value}" for key, value in k.items())
        cases.append(feature_case(name, PYRAMID[2:], plain(1.0), masks(), keywords={**weights, **k}))
    return cases


def pearson_cases() -> list[Case]:
    cases = feature_cases(None, {})
    keywords: list[dict[str, Any]] = [dict(eps=1e-2), dict(eps=0.0), dict(level_reduction="mean")]
    for k in keywords:
        name = ", ".join(f"{key} {value}" for key, value in k.items())
        cases.append(feature_case(name, PYRAMID[2:], plain(1.0), None, keywords=k))
    for name in ("constant student", "constant teacher", "constant both"):
        for layout in (contiguous, channels_last):
            layouts = (layout, layout)
            full = f"{name}, published gradient, {layout.__name__}"
            options = dict(keywords=dict(on_constant="reference"), layouts=layouts)
            cases.append(feature_case(full, [(2, 8, 9, 15)], FEATURES[name], None, **options))
    return cases


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "masked_mse": kd.masked_mse_loss,
    "pearson": kd.pearson_loss,
    "temperature_kl": kd.temperature_kl_loss,
    "decoupled_kl": kd.decoupled_kl_loss,
    "soft_cross_entropy": kd.soft_cross_entropy_loss,
    "binary_kl": kd.binary_kl_loss,
    "bounded_regression": kd.bounded_regression_loss,
}
CASES: dict[str, list[Case]] = {
    "masked_mse": masked_mse_cases(),
    "pearson": pearson_cases(),
    "temperature_kl": logit_cases(just(), **KL_KEYWORDS),
    "decoupled_kl": logit_cases(foreground_rows(**_DEFEAT), **DECOUPLED_KEYWORDS),
    "soft_cross_entropy": logit_cases(labelled(hard_weight=0.3, temperature=2.0), **SOFT_KEYWORDS),
    "binary_kl": logit_cases(just(), **KL_KEYWORDS),
    "bounded_regression": delta_cases(),
}
