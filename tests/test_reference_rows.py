"""Each edge rule of the row formulas by its own test: infinities, ignored and wrong labels, divisors, no rows."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

from kdkernels import reference as ref

INF, NAN = float("inf"), float("nan")
KLS = {"temperature_kl": ref.temperature_kl_loss, "binary_kl": ref.binary_kl_loss}


def f64(*values) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rows_and_gradient(function, student: Tensor, teacher: Tensor, **keywords) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    rows = function(student, teacher, reduction="none", **keywords)
    return rows.detach(), grad(rows.sum(), student)[0]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15, equal_nan=True)


# Softmax rows, at a temperature that is no power of two, so that dividing by it rounds.

T = 3.0

SOFTMAX = {
    "temperature_kl": partial(ref.temperature_kl_loss, temperature=T),
    "decoupled_kl": lambda s, t, **k: ref.decoupled_kl_loss(
        s, t, torch.ones(s.shape[:-1], dtype=torch.bool), foreground_temperature=T, **k
    ),
    "soft_cross_entropy": partial(ref.soft_cross_entropy_loss, temperature=T),
}
softmax_losses = pytest.mark.parametrize("name", list(SOFTMAX))


def gradient_by_hand(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    factor = 1 / T if name == "soft_cross_entropy" else T
    return factor * ((student / T).softmax(-1) - (teacher / T).softmax(-1))


@softmax_losses
def test_a_class_that_the_teacher_rules_out_contributes_nothing(name):
    student, teacher = f64([0.3, -INF, 1.0], [0.3, 0.7, 1.0]), f64([0.1, -INF, 0.2], [0.1, -INF, 0.2])
    rows, gradient = rows_and_gradient(SOFTMAX[name], student, teacher)
    alone, _ = rows_and_gradient(SOFTMAX[name], student[:1, [0, 2]], teacher[:1, [0, 2]])
    close(rows[:1], alone)
    assert rows.isfinite().all() and gradient[0, 1] == 0 and gradient[1, 1] > 0
    close(gradient, gradient_by_hand(name, student, teacher))


@softmax_losses
def test_a_class_that_the_student_alone_rules_out_is_infinite(name):
    student, teacher = f64([0.3, -INF, 1.0]), f64([0.1, 0.5, 0.2])
    rows, gradient = rows_and_gradient(SOFTMAX[name], student, teacher)
    assert rows == INF
    close(gradient, gradient_by_hand(name, student, teacher))


@softmax_losses
def test_a_row_that_is_all_infinite_is_zero_and_counts(name):
    student, teacher = torch.randn(3, 4).double(), torch.randn(3, 4).double()
    student[0], teacher[1] = -INF, -INF
    rows, gradient = rows_and_gradient(SOFTMAX[name], student, teacher)
    assert (rows[:2] == 0).all() and (gradient[:2] == 0).all()
    assert rows[2] > 0 and gradient[2].abs().max() > 0
    reduction = "batchmean" if name == "temperature_kl" else "mean"
    close(SOFTMAX[name](student, teacher, reduction=reduction), rows[2] / 3)


@pytest.mark.parametrize("name", [*SOFTMAX, "binary_kl"])
def test_nan_stays_in_its_row(name):
    function = {**SOFTMAX, **KLS}[name]
    student, teacher = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    clean, clean_gradient = rows_and_gradient(function, student, teacher)
    student[1, 2] = NAN
    teacher[2, 0] = NAN
    rows, gradient = rows_and_gradient(function, student, teacher)
    assert rows[1:3].isnan().all() and gradient[1:3].isnan().any(1).all()
    close(rows[[0, 3]], clean[[0, 3]])
    close(gradient[[0, 3]], clean_gradient[[0, 3]])


@softmax_losses
def test_the_second_derivative_is_finite_at_infinities(name):
    student = f64([0.3, -INF, 1.0], [-INF, -INF, -INF], [0.1, 0.2, -INF]).requires_grad_()
    teacher = f64([0.1, -INF, 0.2], [0.0, 1.0, 2.0], [-INF, -INF, -INF])
    (first,) = grad(SOFTMAX[name](student, teacher, reduction="sum"), student, create_graph=True)
    (second,) = grad((first * torch.arange(9.0).reshape(3, 3)).sum(), student)
    assert second.isfinite().all() and second[0].abs().max() > 0 and (second[1:] == 0).all()


@softmax_losses
def test_large_offsets_cancel(name):
    """Steps of 1/64 stay exact under an offset of 1e4 in float32, so nothing may change at all."""
    student, teacher = (torch.randint(-128, 128, (5, 7)) / 64 for _ in range(2))
    rows, gradient = rows_and_gradient(SOFTMAX[name], student, teacher)
    shifted, shifted_gradient = rows_and_gradient(SOFTMAX[name], student + 1e4, teacher - 1e4)
    assert torch.equal(rows, shifted) and torch.equal(gradient, shifted_gradient)


# Binary KL.


def test_binary_kl_is_the_kl_of_two_outcomes():
    student, teacher = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    pair = [torch.stack([x, torch.zeros_like(x)], -1) for x in (student, teacher)]
    expected = ref.temperature_kl_loss(*pair, temperature=3.0, reduction="none").sum(-1)
    close(ref.binary_kl_loss(student, teacher, temperature=3.0, reduction="none"), expected)


def test_binary_kl_at_infinities():
    # teacher certain, student certain alike; certain otherwise; undecided; and the teacher undecided, student certain
    student, teacher = f64([-INF], [INF], [INF], [0.0], [0.0], [-INF]), f64([-INF], [INF], [-INF], [-INF], [INF], [0.0])
    rows, gradient = rows_and_gradient(ref.binary_kl_loss, student, teacher)
    close(rows, f64(0, 0, INF, math.log(2), math.log(2), INF))
    close(gradient, student.sigmoid() - teacher.sigmoid())


def test_binary_kl_keeps_the_digits_of_saturated_logits():
    rows, gradient = rows_and_gradient(ref.binary_kl_loss, torch.tensor([[40.0]]), torch.tensor([[30.0]]))
    p, q = math.exp(-30), math.exp(-40)
    assert gradient.item() == pytest.approx(p - q, rel=1e-5)
    assert rows.item() == pytest.approx(10 * p - (p - q), rel=1e-5)


# Labels.


def test_ignored_rows_give_zero_and_do_not_count():
    student, teacher = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    student[1] = NAN
    target = torch.tensor([2, 7, 0, 7])
    hard = partial(ref.soft_cross_entropy_loss, target=target, hard_weight=0.25, ignore_index=7)
    rows, gradient = rows_and_gradient(hard, student, teacher)
    assert (rows[[1, 3]] == 0).all() and (gradient[[1, 3]] == 0).all() and (rows[[0, 2]] > 0).all()
    close(hard(student, teacher), rows.sum() / 2)


def test_all_ignored_is_zero_with_a_graph():
    student = torch.randn(4, 3).requires_grad_()
    loss = ref.soft_cross_entropy_loss(student, torch.randn(4, 3), target=torch.full((4,), -100), hard_weight=0.5)
    assert loss == 0 and (grad(loss, student)[0] == 0).all()


@pytest.mark.parametrize("label", [-1, 3, 2**40])
@pytest.mark.parametrize("hard_weight", [0.0, 0.5, 1.0])
def test_a_label_out_of_range_makes_its_row_nan(label, hard_weight):
    student, teacher = torch.randn(3, 3).double(), torch.randn(3, 3).double()
    hard = partial(ref.soft_cross_entropy_loss, hard_weight=hard_weight)
    clean, clean_gradient = rows_and_gradient(hard, student, teacher, target=torch.tensor([0, 1, 2]))
    rows, gradient = rows_and_gradient(hard, student, teacher, target=torch.tensor([0, label, 2]))
    assert rows[1].isnan() and gradient[1].isnan().all()
    close(rows[[0, 2]], clean[[0, 2]])
    close(gradient[[0, 2]], clean_gradient[[0, 2]])


def test_the_hard_part_is_plain_cross_entropy():
    student, teacher, target = (
        torch.randn(6, 4).double(),
        torch.randn(6, 4).double(),
        torch.tensor([0, 3, -100, 1, 1, 2]),
    )
    classes = torch.tensor([1.0, 2.0, 3.0, 4.0])
    mixed = partial(ref.soft_cross_entropy_loss, target=target, class_weight=classes, temperature=3.0)
    close(mixed(student, teacher, hard_weight=1.0), torch.nn.functional.cross_entropy(student, target))
    halves = (mixed(student, teacher, hard_weight=1.0) + mixed(student, teacher, hard_weight=0.0)) / 2
    close(mixed(student, teacher, hard_weight=0.5), halves)


def test_a_part_that_is_switched_off_gives_nothing():
    student, teacher = f64([0.5, -INF, 0.1]), f64([0.3, 0.3, 0.3])  # soft part: infinite
    on, gradient = rows_and_gradient(
        ref.soft_cross_entropy_loss, student, teacher, target=torch.tensor([0]), hard_weight=1.0
    )
    assert on.item() == pytest.approx(math.log(1 + math.exp(-0.4)), rel=1e-12) and gradient.isfinite().all()


def test_a_class_weight_of_zero_contributes_nothing():
    student, teacher = f64([0.5, -INF, 0.1]), f64([0.3, 0.4, 0.3])
    rows, gradient = rows_and_gradient(ref.soft_cross_entropy_loss, student, teacher, class_weight=f64(1, 0, 1))
    assert rows.isfinite().all() and rows > 0 and gradient.isfinite().all()


# Reductions and weights.


@pytest.mark.parametrize("name", list(KLS))
def test_reductions_of_the_kls(name):
    student, teacher, weight = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).double(), torch.rand(2, 3).double()
    function = partial(KLS[name], student, teacher)
    rows = function(reduction="none")
    assert rows.shape == (2, 3)
    total = (rows * weight).sum()
    close(function(reduction="none", weight=weight), rows * weight)
    close(function(reduction="sum", weight=weight), total)
    close(function(weight=weight), total / 6)
    close(function(reduction="mean", weight=weight), total / 24)
    close(function(avg_factor=2.5, weight=weight), total / 2.5)
    close(function(reduction="mean", avg_factor=2.5, weight=weight), total / 10)


def test_decoupled_kl_divides_each_region_by_its_own_rows():
    student, teacher = torch.randn(5, 4).double(), torch.randn(5, 4).double()
    inside, weight = torch.tensor([True, False, False, True, False]), torch.rand(5).double()
    settings = {"foreground_weight": 0.3, "background_weight": 2.0, "foreground_temperature": 3.0, "weight": weight}
    f = ref.temperature_kl_loss(student, teacher, temperature=3.0, reduction="none") * 0.3 * weight
    b = ref.temperature_kl_loss(student, teacher, reduction="none") * 2.0 * weight
    loss = partial(ref.decoupled_kl_loss, student, teacher, inside, **settings)
    close(loss(), f[inside].sum() / 2 + b[~inside].sum() / 3)
    close(loss(reduction="sum"), f[inside].sum() + b[~inside].sum())
    close(loss(reduction="none"), torch.where(inside, f, b))


@pytest.mark.parametrize("divisor", [0.0, -1.0, torch.tensor(0.0), torch.tensor(-2.0)], ids=str)
@pytest.mark.parametrize("name", [*KLS, "soft_cross_entropy", "bounded_regression"])
def test_no_divisor_gives_zero_with_a_graph(name, divisor):
    student, teacher = torch.randn(3, 4).requires_grad_(), torch.randn(3, 4)
    arguments = (torch.randn(3, 4),) if name == "bounded_regression" else ()
    loss = getattr(ref, f"{name}_loss")(student, teacher, *arguments, avg_factor=divisor)
    assert loss == 0 and (grad(loss, student)[0] == 0).all()


def test_gradients_reach_weights():
    weight, factor = torch.tensor(0.7, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    rows = torch.rand(3, requires_grad=True)
    student, teacher, target = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 4)
    loss = ref.bounded_regression_loss(
        student, teacher, target, smooth_l1_weight=weight, bound_weight=0.0, avg_factor=factor, weight=rows
    )
    found = grad(loss, (weight, factor, rows))
    each = torch.nn.functional.smooth_l1_loss(student, target, reduction="none").sum(-1)
    for gradient, expected in zip(found, (loss / weight, -loss / factor, 0.7 * each / 2)):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=0)


# Nothing at all.


@pytest.mark.parametrize(
    "name", ["temperature_kl", "decoupled_kl", "soft_cross_entropy", "binary_kl", "bounded_regression"]
)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(name, reduction):
    student, teacher = torch.randn(0, 4).requires_grad_(), torch.randn(0, 4)
    third = {"decoupled_kl": (torch.zeros(0, dtype=torch.bool),), "bounded_regression": (torch.zeros(0, 4),)}
    gates = [{"gate": g} for g in ("row", "element", "batch")] if name == "bounded_regression" else [{}]
    for gate in gates:
        function = partial(getattr(ref, f"{name}_loss"), student, teacher, *third.get(name, ()), **gate)
        loss = function(reduction=reduction)
        assert loss.shape == ((0,) if reduction == "none" else ()) and (loss == 0).all() and loss.requires_grad
        assert grad(loss.sum(), student)[0].shape == (0, 4)


@pytest.mark.parametrize("inside", [True, False])
def test_an_empty_region_of_rows(inside):
    student, teacher = torch.randn(3, 4).requires_grad_(), torch.randn(3, 4)
    foreground = torch.full((3,), inside)
    off = {"foreground_weight" if inside else "background_weight": 0.0}
    loss = ref.decoupled_kl_loss(student, teacher, foreground, **off)
    assert loss == 0 and (grad(loss, student)[0] == 0).all()


# The gate.


def test_the_gate_is_strict():
    target, student = f64([0.0, 0.0, 0.0, 0.0]), f64([1.0, 0.0, 0.0, 0.0])
    bound = partial(ref.bounded_regression_loss, bound_weight=1.0, smooth_l1_weight=0.0)
    for gate in ("row", "element", "batch"):
        assert bound(student, -student, target, gate=gate) == 0  # as good as the teacher
        assert bound(student, -student, target, gate=gate, margin=1e-9) == 1
        assert bound(student, -2 * student, target, gate=gate, margin=1e-9) == 0


@pytest.mark.parametrize("gate", ["row", "element", "batch"])
def test_a_closed_gate_has_no_gradient(gate):
    student = torch.randn(3, 4).requires_grad_()
    loss = ref.bounded_regression_loss(
        student, torch.full((3, 4), 99.0), torch.zeros(3, 4), gate=gate, smooth_l1_weight=0
    )
    assert loss == 0 and (grad(loss, student)[0] == 0).all()
