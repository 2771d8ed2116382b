"""Runs the cases of cases.py: the error bound, the mutants, and what every loss promises about its gradient.

The float64 formula and the formula in the tested dtype are computed once per case, and serve all backends.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from case_inputs import Case
from cases import CASES, FUNCTIONS
from numerics import Result, evaluate, exact, faults, formula, leaves, mutants
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
    """Each broken kernel fails the bound on each gradient, and the sound one holds it."""
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


def check_layouts(loss: str, pair: str, backend: str) -> None:
    """The gradient has the student's shape, and its strides wherever its memory has no gaps.

    A kernel gives it so; the formula's is put so by autograd, as it reaches the leaf.
    """
    for case in CASES[loss]:
        if case.slow or case.length > 1e4 or pair not in case.pairs:
            continue
        inputs, keywords = case.inputs(pair)
        levels = inputs[0] if isinstance(inputs[0], list) else [inputs[0]]
        students = [x.detach().requires_grad_() for x in levels]
        loss_value = FUNCTIONS[loss](students if isinstance(inputs[0], list) else students[0], *inputs[1:], **keywords)
        if backend == "reference":
            loss_value.sum().backward()
            grads = [s.grad for s in students]
        else:
            grads = torch.autograd.grad(loss_value.sum(), students)
        for student, grad in zip(students, grads):
            assert grad.shape == student.shape and grad.dtype == student.dtype, case.name
            expected = torch.empty_like(student).stride()
            # The stride of a dimension of one, or of nothing, says nothing.
            matter = [d for d in range(grad.dim()) if grad.shape[d] > 1 and grad.numel()]
            assert [grad.stride(d) for d in matter] == [expected[d] for d in matter], case.name


def run(function: Any, student: Any, *inputs: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    """Loss and gradient under an upstream gradient of 1, of one student tensor."""
    student = student.detach().requires_grad_()
    loss = function(student, *inputs, **keywords)
    (grad,) = torch.autograd.grad(loss.sum(), [student])
    return loss.detach(), grad


def check_nan_stays(loss: str, columns: int, column: int, dtype: torch.dtype, **inputs: Any) -> None:
    """A NaN on either side makes its own row's value and gradient NaN, and moves no bit of the other rows."""
    g = torch.Generator().manual_seed(3)
    student = (3 * torch.randn(5, columns, generator=g)).to(dtype)
    teacher = (3 * torch.randn(5, columns, generator=g)).to(dtype)
    function = functools.partial(FUNCTIONS[loss], reduction="none", **inputs)
    value, grad = run(function, student, teacher)
    for side in range(2):
        sides = [student.clone(), teacher.clone()]
        sides[side][2, column] = float("nan")
        got, got_grad = run(function, *sides)
        others = [0, 1, 3, 4]
        assert got[2].isnan() and got_grad[2].isnan().any()
        assert torch.equal(got[others], value[others]) and torch.equal(got_grad[others], grad[others])


def check_teacher_constant(loss: str, name: str) -> None:
    """No graph without a student that asks for one, or under no_grad; and none that leads to the teacher."""
    inputs, keywords = named(loss, name).inputs("float32")
    assert not FUNCTIONS[loss](*inputs, **keywords).requires_grad
    students = leaves(inputs[0])
    with torch.no_grad():
        assert not FUNCTIONS[loss](students, *inputs[1:], **keywords).requires_grad
    # Detached from a graph is enough; and the gradient ends at the student.
    source = [x.clone().requires_grad_() for x in tensors(inputs[1])]
    detached = [(2 * x).detach() for x in source]
    teacher = detached if isinstance(inputs[1], list) else detached[0]
    FUNCTIONS[loss](students, teacher, *inputs[2:], **keywords).sum().backward()
    assert all(x.grad is None for x in source) and all(x.grad is not None for x in tensors(students))


def check_bad(loss: str, base: dict[str, Any], change: dict[str, Any], error_type: type, message: str) -> None:
    """The call with `change` raises `error_type`, and the text has every part of `message` (split at "|")."""
    FUNCTIONS[loss](**base)
    with pytest.raises((TypeError, ValueError)) as caught:
        FUNCTIONS[loss](**{**base, **change})
    assert caught.type is error_type, f"{caught.type.__name__}: {caught.value}"
    for part in message.split("|"):
        assert part in str(caught.value), f"{part!r} is not in {str(caught.value)!r}"


def bad_scalar(name: str) -> list[Any]:
    """What is wrong for a weight or avg_factor: a number, or a 0-d float tensor on the student's device."""
    return [
        ({name: torch.ones(1)}, ValueError, f"{name}|0-d|(1,)"),
        ({name: torch.tensor(1)}, ValueError, f"{name}|int64"),
        ({name: torch.tensor(1.0, device="meta")}, ValueError, f"{name}|meta|cpu"),
        ({name: "1"}, TypeError, f"{name}|str"),
        ({name: True}, TypeError, f"{name}|bool"),
        ({name: [1.0]}, TypeError, f"{name}|list"),
    ]


def bad_positive(name: str) -> list[Any]:
    cases = [({name: x}, ValueError, f"{name}|above 0|{x}") for x in (0.0, -1.0, float("inf"), float("nan"))]
    cases += [({name: x}, TypeError, f"{name}|{kind}") for x, kind in (("2", "str"), (True, "bool"))]
    return [
        *cases,
        ({name: None}, TypeError, f"{name}|NoneType"),
        ({name: torch.tensor(2.0)}, TypeError, f"{name}|Tensor"),
    ]


