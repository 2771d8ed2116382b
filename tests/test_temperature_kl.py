"""Temperature KL: the error bound over the grid, the edges, the gradient's form, CWD's use of it, and bad input."""

from __future__ import annotations

import functools

import pytest
import torch
from case_inputs import ALIKE, extreme
from edges import FLOATS, INF, check_late_maximum, check_no_probability, check_rows_of_nothing, check_ruled_out
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
from numerics import check

import kdkernels as kd

LOSS = "temperature_kl"


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


ODD = [("float32", "float64"), ("bfloat16", "float16"), ("float64", "bfloat16")]


@pytest.mark.parametrize(("student", "teacher"), ODD)
def test_odd_pairs_are_served_by_the_formula(student, teacher):
    s, t = torch.randn(5, 7).to(getattr(torch, student)), torch.randn(5, 7).to(getattr(torch, teacher))
    loss = check(kd.temperature_kl_loss, s, t, length=35).loss
    assert loss.dtype == (torch.float64 if "float64" in (student, teacher) else torch.float32)
    with kd.use_backend("cpu"), pytest.raises(RuntimeError, match=f"temperature_kl.*{student}.*{teacher}.*cpu"):
        kd.temperature_kl_loss(s, t)


def test_forward_kl_not_reverse(backend):
    """KL(teacher || student), by hand: p_t = (1/2, 1/2), p_s = (1/4, 3/4)."""
    student, teacher = torch.tensor([[0.25, 0.75]]).log(), torch.zeros(1, 2)
    expected = 0.5 * (torch.tensor(2.0).log() + torch.tensor(2 / 3).log())
    torch.testing.assert_close(kd.temperature_kl_loss(student, teacher), expected)


@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
def test_reductions_agree(reduction, backend):
    """Every reduction is the rows' sum over its divisor, weights and avg_factor included."""
    s, t, w = torch.randn(2, 3, 7), torch.randn(2, 3, 7), torch.rand(2, 3)
    rows = kd.temperature_kl_loss(s, t, temperature=2.0, reduction="none")
    assert rows.shape == (2, 3)
    divisor = {"batchmean": 6, "mean": 42, "sum": 1}
    found = kd.temperature_kl_loss(s, t, temperature=2.0, weight=w, reduction=reduction)
    torch.testing.assert_close(found, rows * w if reduction == "none" else (rows * w).sum() / divisor[reduction])
    if reduction in ("batchmean", "mean"):
        found = kd.temperature_kl_loss(s, t, temperature=2.0, weight=w, reduction=reduction, avg_factor=4)
        torch.testing.assert_close(found, (rows * w).sum() / (4 if reduction == "batchmean" else 28))


@pytest.mark.parametrize("average", [0, 0.0, -3.0, torch.tensor(0.0), torch.tensor(-1.0)])
def test_avg_factor_of_nothing_gives_0(average, backend):
    student = torch.randn(3, 5, requires_grad=True)
    zero_with_graph(LOSS, [student], kd.temperature_kl_loss(student, torch.randn(3, 5), avg_factor=average))


@FLOATS
@pytest.mark.parametrize("width", [1, 9, 81, 2049])
def test_equal_sides_give_0(width, dtype, backend):
    """The loss is exactly 0; the gradient too, up to the rounding of probabilities, which are at most 1."""
    x = (3 * torch.randn(6, width)).to(dtype)
    loss, grad = run(kd.temperature_kl_loss, x, x.clone(), reduction="sum")
    assert loss == 0
    assert grad.abs().max() <= 4 * torch.finfo(torch.float32 if dtype == torch.bfloat16 else dtype).eps


# Edges.


rows = functools.partial(kd.temperature_kl_loss, temperature=2.0, reduction="none")


