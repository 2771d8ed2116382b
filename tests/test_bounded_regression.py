"""Teacher-bounded regression: the error bound over the grid, gates, margin, beta, edges, layouts, and bad input."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from case_inputs import ALIKE
from edges import FLOATS, INF
from grid import (
    bad_average,
    bad_rows,
    bad_scalar,
    check_bad,
    check_case,
    check_layouts,
    check_mutants,
    check_teacher_constant,
    check_upstream,
    grid,
    run,
    zero_with_graph,
)

import kdkernels as kd

LOSS = "bounded_regression"
GATES = pytest.mark.parametrize("gate", ["row", "element", "batch"])
only_bound = functools.partial(kd.bounded_regression_loss, smooth_l1_weight=0.0, bound_weight=1.0)


@pytest.mark.parametrize(("case", "pair"), grid(LOSS))
def test_error_bound(case, pair, backend):
    check_case(LOSS, case, pair)


@pytest.mark.parametrize("pair", ALIKE)
@pytest.mark.parametrize("name", ["77x4", "gate element", "gate batch"])
def test_mutants_are_caught(name, pair, backend):
    check_mutants(LOSS, name, pair)


@pytest.mark.parametrize("pair", ALIKE)
def test_upstream_per_row(pair, backend):
    check_upstream(LOSS, "row weight", pair)
    check_upstream(LOSS, "2x3x4", pair)


@pytest.mark.parametrize("pair", ALIKE)
def test_gradient_has_the_students_layout(pair, backend):
    check_layouts(LOSS, pair, backend)


def test_teacher_gets_nothing(backend):
    check_teacher_constant(LOSS, "77x4")


def _deltas(rows: int = 40) -> tuple[torch.Tensor, ...]:
    return torch.randn(rows, 4), torch.randn(rows, 4), 0.5 * torch.randn(rows, 4)


@pytest.mark.parametrize("margin", [0.0, 0.6, -0.6])
@GATES
def test_gates_by_hand(gate, margin, backend):
    """Row: of the four squares' sum. Element: of each square. Batch: of the mean over all rows and coordinates."""
    s, t, y = _deltas()
    e_s, e_t = (s - y) ** 2, (t - y) ** 2
    if gate == "row":
        opened = (e_s.sum(-1) + margin > e_t.sum(-1)).float()[:, None]
    elif gate == "element":
        opened = (e_s + margin > e_t).float()
    else:
        opened = (e_s.mean() + margin > e_t.mean()).float()
    assert gate == "batch" or 0 < opened.mean() < 1
    loss, grad = run(only_bound, s, t, y, gate=gate, margin=margin)
    torch.testing.assert_close(loss, (opened * e_s).sum() / 40)
    torch.testing.assert_close(grad, opened * 2 * (s - y) / 40)


@GATES
def test_equality_closes_the_gate(gate, backend):
    """Strictly worse than the teacher is charged; as good is not; any margin above 0 charges it again."""
    s, t, y = torch.tensor([[1.0, 2, 0, 1]]), torch.tensor([[1.0, 2, 0, -1]]), torch.zeros(1, 4)
    loss, grad = run(only_bound, s, t, y, gate=gate)
    assert loss == 0 and (grad == 0).all()
    loss, grad = run(only_bound, s, t, y, gate=gate, margin=1e-3)
    assert loss == 6 and torch.equal(grad, 2 * s)


def test_gate_ignores_row_weights(backend):
    """A weight scales what a row pays, not what it is compared by."""
    s, t, y = _deltas()
    w = torch.rand(40)
    rows = only_bound(s, t, y, gate="batch", reduction="none")
    assert (rows > 0).all() or (rows == 0).all()
    torch.testing.assert_close(only_bound(s, t, y, gate="batch", reduction="none", weight=w), rows * w)


