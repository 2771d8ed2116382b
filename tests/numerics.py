"""How tests judge numbers: the bound of kdkernels/selfcheck/numbers.py, and one set of mutants that each gradient test
must catch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kdkernels.selfcheck.numbers import (
    FLOAT64_BOUND,
    Result,
    bound,
    error,
    evaluate,
    exact,
    faults,
    formula,
    leaves,
    to_float64,
    upstream_for,
)

__all__ = [
    "FLOAT64_BOUND",
    "Result",
    "bound",
    "check",
    "error",
    "evaluate",
    "exact",
    "faults",
    "formula",
    "leaves",
    "mutants",
    "to_float64",
    "upstream_for",
]


def check(function: Callable[..., Tensor], student: Any, *inputs: Any, length: int = 1, **keywords: Any) -> Result:
    """Asserts the bound for the loss and every gradient on the backend in force; returns the result."""
    result = evaluate(function, student, *inputs, **keywords)
    truth = exact(function, student, *inputs, **keywords)
    problems = faults(result, truth, formula(function, student, *inputs, **keywords), length)
    assert not problems, "; ".join(problems)
    return result


def mutants(
    function: Callable[..., Tensor], student: Any, teacher: Any, *inputs: Any, **keywords: Any
) -> Sequence[tuple[str, Result]]:
    """Results as broken kernels would give them. Each must be caught by `faults`."""
    good = evaluate(function, student, teacher, *inputs, **keywords)
    plain = evaluate(function, student, teacher, *inputs, upstream=torch.ones_like(good.loss), **keywords)
    swapped = evaluate(function, teacher, student, *inputs, **keywords)
    return [
        ("zero gradient", Result(good.loss, [torch.zeros_like(g) for g in good.grads])),
        ("gradient x 1.05", Result(good.loss, [g * 1.05 for g in good.grads])),
        ("student and teacher swapped", Result(good.loss, [g.to(o.dtype) for g, o in zip(swapped.grads, good.grads)])),
        ("upstream gradient ignored", Result(good.loss, plain.grads)),
    ]