@FLOATS
@pytest.mark.parametrize("width", [3, 40, 2100])
@pytest.mark.parametrize("teacher", [-INF, -3e4])
@pytest.mark.parametrize("student", [-INF, 2.0, -1e4])
def test_no_probability_contributes_nothing(student, teacher, width, dtype, backend):
    check_no_probability(rows, dtype, width, student, teacher, entropy=True, scale=4)


@FLOATS
def test_late_maximum_leaves_no_probability(dtype, backend):
    check_late_maximum(rows, dtype, entropy=True, scale=4)


@FLOATS
@pytest.mark.parametrize("width", [3, 2500])
def test_ruled_out_by_the_student_is_infinite(width, dtype, backend):
    check_ruled_out(rows, dtype, width, scale=4)


@FLOATS
@pytest.mark.parametrize("width", [1, 5, 2100])
def test_rows_of_nothing_give_0(width, dtype, backend):
    check_rows_of_nothing(rows, dtype, width)


def test_rows_of_nothing_count(backend):
    s, t = torch.randn(4, 5), torch.randn(4, 5)
    s[1], t[2] = -INF, -INF
    torch.testing.assert_close(kd.temperature_kl_loss(s, t), kd.temperature_kl_loss(s[[0, 3]], t[[0, 3]]) / 2)


@FLOATS
@pytest.mark.parametrize(("width", "column"), [(5, 0), (81, 80), (2100, 3), (2100, 2099)])
def test_nan_stays_in_its_row(width, column, dtype, backend):
    check_nan_stays(LOSS, width, column, dtype)


def test_nan_in_the_teacher_of_a_finite_student_reaches_the_mean(backend):
    s, t = torch.randn(3, 5), torch.randn(3, 5)
    t[1, 1] = float("nan")
    assert kd.temperature_kl_loss(s, t).isnan()


@pytest.mark.parametrize("width", [2, 81, 2500])
def test_huge_logits_stay_finite(width, backend):
    s, t = (x * 0.3 for x in extreme(torch.Generator().manual_seed(1), (5, width), (torch.float32,) * 2))
    result = check(kd.temperature_kl_loss, s, t, length=width, reduction="none")
    assert result.loss.isfinite().all() and result.grads[0].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 3), (0, 1)])
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum", "none"])
def test_no_rows(shape, reduction, backend):
    student = torch.randn(shape, requires_grad=True)
    weight = torch.ones(shape[:-1])
    loss = kd.temperature_kl_loss(student, torch.randn(shape), weight=weight, reduction=reduction)
    assert loss.shape == (shape[:-1] if reduction == "none" else ())
    zero_with_graph(LOSS, [student], loss)


def test_many_leading_dimensions(backend):
    """Eight, as many as a kernel has strides for, in an order that cannot be merged as well."""
    s, t = torch.randn(2, 2, 2, 2, 2, 1, 2, 2, 5), torch.randn(2, 2, 2, 2, 2, 1, 2, 2, 5)
    check(kd.temperature_kl_loss, s, t, length=640)
    order = (7, 1, 6, 3, 5, 0, 2, 4, 8)
    check(kd.temperature_kl_loss, s.permute(order), t.permute(order), length=640)


def test_channel_wise_distillation(backend):
    """CWD (Shu et al. 2021): each channel's positions are the classes."""
    s, t, tau = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), 4.0
    p_t = (t.double().flatten(2) / tau).softmax(-1)
    expected = tau**2 / 6 * (p_t * (p_t.log() - (s.double().flatten(2) / tau).log_softmax(-1))).sum()
    found = kd.temperature_kl_loss(s.flatten(2), t.flatten(2), temperature=tau)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


BAD = bad_rows(5) + bad_positive("temperature") + bad_average()


@pytest.mark.parametrize(("change", "error_type", "message"), BAD)
def test_bad_input(change, error_type, message):
    base = {"student": torch.zeros(3, 5, requires_grad=True), "teacher": torch.zeros(3, 5)}
    check_bad(LOSS, base, change, error_type, message)