@pytest.mark.parametrize("beta", [0.0, 1 / 9, 1.0, 3.0])
def test_smooth_l1_is_torchs(beta, backend):
    s, t, y = _deltas()
    loss, grad = run(kd.bounded_regression_loss, s, t, y, bound_weight=0.0, beta=beta)
    expected, expected_grad = run(lambda x: F.smooth_l1_loss(x, y, beta=beta, reduction="sum") / 40, s)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_at_the_target_there_is_no_gradient(beta, backend):
    y = torch.randn(5, 4)
    loss, grad = run(kd.bounded_regression_loss, y, y + 1, y, beta=beta)
    assert loss == 0 and (grad == 0).all()


def test_terms_add_up(backend):
    s, t, y = _deltas()
    smooth = kd.bounded_regression_loss(s, t, y, bound_weight=0.0)
    for one, two in ((0.7, 0.3), (torch.tensor(0.7), torch.tensor(0.3)), (torch.tensor(0.7), 0.3)):
        found = kd.bounded_regression_loss(s, t, y, smooth_l1_weight=one, bound_weight=two)
        torch.testing.assert_close(found, 0.7 * smooth + 0.3 * only_bound(s, t, y))
    torch.testing.assert_close(kd.bounded_regression_loss(s, t, y), smooth + 0.5 * only_bound(s, t, y))


def test_reductions_agree(backend):
    s, t, y = (x.view(2, 20, 4) for x in _deltas())
    w = torch.rand(2, 20)
    rows = kd.bounded_regression_loss(s, t, y, reduction="none")
    assert rows.shape == (2, 20)
    call = functools.partial(kd.bounded_regression_loss, s, t, y, weight=w)
    torch.testing.assert_close(call(reduction="none"), rows * w)
    torch.testing.assert_close(call(reduction="sum"), (rows * w).sum())
    torch.testing.assert_close(call(), (rows * w).sum() / 40)
    torch.testing.assert_close(call(avg_factor=7.5), (rows * w).sum() / 7.5)
    torch.testing.assert_close(call(avg_factor=torch.tensor(7.5)), (rows * w).sum() / 7.5)


@GATES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strides_change_no_bit_of_many_rows(dtype, gate, backend):
    """More rows than a kernel takes at once, with weights: as columns of a wider tensor, and as a transposed one."""
    s, t, y = (x.to(dtype) for x in _deltas(700))
    call = functools.partial(kd.bounded_regression_loss, gate=gate, weight=torch.rand(700))
    packed = [run(call, s, t, y), run(call, s, t, y, one_pass=False)]
    for spread in (lambda x: F.pad(x, (1, 2))[:, 1:5], lambda x: x.T.contiguous().T):
        found = [run(call, spread(s), spread(t), spread(y)), run(call, *map(spread, (s, t, y)), one_pass=False)]
        for (loss, grad), (packed_loss, packed_grad) in zip(found, packed, strict=True):
            assert torch.equal(loss, packed_loss) and torch.equal(grad, packed_grad)


@pytest.mark.parametrize("average", [0, 0.0, -3.0, torch.tensor(0.0), torch.tensor(-1.0)])
def test_avg_factor_of_nothing_gives_0(average, backend):
    s, t, y = _deltas()
    s.requires_grad_()
    zero_with_graph(LOSS, [s], kd.bounded_regression_loss(s, t, y, avg_factor=average))


