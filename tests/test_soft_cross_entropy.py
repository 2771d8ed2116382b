"""Soft cross-entropy: the error bound over the grid, labels, class weights, edges, layouts, and bad input."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from case_inputs import ALIKE
from edges import FLOATS, INF, check_late_maximum, check_no_probability, check_rows_of_nothing, check_ruled_out
from grid import (
    bad_average,
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
from numerics import check, error

import kdkernels as kd

LOSS = "soft_cross_entropy"
soft_rows = functools.partial(kd.soft_cross_entropy_loss, temperature=2.0, reduction="none")
WIDTHS = pytest.mark.parametrize("width", [3, 81, 2500])


@pytest.mark.parametrize(("case", "pair"), grid(LOSS))
def test_error_bound(case, pair, backend):
    check_case(LOSS, case, pair)


@pytest.mark.parametrize("pair", ALIKE)
@pytest.mark.parametrize("name", ["77x81", "class weight", "temperature 1 mixed"])
def test_mutants_are_caught(name, pair, backend):
    check_mutants(LOSS, name, pair)


@pytest.mark.parametrize("pair", ALIKE)
def test_upstream_per_row(pair, backend):
    check_upstream(LOSS, "row weight", pair)
    check_upstream(LOSS, "2x5x3x81", pair)


@pytest.mark.parametrize("pair", ALIKE)
def test_gradient_has_the_students_layout(pair, backend):
    check_layouts(LOSS, pair, backend)


def test_teacher_gets_nothing(backend):
    check_teacher_constant(LOSS, "77x81")


@pytest.mark.parametrize("classes", [2, 81])
def test_hard_part_is_cross_entropy(classes, backend):
    """At hard_weight 1: torch's cross_entropy, ignored rows left out of its mean."""
    s, t, y = torch.randn(40, classes), torch.randn(40, classes), torch.randint(classes, (40,))
    y[::5] = -100
    for reduction in ("mean", "sum", "none"):
        found = kd.soft_cross_entropy_loss(s, t, target=y, hard_weight=1.0, temperature=3.0, reduction=reduction)
        torch.testing.assert_close(found, F.cross_entropy(s, y, reduction=reduction))


def test_parts_are_mixed(backend):
    """(1 - mu) soft + mu hard; class weights and temperature belong to the soft part alone; there is no T^2."""
    s, t, y, w = torch.randn(40, 9), torch.randn(40, 9), torch.randint(9, (40,)), torch.rand(9)
    options = {"target": y, "temperature": 2.0, "reduction": "none"}
    soft = -(w * (t / 2).softmax(-1) * (s / 2).log_softmax(-1)).sum(-1)
    hard = F.cross_entropy(s, y, reduction="none")
    for mu in (0.0, 0.3, torch.tensor(0.3), 1.0):
        found = kd.soft_cross_entropy_loss(s, t, class_weight=w, hard_weight=mu, **options)
        torch.testing.assert_close(found, (1 - mu) * soft + mu * hard)


def test_reductions_agree(backend):
    """The mean divides by the rows that are not ignored, whatever their weights; avg_factor replaces them."""
    s, t, y, w = torch.randn(2, 20, 9), torch.randn(2, 20, 9), torch.randint(9, (2, 20)), torch.rand(2, 20)
    y[:, ::4] = 5
    call = functools.partial(kd.soft_cross_entropy_loss, s, t, target=y, hard_weight=0.4, ignore_index=5)
    rows = call(reduction="none")
    counted = (y != 5).sum()
    assert counted < 30 and (rows[y == 5] == 0).all() and (rows[y != 5] != 0).all()
    torch.testing.assert_close(call(reduction="none", weight=w), rows * w)
    torch.testing.assert_close(call(reduction="sum", weight=w), (rows * w).sum())
    torch.testing.assert_close(call(weight=w), (rows * w).sum() / counted)
    torch.testing.assert_close(call(weight=w, avg_factor=7.5), (rows * w).sum() / 7.5)
    torch.testing.assert_close(call(weight=w, avg_factor=torch.tensor(7.5)), (rows * w).sum() / 7.5)


@pytest.mark.parametrize("average", [0, 0.0, -3.0, torch.tensor(0.0), torch.tensor(-1.0)])
def test_avg_factor_of_nothing_gives_0(average, backend):
    student = torch.randn(3, 5, requires_grad=True)
    zero_with_graph(LOSS, [student], kd.soft_cross_entropy_loss(student, torch.randn(3, 5), avg_factor=average))


def test_class_weights_move_the_minimum(backend):
    """With class weights the gradient is 0 at w p_t, normalised, not at the teacher's distribution."""
    t, w = torch.randn(6, 9, dtype=torch.float64), torch.rand(9, dtype=torch.float64) + 0.5
    s = (w * t.softmax(-1)).log() + 3
    _, grad = run(kd.soft_cross_entropy_loss, s, t, class_weight=w)
    assert grad.abs().max() < 1e-15 * w.sum()


# Labels.


