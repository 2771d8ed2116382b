"""The inputs of the page on numerics: for each loss the ordinary ones, and those on which formulas and kernels break.

Add a case at the end of a loss's list, and run benchmarks/numerics.py again.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from .values import (
    STANDARD,
    Case,
    More,
    Sides,
    certain,
    changed,
    close,
    constant,
    deltas,
    empty_rows,
    huge,
    independent,
    largest,
    nearly_constant,
    normal,
    offset,
    one_hot,
    ordinary,
    outlier,
    ruled_out,
)

ROWS, FEATURES, BOXES = (32, 81), (2, 8, 12, 20), (64, 4)


def _logits(loss: str, more: More, keywords: Mapping[str, Any], temperatures: Sequence[tuple]) -> list[Case]:
    """The cases of a loss over rows of logits; `temperatures`: name, keywords and constants of one more case each."""
    case = functools.partial(Case, loss, more=more, keywords=keywords)
    found = [
        case("ordinary", "normal, std 2; the teacher agrees by half", ROWS, ordinary),
        case("one row", "a batch of one", (1, 81), ordinary),
        case("no rows", "an empty batch: the loss is 0", (0, 81), ordinary),
        case("wide rows", "2 rows of 50,257 classes", (2, 50257), ordinary),
        case("p_t = 0", "the teacher's logits are 0 but one of 400 in each row", ROWS, changed(one_hot)),
        case("logits of 1e4", "normal, std 1e4", ROWS, independent(1e4)),
        case("offset of 1e3", "about 1e3 (student) and -1e3 (teacher), std 2, or two steps of the dtype", ROWS, offset),
        case("huge", "up to 1e30; float16: up to 6e4", ROWS, huge),
        case("largest", "plus or minus the dtype's largest finite value", ROWS, largest),
        case("close sides", "a converged student: apart by 1e-4, or by 4 eps of the dtype", ROWS, close),
    ]
    if loss == "binary_kl":
        found += [
            case("inf, teacher", "logits of -inf and +inf on the teacher's side", ROWS, changed(certain(1))),
            case("inf, both", "the same logits of -inf and +inf on both sides", ROWS, changed(certain(0, 1))),
        ]
    else:
        found += [
            case("-inf, teacher", "every fifth class ruled out by the teacher", ROWS, changed(ruled_out(1))),
            case("-inf, both", "every fifth class ruled out by both", ROWS, changed(ruled_out(0, 1))),
            case("rows all -inf", "one of the student, one of the teacher, one of both", ROWS, changed(empty_rows)),
        ]
    what = "every fifth class ruled out by the student alone: the loss is +inf, its gradient is not"
    found += [case("-inf, student", what, ROWS, changed(ruled_out(0)))]
    for name, other, constants in temperatures:
        what = "as the ordinary ones, at other temperatures"
        found += [Case(loss, name, what, ROWS, ordinary, more, {**keywords, **other}, constants)]
    return found


def _temperatures(*values: float) -> list[tuple]:
    return [(f"temperature {t:g}", {"temperature": t}, {"TEMPERATURE": t}) for t in values]


def _foreground(g: Generator, shape: Sequence[int]) -> tuple[Tensor, ...]:
    return (torch.rand(shape[0], generator=g) < 0.25,)


def _labels(g: Generator, shape: Sequence[int]) -> tuple[Tensor, ...]:
    """Labels among the classes that no case rules out; the background, the last class, weighs 1.5."""
    class_weight = torch.ones(shape[-1])
    class_weight[-1] = 1.5
    return 5 * torch.randint((shape[-1] + 4) // 5, tuple(shape[:1]), generator=g), class_weight


_DEFEAT = {"foreground_weight": 0.05, "background_weight": 2.0}
_DEFEAT_TEMPERATURES = {"foreground_temperature": 3.0, "background_temperature": 1.0}
_FAR = {"foreground_temperature": 0.1, "background_temperature": 100.0}


def _decoupled() -> list[Case]:
    keywords = {**_DEFEAT, **_DEFEAT_TEMPERATURES}
    temperatures = [("temperatures 0.1, 100", _FAR, {"TEMPERATURES": (0.1, 100.0)})]
    found = _logits("decoupled_kl", _foreground, keywords, temperatures)
    for name, value in (("no foreground", False), ("no background", True)):
        more = lambda g, shape, value=value: (torch.full((shape[0],), value),)  # noqa: E731
        found.append(
            Case("decoupled_kl", name, "one region has no rows: its part is 0", ROWS, ordinary, more, keywords)
        )
    return found


def _mask(share: float | None) -> More:
    """Two boxes in each picture, or one value everywhere."""

    def make(g: Generator, shape: Sequence[int]) -> tuple[Tensor, ...]:
        n, _, h, w = shape
        mask = torch.zeros(n, h, w) if share is None else torch.full((n, h, w), share)
        if share is None:
            mask[:, : h // 2 + 1, : w // 3 + 1], mask[:, h // 2 :, w // 2 :] = 1, 1
        return (mask,)

    return make


def _masked_mse() -> list[Case]:
    keywords = {"foreground_weight": 4.0, "background_weight": 16.0}

    def case(name: str, what: str, sides: Sides = STANDARD, share: float | None = None, **more: Any) -> Case:
        return Case("masked_mse", name, what, more.pop("shape", FEATURES), sides, _mask(share), keywords, **more)

    return [
        case("ordinary", "normal, std 1; two boxes in each picture"),
        case("one cell", "a level of 1 x 1 x 1 x 1", shape=(1, 1, 1, 1)),
        case("empty mask", "no box in the batch: that part is 0", share=0.0),
        case("full mask", "no background: that part is 0", share=1.0),
        case("mask of 0.3", "a soft mask, 0.3 everywhere", share=0.3),
        case("large level", "2 x 64 x 50 x 76: half a million terms", shape=(2, 64, 50, 76), large=True),
        case("differences of 1e3", "normal, std 1e3: squares leave float16", independent(1e3)),
        case(
            "huge",
            "up to 1e18, so that squares stay in float32; float16: up to 6e4",
            functools.partial(huge, most=1e18),
        ),
        case("tiny", "normal, std 1e-3; float16 has no room for the squares", independent(1e-3)),
        case("close sides", "a converged student: apart by 1e-4, or by 4 eps of the dtype", close),
        case("close about 1e3", "both about 1e3, std 1e-2 or two steps of the dtype", nearly_constant),
    ]


def _pearson() -> list[Case]:
    def case(name: str, what: str, sides: Sides = STANDARD, **more: Any) -> Case:
        return Case("pearson", name, what, more.pop("shape", FEATURES), sides, lambda g, shape: (), **more)

    what = "every second channel of the student is 0.3"
    flat = changed(constant(0), STANDARD)
    return [
        case("ordinary", "normal, std 1"),
        case("one sample", "one value per channel: the loss is 0", shape=(1, 8, 1, 1)),
        case("two samples", "two values per channel", shape=(2, 8, 1, 1)),
        case("large level", "2 x 64 x 50 x 76: half a million terms", shape=(2, 64, 50, 76), large=True),
        case("constant student channel", f"{what}: no gradient there", flat),
        case(
            "constant channel, as published",
            f"{what}; on_constant='reference': the published gradient, over C m eps",
            flat,
            keywords={"on_constant": "reference"},
        ),
        case("constant teacher channel", "every second channel of the teacher is 0.3", changed(constant(1), STANDARD)),
        case("large offset", "mean 1e3, std 1e-2, or two steps of the dtype", nearly_constant),
        case(
            "outlier first",
            "normal, std 1, the first value of each channel 1e3 or -1e3",
            changed(outlier, independent(1.0)),
        ),
        case("huge", "up to 1e30; float16: up to 6e4", huge),
        case("tiny", "normal, std 1e-4", independent(1e-4)),
        case("close sides", "a converged student: apart by 1e-4, or by 4 eps of the dtype", close),
    ]


def _targets(g: Generator, shape: Sequence[int]) -> tuple[Tensor, ...]:
    return (normal(g, shape),)


def _bounded() -> list[Case]:
    def case(name: str, what: str, scale: float = 1.0, **more: Any) -> Case:
        sides = more.pop("sides", functools.partial(deltas, scale=scale))
        return Case("bounded_regression", name, what, more.pop("shape", BOXES), sides, _targets, **more)

    big = lambda g, shape, dtype: deltas(g, shape, dtype, 1e4 if dtype == torch.float16 else 1e17)  # noqa: E731
    same = lambda g, shape, dtype: (normal(g, shape).float(),) * 2  # noqa: E731
    return [
        case("ordinary", "errors of std 1 about targets of std 1"),
        case("one row", "one box", shape=(1, 4)),
        case("no rows", "no box: the loss is 0", shape=(0, 4)),
        case("many rows", "20,000 boxes", shape=(20000, 4), large=True),
        case("errors of 1e3", "squares leave float16", 1e3),
        case("huge", "errors of 1e17, so that squares stay in float32; float16: 1e4", sides=big),
        case("near the target", "errors of std 0.02", 0.02),
        case("equal to the teacher", "no bound: the student is not worse", sides=same),
    ]


_SOFT = {"hard_weight": 0.5}
CASES: dict[str, list[Case]] = {
    "masked_mse": _masked_mse(),
    "pearson": _pearson(),
    "temperature_kl": _logits("temperature_kl", lambda g, shape: (), {"temperature": 2.0}, _temperatures(0.1, 100.0)),
    "decoupled_kl": _decoupled(),
    "soft_cross_entropy": _logits("soft_cross_entropy", _labels, _SOFT, []),
    "binary_kl": _logits("binary_kl", lambda g, shape: (), {"temperature": 2.0}, _temperatures(0.1, 100.0)),
    "bounded_regression": _bounded(),
}