@GATES
@pytest.mark.parametrize("shape", [(0, 4), (2, 0, 4)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(shape, reduction, gate, backend):
    student = torch.randn(shape, requires_grad=True)
    x = torch.randn(shape)
    loss = kd.bounded_regression_loss(student, x, x, gate=gate, reduction=reduction, weight=torch.ones(shape[:-1]))
    assert loss.shape == (shape[:-1] if reduction == "none" else ())
    zero_with_graph(LOSS, [student], loss)


@pytest.mark.parametrize("gate", ["row", "element"])
@FLOATS
@pytest.mark.parametrize("column", [0, 3])
def test_nan_stays_in_its_row(column, dtype, gate, backend):
    """The student's reaches value and gradient; the teacher's closes the gate. No other row moves."""
    y = torch.zeros(5, 4, dtype=dtype)
    s, t = torch.randn(5, 4).to(dtype), torch.randn(5, 4).to(dtype)
    call = functools.partial(kd.bounded_regression_loss, gate=gate, reduction="none", bound_weight=1.0)
    sound, sound_grad = run(call, s, t, y)
    others = [0, 1, 3, 4]
    for side in ("student", "teacher", "target"):
        x = {"student": s.clone(), "teacher": t.clone(), "target": y.clone()}
        x[side][2, column] = float("nan")
        loss, grad = run(call, *x.values())
        assert torch.equal(loss[others], sound[others]) and torch.equal(grad[others], sound_grad[others])
        if side == "teacher":
            assert loss[2].isfinite() and grad[2].isfinite().all()
        else:
            assert loss[2].isnan() and grad[2, column].isnan()


@FLOATS
def test_infinite_teacher_closes_the_gate(dtype, backend):
    s, t, y = torch.randn(3, 4).to(dtype), torch.full((3, 4), INF, dtype=dtype), torch.zeros(3, 4, dtype=dtype)
    loss, grad = run(only_bound, s, t, y)
    assert loss == 0 and (grad == 0).all()


@FLOATS
def test_target_of_another_dtype(dtype, backend):
    s, t, y = torch.randn(9, 4).to(dtype), torch.randn(9, 4).to(dtype), torch.randn(9, 4).bfloat16()
    for other in (torch.float32, torch.float64, torch.float16):
        found = kd.bounded_regression_loss(s, t, y.to(other))
        torch.testing.assert_close(found, kd.bounded_regression_loss(s, t, y), rtol=1e-6, atol=0)


def _zeros(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(shape, **options)


BAD = bad_rows(4) + bad_average()
BAD += bad_scalar("bound_weight") + bad_scalar("smooth_l1_weight")
BAD += [
    ({"student": _zeros(3, 5), "teacher": _zeros(3, 5), "target": _zeros(3, 5)}, ValueError, "student|(..., 4)|(3, 5)"),
    ({"student": _zeros(12), "teacher": _zeros(12), "target": _zeros(12)}, ValueError, "student|(..., 4)|(12,)"),
    ({"target": _zeros(4)}, ValueError, "student|target|(3, 4)|(4,)"),
    ({"target": _zeros(1, 4)}, ValueError, "student|target|(3, 4)|(1, 4)"),
    ({"target": _zeros(3, 4, dtype=torch.int64)}, TypeError, "target|torch.int64"),
    ({"target": None}, TypeError, "target|NoneType"),
    ({"target": _zeros(3, 4, device="meta")}, ValueError, "target|meta|cpu"),
    ({"target": _zeros(3, 4, requires_grad=True)}, ValueError, "target|detach"),
    ({"margin": float("nan")}, ValueError, "margin|nan"),
    ({"margin": INF}, ValueError, "margin|inf"),
    ({"margin": torch.tensor(0.1)}, TypeError, "margin|Tensor"),
    ({"margin": None}, TypeError, "margin|NoneType"),
    ({"beta": -1.0}, ValueError, "beta|-1.0"),
    ({"beta": float("nan")}, ValueError, "beta|nan"),
    ({"beta": "1"}, TypeError, "beta|str"),
    ({"gate": "rows"}, ValueError, "gate|'row'|'element'|'batch'|'rows'"),
    ({"gate": None}, ValueError, "gate|None"),
    ({"reduction": "batchmean"}, ValueError, "reduction|'mean'|'batchmean'"),
]


@pytest.mark.parametrize(("change", "error_type", "message"), BAD)
def test_bad_input(change, error_type, message):
    base = {"student": _zeros(3, 4, requires_grad=True), "teacher": _zeros(3, 4), "target": _zeros(3, 4)}
    check_bad(LOSS, base, change, error_type, message)
