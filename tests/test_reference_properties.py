"""The formulas are right to second order, under functorch and torch.compile, and keep the rules for empty inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import grad, gradcheck, gradgradcheck

from kdkernels import reference as ref


def randn(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


def features(formula: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """One level in, as one tensor."""
    return lambda s, t: formula([s], [t])


def formulas() -> dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]]:
    """Name -> (loss of student and teacher, with every keyword that changes the arithmetic; shape of either)."""
    mask = torch.rand(2, 3, 4)
    foreground = torch.tensor([True, False, True, True, False])
    target, rows = torch.tensor([0, 3, -100, 1, 2]), torch.rand(5)
    classes = torch.tensor([1.0, 0.0, 2.0, 0.5])
    box = randn(5, 4)
    masked = partial(ref.masked_mse_loss, masks=[mask], foreground_weight=2.0, background_weight=0.3)
    bounded = partial(ref.bounded_regression_loss, target=box, margin=0.1, beta=0.7, weight=rows)
    decoupled = partial(ref.decoupled_kl_loss, foreground=foreground, foreground_weight=0.4, foreground_temperature=3.0)
    soft = partial(ref.soft_cross_entropy_loss, class_weight=classes, temperature=2.0, weight=rows)
    return {
        "masked_mse": (features(masked), (2, 3, 3, 4)),
        "masked_mse pixels": (features(partial(masked, normalizer="pixels")), (2, 3, 3, 4)),
        "masked_mse batch": (features(partial(masked, normalizer="batch")), (2, 3, 3, 4)),
        "pearson": (features(ref.pearson_loss), (2, 3, 3, 4)),
        "pearson large mean": (lambda s, t: ref.pearson_loss([s + 1e4], [t - 1e4]), (2, 3, 3, 4)),
        "temperature_kl": (partial(ref.temperature_kl_loss, temperature=3.0, weight=rows), (5, 4)),
        "temperature_kl mean": (partial(ref.temperature_kl_loss, reduction="mean", avg_factor=2.5), (5, 4)),
        "decoupled_kl": (partial(decoupled, weight=rows), (5, 4)),
        "decoupled_kl sum": (partial(decoupled, reduction="sum"), (5, 4)),
        "soft_cross_entropy": (soft, (5, 4)),
        "soft_cross_entropy hard": (partial(soft, target=target, hard_weight=0.3), (5, 4)),
        "binary_kl": (partial(ref.binary_kl_loss, temperature=2.0, weight=rows), (5, 4)),
        "bounded_regression row": (bounded, (5, 4)),
        "bounded_regression element": (partial(bounded, gate="element"), (5, 4)),
        "bounded_regression batch": (partial(bounded, gate="batch"), (5, 4)),
    }


NAMES = list(formulas())


@pytest.fixture(params=NAMES)
def formula(request):
    function, shape = formulas()[request.param]
    return function, shape


def test_first_and_second_derivatives(formula):
    function, shape = formula
    student, teacher = randn(*shape).requires_grad_(), randn(*shape)
    assert gradcheck(lambda s: function(s, teacher), student, check_forward_ad=True)
    assert gradgradcheck(lambda s: function(s, teacher), student)


def test_the_teacher_is_a_constant(formula):
    function, shape = formula
    student, teacher = randn(*shape).requires_grad_(), randn(*shape).requires_grad_()
    found = grad(function(student, teacher), (student, teacher), allow_unused=True)
    assert found[0] is not None and found[0].abs().max() > 0 and found[1] is None


def test_functorch(formula):
    function, shape = formula
    students, teachers = randn(3, *shape), randn(3, *shape)
    values, gradients = [], []
    for s, t in zip(students, teachers):
        leaf = s.clone().requires_grad_()
        values.append(function(leaf, t))
        gradients.append(grad(values[-1], leaf)[0])
    exact = {"rtol": 1e-10, "atol": 1e-13}  # the same float64 arithmetic, summed in another order
    torch.testing.assert_close(torch.func.vmap(function)(students, teachers), torch.stack(values).detach(), **exact)
    per_sample = torch.func.vmap(torch.func.grad(function))(students, teachers)
    torch.testing.assert_close(per_sample, torch.stack(gradients), **exact)
    tangent = randn(*shape)
    _, slope = torch.func.jvp(lambda s: function(s, teachers[0]), (students[0],), (tangent,))
    torch.testing.assert_close(slope, (gradients[0] * tangent).sum(), **exact)


def test_hessian(formula):
    function, shape = formula
    student, teacher = randn(*shape), randn(*shape)
    found = torch.func.hessian(lambda s: function(s, teacher))(student)
    expected = torch.autograd.functional.hessian(lambda s: function(s, teacher), student)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "pearson large mean"])  # adds in the narrow dtype
def test_narrow_inputs_are_computed_in_float32(name, dtype):
    function, shape = formulas()[name]
    student, teacher = randn(*shape).to(dtype).requires_grad_(), randn(*shape).to(dtype)
    loss = function(student, teacher)
    (found,) = grad(loss, student)
    exact = student.detach().double().requires_grad_()
    expected = function(exact, teacher.double())
    (wanted,) = grad(expected, exact)
    assert loss.dtype == torch.float32 and found.dtype == dtype and expected.dtype == torch.float64
    assert function(student, teacher.double()).dtype == torch.float64
    # float32 roundings of some tens of operations, and for the gradient one rounding to the student's dtype.
    slack = 100 * torch.finfo(torch.float32).eps
    assert loss.item() == pytest.approx(expected.item(), rel=slack)
    assert (found.double() - wanted).abs().max() <= (slack + torch.finfo(dtype).eps) * wanted.abs().max()


@pytest.mark.parametrize("name", ["masked_mse", "pearson", "decoupled_kl", "soft_cross_entropy hard"])
def test_compiles_without_a_break(name):
    function, shape = formulas()[name]
    student, teacher = randn(*shape).requires_grad_(), randn(*shape)
    expected = function(student, teacher)
    found = torch.compile(function, fullgraph=True, backend="aot_eager")(student, teacher)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad(found, student), grad(expected, student), rtol=1e-10, atol=1e-14)
