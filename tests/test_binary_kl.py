"""Binary KL for sigmoid heads: the error bound over the grid, the edges, the gradient's form, and bad input."""

from __future__ import annotations

import functools

import pytest
import torch
from case_inputs import ALIKE
from edges import FLOATS, INF
from grid import (
    bad_average,
    bad_positive,
    bad_rows,
    check_bad,
    check_case,
    check_layouts,
    check_mutants,
    check_nan_stays,
    check_teacher_constant,
    check_upstream,
    grid,
    run,
    zero_with_graph,
)
from numerics import check, error

import kdkernels as kd

LOSS = "binary_kl"
rows = functools.partial(kd.binary_kl_loss, temperature=2.0, reduction="none")


@pytest.mark.parametrize(("case", "pair"), grid(LOSS))
def test_error_bound(case, pair, backend):
    check_case(LOSS, case, pair)


@pytest.mark.parametrize("pair", ALIKE)
def test_mutants_are_caught(pair, backend):
    check_mutants(LOSS, "77x81", pair)


@pytest.mark.parametrize("pair", ALIKE)
def test_upstream_per_row(pair, backend):
    check_upstream(LOSS, "row weight", pair)
    check_upstream(LOSS, "2x5x3x81", pair)


@pytest.mark.parametrize("pair", ALIKE)
def test_gradient_has_the_students_layout(pair, backend):
    check_layouts(LOSS, pair, backend)


def test_teacher_gets_nothing(backend):
    check_teacher_constant(LOSS, "77x81")


def test_is_the_two_class_case_of_temperature_kl(backend):
    """softmax of [0, z] is [1 - sigmoid(z), sigmoid(z)]."""
    s, t = 3 * torch.randn(20, 1), 3 * torch.randn(20, 1)
    zeros = torch.zeros(20, 1)
    two = kd.temperature_kl_loss(torch.cat([zeros, s], 1), torch.cat([zeros, t], 1), temperature=2.0, reduction="none")
    torch.testing.assert_close(rows(s, t), two, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
def test_reductions_agree(reduction, backend):
    """Every reduction is the rows' sum over its divisor, weights and avg_factor included."""
    s, t, w = torch.randn(2, 3, 7), torch.randn(2, 3, 7), torch.rand(2, 3)
    each = rows(s, t)
    assert each.shape == (2, 3)
    divisor = {"batchmean": 6, "mean": 42, "sum": 1}
    found = kd.binary_kl_loss(s, t, temperature=2.0, weight=w, reduction=reduction)
    torch.testing.assert_close(found, each * w if reduction == "none" else (each * w).sum() / divisor[reduction])
    if reduction in ("batchmean", "mean"):
        found = kd.binary_kl_loss(s, t, temperature=2.0, weight=w, reduction=reduction, avg_factor=4)
        torch.testing.assert_close(found, (each * w).sum() / (4 if reduction == "batchmean" else 28))


@pytest.mark.parametrize("average", [0, 0.0, -3.0, torch.tensor(0.0), torch.tensor(-1.0)])
def test_avg_factor_of_nothing_gives_0(average, backend):
    student = torch.randn(3, 5, requires_grad=True)
    zero_with_graph(LOSS, [student], kd.binary_kl_loss(student, torch.randn(3, 5), avg_factor=average))


@FLOATS
@pytest.mark.parametrize("width", [1, 9, 2049])
def test_equal_sides_give_0(width, dtype, backend):
    x = (30 * torch.randn(6, width)).to(dtype)
    loss, grad = run(kd.binary_kl_loss, x, x.clone(), reduction="sum")
    assert loss == 0 and (grad.abs() <= 4 * torch.finfo(torch.float32).eps).all()


# Edges.


@FLOATS
@pytest.mark.parametrize("infinity", [INF, -INF])
def test_equal_infinities_give_0(infinity, dtype, backend):
    x = torch.full((2, 19), infinity, dtype=dtype)
    loss, grad = run(rows, x, x.clone())
    assert (loss == 0).all() and (grad == 0).all()


@FLOATS
@pytest.mark.parametrize("width", [1, 19])
@pytest.mark.parametrize("sign", [1, -1])
def test_infinite_teacher_is_a_certain_label(sign, width, dtype, backend):
    """With p = 1 (or 0) the loss is the cross-entropy of that label alone, T^2 softplus(-+ s / T)."""
    s = torch.linspace(-40, 40, width).expand(3, width).to(dtype)
    t = torch.full((3, width), sign * INF, dtype=dtype)
    loss, grad = run(rows, s, t)
    z = s.double() / 2
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert error(loss, 4 * torch.nn.functional.softplus(-sign * z).sum(-1)) <= 16 * eps
    expected = -sign * 2 * torch.sigmoid(-sign * z)
    assert error(grad, expected) <= 4 * torch.finfo(dtype).eps + 16 * eps


@FLOATS
@pytest.mark.parametrize("width", [1, 19])
@pytest.mark.parametrize("sign", [1, -1])
def test_ruled_out_by_the_student_is_infinite(sign, width, dtype, backend):
    """An infinite student logit against a finite teacher, or against the opposite infinity."""
    s, t = torch.randn(4, width).to(dtype), torch.randn(4, width).to(dtype)
    s[1, 0], s[2, 0], t[2, 0] = sign * INF, sign * INF, -sign * INF
    loss, grad = run(rows, s, t)
    assert (loss[1:3] == INF).all() and loss[[0, 3]].isfinite().all()
    expected = 2 * ((s.double() / 2).sigmoid() - (t.double() / 2).sigmoid())
    assert error(grad, expected) <= 16 * torch.finfo(dtype).eps


@FLOATS
def test_saturated_heads_keep_their_digits(dtype, backend):
    """sigmoid(+-60) is 1 or 0 in float32, yet gradient and loss of a distant other side are not lost."""
    s = torch.tensor([[60.0], [-60.0], [60.0], [50.0], [-50.0]], dtype=dtype)
    t = torch.tensor([[-60.0], [60.0], [50.0], [60.0], [-60.0]], dtype=dtype)
    check(kd.binary_kl_loss, s, t, reduction="none", temperature=3.0)
    check(kd.binary_kl_loss, s[2:], t[2:], reduction="none", temperature=3.0)


@FLOATS
@pytest.mark.parametrize(("width", "column"), [(5, 0), (81, 80), (2100, 2099)])
def test_nan_stays_in_its_row(width, column, dtype, backend):
    check_nan_stays(LOSS, width, column, dtype)


@pytest.mark.parametrize("width", [2, 81, 2500])
def test_huge_logits_stay_finite(width, backend):
    s, t = 1e34 * torch.randn(5, width), 1e34 * torch.randn(5, width)
    result = check(kd.binary_kl_loss, s, t, length=width, reduction="none")
    assert result.loss.isfinite().all() and result.grads[0].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 3)])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
def test_no_rows(shape, reduction, backend):
    student = torch.randn(shape, requires_grad=True)
    loss = kd.binary_kl_loss(student, torch.randn(shape), reduction=reduction, weight=torch.ones(shape[:-1]))
    assert loss.shape == (shape[:-1] if reduction == "none" else ())
    zero_with_graph(LOSS, [student], loss)


BAD = bad_rows(5) + bad_positive("temperature") + bad_average()


@pytest.mark.parametrize(("change", "error_type", "message"), BAD)
def test_bad_input(change, error_type, message):
    base = {"student": torch.zeros(3, 5, requires_grad=True), "teacher": torch.zeros(3, 5)}
    check_bad(LOSS, base, change, error_type, message)