@WIDTHS
@FLOATS
@pytest.mark.parametrize("hard_weight", [0.0, 0.3, 1.0])
def test_ignored_rows_give_0_whatever_they_hold(hard_weight, width, dtype, backend):
    """NaN and infinities under an ignored label stay out of loss and gradient."""
    s, t, y = torch.randn(6, width).to(dtype), torch.randn(6, width).to(dtype), torch.randint(width, (6,))
    y[[1, 3, 4]] = -100
    s[1], s[3, 0], t[3], t[4, 0] = float("nan"), INF, float("nan"), float("nan")
    call = functools.partial(kd.soft_cross_entropy_loss, hard_weight=hard_weight, temperature=2.0)
    loss, grad = run(call, s, t, target=y)
    kept = [0, 2, 5]
    alone, alone_grad = run(call, s[kept], t[kept], target=y[kept])
    torch.testing.assert_close(loss, alone)
    torch.testing.assert_close(grad[kept], alone_grad)
    assert (grad[[1, 3, 4]] == 0).all()


@FLOATS
@pytest.mark.parametrize("hard_weight", [0.0, 0.4])
def test_all_ignored_gives_0(hard_weight, dtype, backend):
    student = torch.full((3, 5), float("nan")).to(dtype).requires_grad_()
    y = torch.full((3,), -100)
    loss = kd.soft_cross_entropy_loss(student, torch.randn(3, 5).to(dtype), target=y, hard_weight=hard_weight)
    zero_with_graph(LOSS, [student], loss)


@WIDTHS
@FLOATS
@pytest.mark.parametrize("label", [-1, "width", -(2**63), 2**63 - 1, 2**40, -101])
@pytest.mark.parametrize("hard_weight", [0.4, 1.0])
def test_label_out_of_range_makes_its_row_nan(hard_weight, label, width, dtype, backend):
    """Its row alone, in value and gradient, and nothing is read out of bounds."""
    s, t, y = torch.randn(4, width).to(dtype), torch.randn(4, width).to(dtype), torch.randint(width, (4,))
    call = functools.partial(kd.soft_cross_entropy_loss, hard_weight=hard_weight, reduction="none")
    sound, sound_grad = run(call, s, t, target=y)
    y[2] = width if label == "width" else label
    loss, grad = run(call, s, t, target=y)
    others = [0, 1, 3]
    assert loss[2].isnan() and grad[2].isnan().all()
    assert torch.equal(loss[others], sound[others]) and torch.equal(grad[others], sound_grad[others])
    assert kd.soft_cross_entropy_loss(s, t, target=y, hard_weight=hard_weight).isnan()


@FLOATS
def test_a_label_out_of_range_may_be_the_ignored_one(dtype, backend):
    s, t = torch.randn(3, 5).to(dtype), torch.randn(3, 5).to(dtype)
    found = kd.soft_cross_entropy_loss(s, t, target=torch.tensor([0, 255, 4]), hard_weight=0.5, ignore_index=255)
    y = torch.tensor([0, 4])
    torch.testing.assert_close(found, kd.soft_cross_entropy_loss(s[[0, 2]], t[[0, 2]], target=y, hard_weight=0.5))


@FLOATS
def test_label_that_the_student_rules_out(dtype, backend):
    """A logit of -inf at the label is +inf; a hard part of weight 0 gives 0 even then."""
    s, t, y = torch.randn(3, 5).to(dtype), torch.randn(3, 5).to(dtype), torch.tensor([1, 2, 3])
    s[1, 2], t[1, 2] = -INF, -INF
    rows = functools.partial(kd.soft_cross_entropy_loss, s, t, target=y, reduction="none")
    for mu in (0.5, torch.tensor(0.5), 1.0):
        loss = rows(hard_weight=mu)
        assert loss[1] == INF and loss[[0, 2]].isfinite().all()
    torch.testing.assert_close(rows(hard_weight=torch.tensor(0.0)), rows(hard_weight=0.0))
    assert rows(hard_weight=0.0).isfinite().all()
    t[1, 2] = 0  # now the soft part is infinite, and switched off
    assert rows(hard_weight=1.0)[[0, 2]].isfinite().all() and rows(hard_weight=0.5)[1] == INF


# Edges of the soft part.


@FLOATS
@pytest.mark.parametrize("width", [3, 40, 2100])
@pytest.mark.parametrize("teacher", [-INF, -3e4])
@pytest.mark.parametrize("student", [-INF, 2.0, -1e4])
def test_no_probability_contributes_nothing(student, teacher, width, dtype, backend):
    check_no_probability(soft_rows, dtype, width, student, teacher, entropy=False, scale=1)


@FLOATS
def test_late_maximum_leaves_no_probability(dtype, backend):
    check_late_maximum(soft_rows, dtype, entropy=False, scale=1)


@FLOATS
@pytest.mark.parametrize("width", [3, 2500])
def test_ruled_out_by_the_student_is_infinite(width, dtype, backend):
    check_ruled_out(soft_rows, dtype, width, scale=1)


