"""Decoupled KL: the error bound over the grid, its two regions, the edges, the gradient's form, and bad input."""

from __future__ import annotations

import functools

import pytest
import torch
from case_inputs import ALIKE
from edges import FLOATS, INF, check_late_maximum, check_no_probability, check_rows_of_nothing, check_ruled_out
from grid import (
    bad_positive,
    bad_rows,
    bad_scalar,
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

import kdkernels as kd

LOSS = "decoupled_kl"


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


def test_regions_are_temperature_kl_of_their_rows(backend):
    """Each region is temperature KL over its own rows, divided by its own number of rows."""
    s, t, f = torch.randn(50, 9), torch.randn(50, 9), torch.rand(50) < 0.3
    foreground = kd.temperature_kl_loss(s[f], t[f], temperature=3.0)
    background = kd.temperature_kl_loss(s[~f], t[~f], temperature=2.0)
    options = {"foreground_temperature": 3.0, "background_temperature": 2.0}
    both = kd.decoupled_kl_loss(s, t, f, foreground_weight=0.05, background_weight=2.0, **options)
    torch.testing.assert_close(both, 0.05 * foreground + 2 * background)
    torch.testing.assert_close(kd.decoupled_kl_loss(s, t, f, background_weight=0.0, **options), foreground)
    torch.testing.assert_close(kd.decoupled_kl_loss(s, t, f, foreground_weight=0, **options), background)


def test_reductions_agree(backend):
    """ "none" has region weight, row weight and T^2, and no division; the counts are not weighted."""
    s, t, f, w = torch.randn(2, 25, 9), torch.randn(2, 25, 9), torch.rand(2, 25) < 0.3, torch.rand(2, 25)
    call = functools.partial(kd.decoupled_kl_loss, s, t, f, foreground_weight=0.5, foreground_temperature=3.0)
    rows = call(reduction="none")
    assert rows.shape == (2, 25)
    torch.testing.assert_close(call(reduction="none", weight=w), rows * w)
    torch.testing.assert_close(call(reduction="sum", weight=w), (rows * w).sum())
    expected = (rows * w)[f].sum() / f.sum() + (rows * w)[~f].sum() / (~f).sum()
    torch.testing.assert_close(call(weight=w), expected)


@pytest.mark.parametrize("foreground", [True, False])
@FLOATS
def test_a_region_without_rows_gives_0(foreground, dtype, backend):
    """No foreground or no background: the other region alone; of weight 0, an exact 0 with a graph."""
    s, t, f = torch.randn(7, 5).to(dtype), torch.randn(7, 5).to(dtype), torch.full((7,), not foreground)
    empty, other = (
        ("foreground_weight", "background_weight") if foreground else ("background_weight", "foreground_weight")
    )
    loss, grad = run(kd.decoupled_kl_loss, s, t, f, **{empty: 1e3})
    alone, alone_grad = run(kd.temperature_kl_loss, s, t)
    torch.testing.assert_close(loss, alone)
    torch.testing.assert_close(grad, alone_grad)
    student = s.clone().requires_grad_()
    zero_with_graph(LOSS, [student], kd.decoupled_kl_loss(student, t, f, **{empty: 1e3, other: 0.0}))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(shape, reduction, backend):
    student = torch.randn(shape, requires_grad=True)
    f = torch.zeros(shape[:-1], dtype=torch.bool)
    loss = kd.decoupled_kl_loss(student, torch.randn(shape), f, reduction=reduction, weight=torch.ones(shape[:-1]))
    assert loss.shape == (shape[:-1] if reduction == "none" else ())
    zero_with_graph(LOSS, [student], loss)


@FLOATS
@pytest.mark.parametrize("width", [1, 9, 81, 2049])
def test_equal_sides_give_0(width, dtype, backend):
    """The loss is exactly 0; the gradient too, up to the rounding of probabilities, which are at most 1."""
    x = (3 * torch.randn(6, width)).to(dtype)
    loss, grad = run(kd.decoupled_kl_loss, x, x.clone(), torch.rand(6) < 0.5, reduction="sum")
    assert loss == 0
    assert grad.abs().max() <= 4 * torch.finfo(torch.float32 if dtype == torch.bfloat16 else dtype).eps


# Edges, in either region at temperature 2.


def region_rows(inside: bool):
    def rows(s, t):
        f = torch.full(s.shape[:-1], inside)
        names = ("foreground_temperature", "background_temperature")
        return kd.decoupled_kl_loss(s, t, f, reduction="none", **{names[0]: 2.0 if inside else 5.0, names[1]: 2.0})

    return rows


REGIONS = pytest.mark.parametrize("rows", [region_rows(True), region_rows(False)], ids=["foreground", "background"])


@REGIONS
@FLOATS
@pytest.mark.parametrize("width", [3, 2100])
@pytest.mark.parametrize("teacher", [-INF, -3e4])
@pytest.mark.parametrize("student", [-INF, 2.0])
def test_no_probability_contributes_nothing(student, teacher, width, dtype, rows, backend):
    check_no_probability(rows, dtype, width, student, teacher, entropy=True, scale=4)


@REGIONS
@FLOATS
def test_late_maximum_leaves_no_probability(dtype, rows, backend):
    check_late_maximum(rows, dtype, entropy=True, scale=4)


@REGIONS
@FLOATS
@pytest.mark.parametrize("width", [3, 2500])
def test_ruled_out_by_the_student_is_infinite(width, dtype, rows, backend):
    check_ruled_out(rows, dtype, width, scale=4)


@REGIONS
@FLOATS
@pytest.mark.parametrize("width", [1, 5, 2100])
def test_rows_of_nothing_give_0(width, dtype, rows, backend):
    check_rows_of_nothing(rows, dtype, width)


def test_rows_of_nothing_count(backend):
    s, t, f = torch.randn(4, 5), torch.randn(4, 5), torch.tensor([True, True, False, False])
    s[1], t[2] = -INF, -INF
    found, alone = kd.decoupled_kl_loss(s, t, f), kd.decoupled_kl_loss(s[[0, 3]], t[[0, 3]], f[[0, 3]])
    torch.testing.assert_close(found, alone / 2)


@FLOATS
@pytest.mark.parametrize(("width", "column"), [(5, 0), (81, 80), (2100, 3)])
def test_nan_stays_in_its_row(width, column, dtype, backend):
    check_nan_stays(LOSS, width, column, dtype, foreground=torch.tensor([True, False, True, False, True]))


BAD = bad_rows(5) + bad_scalar("foreground_weight") + bad_scalar("background_weight")
BAD += bad_positive("foreground_temperature") + bad_positive("background_temperature")
BAD += [
    ({"foreground": torch.ones(3)}, ValueError, "foreground|bool|torch.float32"),
    ({"foreground": torch.ones(3, dtype=torch.int64)}, ValueError, "foreground|bool|torch.int64"),
    ({"foreground": [True, False, True]}, TypeError, "foreground|list"),
    ({"foreground": torch.ones(3, 1, dtype=torch.bool)}, ValueError, "foreground|(3,)|(3, 1)"),
    ({"foreground": torch.tensor(True)}, ValueError, "foreground|(3,)|()"),
    ({"foreground": torch.ones(3, dtype=torch.bool, device="meta")}, ValueError, "foreground|meta|cpu"),
    ({"reduction": "batchmean"}, ValueError, "reduction|'mean'|'batchmean'"),
]


@pytest.mark.parametrize(("change", "error_type", "message"), BAD)
def test_bad_input(change, error_type, message):
    base = {"student": torch.zeros(3, 5, requires_grad=True), "teacher": torch.zeros(3, 5)}
    check_bad(LOSS, {**base, "foreground": torch.tensor([True, False, True])}, change, error_type, message)
