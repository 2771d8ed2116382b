"""Runs the cases of cases.py: the error bound, the mutants, and what every loss promises about its gradient.

The float64 formula and the formula in the tested dtype are computed once per case, and serve all backends.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from cases import ALIKE, CASES, FUNCTIONS, PAIRS, Case
from numerics import Result, error, evaluate, exact, faults, formula, mutants
from torch import Tensor


def grid(loss: str) -> list[Any]:
    """(case, pair) parameters of one loss; large ones are marked slow."""
    return [
        pytest.param(case, pair, id=f"{case.name}-{pair}", marks=[pytest.mark.slow] if case.slow else [])
        for case in CASES[loss]
        for pair in case.pairs
    ]


def named(loss: str, name: str) -> Case:
    (found,) = [case for case in CASES[loss] if case.name == name]
    return found


@functools.lru_cache(maxsize=512)
def answers(loss: str, case: Case, pair: str) -> tuple[list[Any], dict[str, Any], Result, Result]:
    """Inputs, keywords, the exact answer and the formula's own."""
    inputs, keywords = case.inputs(pair)
    function = FUNCTIONS[loss]
    return inputs, keywords, exact(function, *inputs, **keywords), formula(function, *inputs, **keywords)


def tensors(x: Any) -> list[Tensor]:
    """All tensors in nested arguments."""
    if isinstance(x, Tensor):
        return [x]
    values = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else []
    return [t for v in values for t in tensors(v)]


def check_case(loss: str, case: Case, pair: str) -> None:
    """The error bound, for the value and each gradient; the result's dtype and shape; inputs left as they were."""
    inputs, keywords, truth, peer = answers(loss, case, pair)
    before = [x.clone() for x in tensors([inputs, keywords])]
    result = evaluate(FUNCTIONS[loss], *inputs, **keywords)
    assert all(torch.equal(x, y) for x, y in zip(tensors([inputs, keywords]), before)), "an input was written to"
    assert result.loss.dtype == (torch.float64 if "float64" in pair else torch.float32)
    for grad, student in zip(result.grads, tensors(inputs[0])):
        assert grad.dtype == student.dtype and grad.shape == student.shape
    problems = faults(result, truth, peer, case.length)
    assert not problems, "; ".join(problems)


def check_mutants(loss: str, name: str, pair: str) -> None:
    """Each broken kernel fails the bound on the gradient, and the sound one holds it."""
    case = named(loss, name)
    inputs, keywords, truth, peer = answers(loss, case, pair)
    sound = evaluate(FUNCTIONS[loss], *inputs, **keywords)
    assert not faults(sound, truth, peer, case.length)
    for what, mutant in mutants(FUNCTIONS[loss], *inputs, **keywords):
        problems = faults(mutant, truth, peer, case.length)
        for i in range(len(mutant.grads)):
            assert any(p.startswith(f"gradient {i}:") for p in problems), f"{what}, gradient {i}: not caught"


def check_upstream(loss: str, name: str, pair: str) -> None:
    """With reduction="none": upstream per row, stride 0, strided, and zero, against the formula."""
    case = named(loss, name)
    inputs, keywords = case.inputs(pair)
    keywords = {**keywords, "reduction": "none"}
    rows = FUNCTIONS[loss](*inputs, **keywords).shape
    spread = torch.linspace(-2, 3, 2 * rows.numel(), dtype=torch.float64).reshape(rows.numel(), 2)[:, 0].reshape(rows)
    assert rows.numel() > 1 and not spread.is_contiguous()
    for upstream in (spread, torch.tensor(0.7, dtype=torch.float64).expand(rows), torch.zeros(rows)):
        given = {"upstream": upstream, **keywords}
        result = evaluate(FUNCTIONS[loss], *inputs, **given)
        truth, peer = exact(FUNCTIONS[loss], *inputs, **given), formula(FUNCTIONS[loss], *inputs, **given)
        assert not faults(result, truth, peer, case.length)


def check_layouts(loss: str, pair: str) -> None:
    """The gradient has the student's shape, and its strides wherever its memory has no gaps."""
    for case in CASES[loss]:
        if case.slow or case.length > 1e5 or pair not in case.pairs:
            continue
        inputs, keywords = case.inputs(pair)
        levels = inputs[0] if isinstance(inputs[0], list) else [inputs[0]]
        students = [x.detach().requires_grad_() for x in levels]
        loss_value = FUNCTIONS[loss](students if isinstance(inputs[0], list) else students[0], *inputs[1:], **keywords)
        for student, grad in zip(students, torch.autograd.grad(loss_value.sum(), students)):
            assert grad.shape == student.shape and grad.dtype == student.dtype, case.name
            assert grad.stride() == torch.empty_like(student).stride(), case.name


def check_bad(loss: str, message: str, error_type: type[Exception], *inputs: Any, **keywords: Any) -> None:
    """The call raises `error_type`, and the text has every part of `message` (split at "|")."""
    with pytest.raises((TypeError, ValueError)) as caught:
        FUNCTIONS[loss](*inputs, **keywords)
    assert caught.type is error_type, f"{caught.type.__name__}: {caught.value}"
    for part in message.split("|"):
        assert part in str(caught.value), f"{part!r} is not in {str(caught.value)!r}"


def zero_with_graph(loss: str, students: list[Tensor], value: Tensor) -> None:
    """A defined 0 that has a graph, and zero gradients."""
    assert value.requires_grad and value.detach().abs().sum() == 0, loss
    for student, grad in zip(students, torch.autograd.grad(value.sum(), students)):
        assert grad.shape == student.shape and torch.equal(grad, torch.zeros_like(student)), loss


__all__ = ["ALIKE", "PAIRS", "answers", "check_bad", "check_case", "check_layouts", "check_mutants", "check_upstream"]
__all__ += ["error", "grid", "named", "tensors", "zero_with_graph"]