def bad_rows(columns: int) -> list[Any]:
    """What every row loss refuses, where student and teacher are (3, columns)."""

    def x(*shape: int, **options: Any) -> Tensor:
        return torch.zeros(shape, **options)

    c, base = columns, f"(3, {columns})"
    return [
        ({"student": [1.0]}, TypeError, "student|list"),
        ({"teacher": None}, TypeError, "teacher|NoneType"),
        ({"student": x(3, c, dtype=torch.int64)}, TypeError, "student|torch.int64"),
        ({"teacher": x(3, c, dtype=torch.bool)}, TypeError, "teacher|torch.bool"),
        ({"student": x(3, c, dtype=torch.complex64)}, TypeError, "student|torch.complex64"),
        ({"teacher": x(3, c, dtype=torch.float8_e5m2)}, TypeError, "teacher|torch.float8_e5m2"),
        ({"student": x(4, c)}, ValueError, f"student|teacher|(4, {c})|{base}"),
        ({"teacher": x(1, c)}, ValueError, f"student|teacher|(1, {c})|{base}"),
        ({"teacher": x(c)}, ValueError, f"student|teacher|({c},)|{base}"),
        ({"teacher": x(3, 1)}, ValueError, f"student|teacher|(3, 1)|{base}"),
        ({"teacher": x(3, c, 1)}, ValueError, f"student|teacher|(3, {c}, 1)|{base}"),
        ({"student": x(), "teacher": x()}, ValueError, "student"),
        ({"student": x(3, 0), "teacher": x(3, 0)}, ValueError, "student|(3, 0)"),
        ({"teacher": x(3, c, requires_grad=True)}, ValueError, "teacher|detach"),
        ({"teacher": x(3, c, device="meta")}, ValueError, "teacher|meta|cpu"),
        ({"weight": x(3, 1)}, ValueError, "weight|(3,)|(3, 1)"),
        ({"weight": x(3, c)}, ValueError, f"weight|(3,)|{base}"),
        ({"weight": torch.tensor(2.0)}, ValueError, "weight|(3,)|()"),
        ({"weight": 2.0}, TypeError, "weight|float"),
        ({"weight": x(3, dtype=torch.int64)}, TypeError, "weight|torch.int64"),
        ({"weight": x(3, device="meta")}, ValueError, "weight|meta|cpu"),
        ({"reduction": "avg"}, ValueError, "reduction|'sum'|'none'|'avg'"),
        ({"reduction": None}, ValueError, "reduction|None"),
    ]


def bad_average() -> list[Any]:
    cases = [({"avg_factor": 2.0, "reduction": r}, ValueError, f"avg_factor|reduction|{r}") for r in ("sum", "none")]
    return cases + bad_scalar("avg_factor")


def bad_features() -> list[Any]:
    """What both feature losses refuse, where student and teacher are lists of (2, 3, 4, 5) and (2, 3, 2, 2)."""

    def x(*shape: int, **options: Any) -> Tensor:
        return torch.zeros(shape, **options)

    first, second = x(2, 3, 4, 5), x(2, 3, 2, 2)
    return [
        ({"student": "x"}, TypeError, "student|str"),
        ({"student": [first, None]}, TypeError, "student[1]|NoneType"),
        ({"teacher": [first, 1.0]}, TypeError, "teacher[1]|float"),
        ({"student": [first.long(), second]}, TypeError, "student[0]|torch.int64"),
        ({"teacher": [first, second.bool()]}, TypeError, "teacher[1]|torch.bool"),
        ({"student": [], "teacher": []}, ValueError, "student|no levels"),
        ({"student": [first]}, ValueError, "student|teacher|1|2"),
        ({"student": [first, second[0]]}, ValueError, "student[1]|(N, C, H, W)|(3, 2, 2)"),
        ({"teacher": [first[None], second]}, ValueError, "teacher[0]|(N, C, H, W)|(1, 2, 3, 4, 5)"),
        ({"student": [first, x(1, 3, 2, 2)]}, ValueError, "student[1]|teacher[1]|(1, 3, 2, 2)|(2, 3, 2, 2)"),
        ({"teacher": [x(2, 1, 4, 5), second]}, ValueError, "student[0]|teacher[0]|(2, 1, 4, 5)|(2, 3, 4, 5)"),
        ({"teacher": [first, x(2, 3, 2, 2, requires_grad=True)]}, ValueError, "teacher[1]|detach"),
        ({"teacher": [first, x(2, 3, 2, 2, device="meta")]}, ValueError, "teacher[1]|meta|cpu"),
        (
            {"student": [first, x(2, 3, 2, 2, device="meta")], "teacher": [first, x(2, 3, 2, 2, device="meta")]},
            ValueError,
            "student[1]|meta|cpu",
        ),
        ({"student": {"a": first, "b": second}, "teacher": {"a": first, "c": second}}, ValueError, "teacher|'c'|'b'"),
        ({"level_reduction": "max"}, ValueError, "level_reduction|'mean'|'sum'|'max'"),
    ]


def zero_with_graph(loss: str, students: list[Tensor], value: Tensor) -> None:
    """A defined 0 that has a graph, and zero gradients."""
    assert value.requires_grad and value.detach().abs().sum() == 0, loss
    for student, grad in zip(students, torch.autograd.grad(value.sum(), students)):
        assert grad.shape == student.shape and torch.equal(grad, torch.zeros_like(student)), loss
