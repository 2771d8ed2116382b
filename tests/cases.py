"""The grid that every backend runs: per loss, named cases that make its inputs from a seed and a pair of dtypes.

No case knows a backend or a device, so kernels to come run the same grid unchanged. This file has the row losses'
cases and the table of all losses; feature_cases.py has the feature losses'. To add a case, add a line; to add a loss,
add a builder and an entry to `CASES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from case_inputs import (
    LARGE,
    LOGITS,
    MIXED,
    Case,
    Inputs,
    Layout,
    Pair,
    Values,
    contiguous,
    equal,
    expanded,
    misaligned,
    nearly_equal,
    normal,
    permuted,
    plain,
    product,
    scalar,
    sliced,
)
from feature_cases import masked_mse_cases, pearson_cases
from torch import Generator, Tensor

import kdkernels as kd

# Row losses. `extra(generator, student)` makes what a loss takes besides student and teacher.

Extra = Callable[[Generator, Tensor], Inputs]

SHAPES = [(0, 80), (1, 1), (3, 1), (1, 2), (3, 4), (3, 17), (77, 80), (77, 81), (289, 4), (289, 81), (77, 400)]
SHAPES += [(3, 1000), (17,), (2, 3, 17), (2, 0, 5), (2, 5, 3, 81), (3, 2047), (3, 2048), (3, 2049), (3, 5001)]
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
    for name in ("spiked", "shifted 1e4"):
        cases.append(row_case(f"{name}, long", (3, 4097), extra, LOGITS[name], pairs=LARGE))
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


_DEFEAT = {"foreground_weight": 0.05, "background_weight": 2.0, "foreground_temperature": 3.0}
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