@FLOATS
def test_class_of_weight_0_contributes_nothing(dtype, backend):
    """A student's -inf counts only where w_c p_t,c is not 0."""
    s, t, w = torch.randn(3, 5).to(dtype), torch.randn(3, 5).to(dtype), torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0])
    s[1, 1] = -INF
    loss, grad = run(soft_rows, s, t, class_weight=w)
    assert loss.isfinite().all() and grad.isfinite().all()
    keep = [0, 2, 3, 4]
    p_t, log_s = (t.double() / 2).softmax(-1), (s.double() / 2).log_softmax(-1)
    expected = -(w.double() * p_t)[:, keep].mul(log_s[:, keep]).sum(-1)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert error(loss, expected) <= 16 * eps


@FLOATS
@pytest.mark.parametrize("width", [1, 5, 2100])
def test_rows_of_nothing_give_0(width, dtype, backend):
    check_rows_of_nothing(soft_rows, dtype, width)
    y = torch.zeros(4, dtype=torch.int64)
    check_rows_of_nothing(lambda s, t: soft_rows(s, t, target=y[: len(s)], hard_weight=0.5), dtype, width)


def test_rows_of_nothing_count(backend):
    s, t = torch.randn(4, 5), torch.randn(4, 5)
    s[1], t[2] = -INF, -INF
    alone = kd.soft_cross_entropy_loss(s[[0, 3]], t[[0, 3]])
    torch.testing.assert_close(kd.soft_cross_entropy_loss(s, t), alone / 2)


@FLOATS
@pytest.mark.parametrize(("width", "column"), [(5, 0), (81, 80), (2100, 3), (2100, 2099)])
def test_nan_stays_in_its_row(width, column, dtype, backend):
    check_nan_stays(LOSS, width, column, dtype)
    check_nan_stays(LOSS, width, column, dtype, target=torch.tensor([0, 1, 2, 3, 4]), hard_weight=0.5)


@pytest.mark.parametrize("width", [2, 81, 2500])
def test_huge_logits_stay_finite(width, backend):
    s, t = 1e37 * torch.randn(5, width), torch.randn(5, width)
    result = check(kd.soft_cross_entropy_loss, s, t, length=width, reduction="none")
    assert result.loss.isfinite().all() and result.grads[0].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 3)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("labels", [True, False])
def test_no_rows(labels, shape, reduction, backend):
    student = torch.randn(shape, requires_grad=True)
    options = {"target": torch.zeros(shape[:-1], dtype=torch.int64), "hard_weight": 0.5} if labels else {}
    loss = kd.soft_cross_entropy_loss(student, torch.randn(shape), reduction=reduction, **options)
    assert loss.shape == (shape[:-1] if reduction == "none" else ())
    zero_with_graph(LOSS, [student], loss)


LABELS = torch.tensor([0, 1, 2])
BAD = bad_rows(5) + bad_positive("temperature") + bad_average() + bad_scalar("hard_weight")
BAD += [
    ({"target": LABELS.int()}, TypeError, "target|int64|torch.int32"),
    ({"target": LABELS.float()}, TypeError, "target|int64|torch.float32"),
    ({"target": [0, 1, 2]}, TypeError, "target|list"),
    ({"target": LABELS[:, None]}, ValueError, "target|(3,)|(3, 1)"),
    ({"target": LABELS[:1]}, ValueError, "target|(3,)|(1,)"),
    ({"target": LABELS.to("meta")}, ValueError, "target|meta|cpu"),
    ({"target": None, "hard_weight": 0.5}, ValueError, "hard_weight|0.5|target"),
    ({"target": None, "hard_weight": torch.tensor(0.0)}, ValueError, "hard_weight|target"),
    ({"class_weight": torch.ones(4)}, ValueError, "class_weight|(5,)|(4,)"),
    ({"class_weight": torch.ones(1)}, ValueError, "class_weight|(5,)|(1,)"),
    ({"class_weight": torch.ones(3, 5)}, ValueError, "class_weight|(5,)|(3, 5)"),
    ({"class_weight": torch.ones(5, dtype=torch.int64)}, TypeError, "class_weight|torch.int64"),
    ({"class_weight": [1.0] * 5}, TypeError, "class_weight|list"),
    ({"class_weight": torch.ones(5, device="meta")}, ValueError, "class_weight|meta|cpu"),
    ({"ignore_index": None}, TypeError, "ignore_index|NoneType"),
    ({"ignore_index": 1.0}, TypeError, "ignore_index|float"),
    ({"reduction": "batchmean"}, ValueError, "reduction|'mean'|'batchmean'"),
]


@pytest.mark.parametrize(("change", "error_type", "message"), BAD)
def test_bad_input(change, error_type, message):
    base = {"student": torch.zeros(3, 5, requires_grad=True), "teacher": torch.zeros(3, 5)}
    check_bad(LOSS, {**base, "target": LABELS, "hard_weight": 0.5}, change, error_type, message)
