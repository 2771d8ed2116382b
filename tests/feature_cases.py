"""The feature losses' cases: levels of (N, C, H, W), with masks where the loss has them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from case_inputs import (
    FEATURES,
    LARGE,
    MIXED,
    WIDE,
    Case,
    Inputs,
    Layout,
    Pair,
    Values,
    channels_last,
    contiguous,
    expanded,
    large_mean,
    misaligned,
    permuted,
    plain,
    product,
    scalar,
    sliced,
)
from torch import Generator, Tensor

PYRAMID = [(2, 32, 25, 42), (2, 32, 13, 21), (2, 32, 7, 11), (2, 32, 4, 6), (2, 32, 2, 3)]
LARGE_PYRAMID = [(2, 256, 100, 152), (2, 256, 50, 76), (2, 256, 25, 38), (2, 256, 13, 19), (2, 256, 7, 10)]
FEATURE_SHAPES = [(1, 3, 1, 1), (2, 5, 1, 1), (1, 1, 7, 9), (3, 7, 5, 11), (2, 64, 13, 17), (2, 63, 5, 7)]
FEATURE_SHAPES += [(2, 65, 5, 7), (1, 300, 3, 5), (1, 2, 23, 89), (1, 2, 32, 64), (1, 2, 3, 683), (2, 3, 45, 67)]
FEATURE_SHAPES += [(0, 4, 5, 5), (2, 4, 0, 5)]
FEATURE_LAYOUTS: list[tuple[str, Layout, Layout]] = [
    ("channels_last", channels_last, channels_last),
    ("student channels_last", channels_last, contiguous),
    ("teacher channels_last", contiguous, channels_last),
    ("every second row", sliced(2, 2, 0), sliced(2, 2, 0)),
    ("columns from 1", sliced(3), sliced(3)),
    ("every second column", sliced(3, 2), contiguous),
    ("teacher's columns from 1", contiguous, sliced(3)),
    ("every second channel", sliced(1, 2), sliced(1, 3)),
    ("channels_last, channels from 1", channels_last, sliced(1)),
    ("every second picture", sliced(0, 2), sliced(0, 3)),
    ("height and width swapped", permuted(0, 1, 3, 2), contiguous),
    ("pictures innermost", permuted(1, 2, 3, 0), permuted(1, 2, 3, 0)),
    ("teacher expanded over pictures", contiguous, expanded(0)),
    ("teacher expanded over channels", contiguous, expanded(1)),
    ("misaligned", misaligned, misaligned),
]


_NORMAL = plain(1.0)


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
    def case(name: str, *shapes: Sequence[int], values: Values = _NORMAL, **options: Any) -> Case:
        return feature_case(name, shapes, values, mask, keywords=keywords, **options)

    cases = [case("x".join(map(str, shape)), shape) for shape in FEATURE_SHAPES]
    cases += [case(name, (3, 9, 6, 10), layouts=(s, t)) for name, s, t in FEATURE_LAYOUTS]
    cases += [case(f"{name}, 70 channels", (2, 70, 9, 15), layouts=(s, t)) for name, s, t in FEATURE_LAYOUTS[:3]]
    cases += [case(name, (2, 8, 9, 15), values=values) for name, values in FEATURES.items()]
    cases += [case("large mean", (2, 8, 9, 15), values=large_mean, pairs=WIDE)]
    channels_inner = {"layouts": (channels_last, channels_last)}
    for name, values in FEATURES.items():
        cases.append(case(f"{name}, channels_last", (2, 8, 9, 15), values=values, **channels_inner))
    cases += [case("large mean, channels_last", (2, 8, 9, 15), values=large_mean, pairs=WIDE, **channels_inner)]
    cases += [case("pyramid", *PYRAMID), case("pyramid, channels_last", *PYRAMID, **channels_inner)]
    cases += [case("empty levels among others", (2, 4, 3, 5), (2, 4, 0, 2), (2, 4, 1, 2), (0, 4, 2, 2))]
    cases += [case("levels of different N and C", (2, 4, 3, 5), (1, 7, 2, 2), (3, 1, 1, 4))]
    cases += [case("mixed dtypes", (2, 8, 9, 15), (2, 8, 4, 7), pairs=MIXED)]
    cases += [case("mixed dtypes, channels_last", (2, 8, 9, 15), pairs=MIXED, **channels_inner)]
    return cases + [case("large pyramid", *LARGE_PYRAMID, pairs=LARGE, slow=True)]


def masked_mse_cases() -> list[Case]:
    weights = {"foreground_weight": 3.0, "background_weight": 0.4}
    cases = feature_cases(masks(), weights)
    for kind in ("bool", "sparse", "ones", "zeros"):
        cases.append(feature_case(f"mask {kind}", PYRAMID[2:], _NORMAL, masks(kind), keywords=weights))
    keywords: list[dict[str, Any]] = [{"normalizer": n} for n in ("elements", "pixels", "batch")]
    keywords += [{"level_reduction": "sum"}, {"normalizer": "pixels", "level_reduction": "sum"}]
    keywords += [{"background_weight": 0.0}, {"foreground_weight": scalar(3.0), "background_weight": scalar(0.4)}]
    keywords += [{"foreground_weight": scalar(3.0), "background_weight": 0.0}]
    for k in keywords:
        name = ", ".join(f"{key} {value}" for key, value in k.items())
        cases.append(feature_case(name, PYRAMID[2:], _NORMAL, masks(), keywords={**weights, **k}))
    return cases


def pearson_cases() -> list[Case]:
    cases = feature_cases(None, {})
    keywords: list[dict[str, Any]] = [{"eps": 1e-2}, {"eps": 0.0}, {"level_reduction": "mean"}]
    for k in keywords:
        name = ", ".join(f"{key} {value}" for key, value in k.items())
        cases.append(feature_case(name, PYRAMID[2:], _NORMAL, None, keywords=k))
    for name in ("constant student", "constant teacher", "constant both"):
        for layout in (contiguous, channels_last):
            layouts = (layout, layout)
            full = f"{name}, published gradient, {layout.__name__}"
            options = {"keywords": {"on_constant": "reference"}, "layouts": layouts}
            cases.append(feature_case(full, [(2, 8, 9, 15)], FEATURES[name], None, **options))
    return cases
