"""Masked MSE: the error bound over the grid, regions and their counts, levels, edges, layouts, and bad input."""

from __future__ import annotations

import pytest
import torch
from case_inputs import ALIKE, channels_last, contiguous
from edges import FLOATS
from grid import (
    bad_features,
    bad_scalar,
    check_bad,
    check_case,
    check_layouts,
    check_mutants,
    check_teacher_constant,
    grid,
    run,
    zero_with_graph,
)
from numerics import check

import kdkernels as kd

LOSS = "masked_mse"
LAYOUTS = pytest.mark.parametrize("layout", [contiguous, channels_last])


@pytest.mark.parametrize(("case", "pair"), grid(LOSS))
def test_error_bound(case, pair, backend):
    check_case(LOSS, case, pair)


@pytest.mark.parametrize("pair", ALIKE)
@pytest.mark.parametrize("name", ["3x7x5x11", "channels_last", "levels of different N and C", "mask bool"])
def test_mutants_are_caught(name, pair, backend):
    check_mutants(LOSS, name, pair)


@pytest.mark.parametrize("pair", ALIKE)
def test_gradient_has_the_students_layout(pair, backend):
    check_layouts(LOSS, pair, backend)


def test_teacher_gets_nothing(backend):
    check_teacher_constant(LOSS, "pyramid")


def _levels(*shapes: tuple[int, int, int, int]) -> tuple[list, list, list]:
    return (
        [torch.randn(shape) for shape in shapes],
        [torch.randn(shape) for shape in shapes],
        [torch.rand(n, h, w) for n, _, h, w in shapes],
    )


@LAYOUTS
@pytest.mark.parametrize("normalizer", ["elements", "pixels", "batch"])
def test_regions_and_their_counts(normalizer, layout, backend):
    """Two pictures, three channels, 4 x 5 pixels: 7 of the 40 are foreground. Twice the count divides each region."""
    s, t = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    mask = torch.zeros(2, 4, 5, dtype=torch.bool)
    mask[0, :2, :3] = True
    mask[1, 3, 4] = True
    square = (s - t).square()
    inside = square.permute(0, 2, 3, 1)[mask].sum()
    outside = square.permute(0, 2, 3, 1)[~mask].sum()
    counts = {"elements": (21, 99), "pixels": (7, 33), "batch": (2, 2)}[normalizer]
    for m in (mask, mask.float(), mask.half()):
        weights = {"foreground_weight": 3.0, "background_weight": 0.4}
        found = kd.masked_mse_loss(layout(s), layout(t), m, normalizer=normalizer, **weights)
        torch.testing.assert_close(found, 3 * inside / (2 * counts[0]) + 0.4 * outside / (2 * counts[1]))


def test_small_regions_are_not_divided_by_less_than_1(backend):
    """max(1, 2 n): a region of a tenth of one element counts as half a one."""
    s, t, mask = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1), 0.1)
    found = kd.masked_mse_loss(s, t, mask, background_weight=0.0)
    torch.testing.assert_close(found, torch.tensor(0.1))
    found = kd.masked_mse_loss(s, t, mask, foreground_weight=0.0)
    torch.testing.assert_close(found, torch.tensor(0.5))


def test_levels_are_averaged_or_summed(backend):
    """The mean counts every level, one with an empty region and an empty one included."""
    students, teachers, masks = _levels((2, 4, 3, 5), (2, 4, 1, 2), (2, 4, 0, 2))
    masks[1] = torch.zeros(2, 1, 2)
    each = [kd.masked_mse_loss(s, t, m) for s, t, m in zip(students, teachers, masks)]
    assert each[2] == 0
    torch.testing.assert_close(kd.masked_mse_loss(students, teachers, masks, level_reduction="sum"), sum(each))
    torch.testing.assert_close(kd.masked_mse_loss(students, teachers, masks), sum(each) / 3)


def test_tuples_and_dicts_of_levels(backend):
    """A dict's levels are matched by key, the teacher's and the mask's order notwithstanding."""
    students, teachers, masks = _levels((2, 4, 3, 5), (2, 4, 3, 5), (2, 4, 1, 2))
    expected = kd.masked_mse_loss(students, teachers, masks)
    names = ["0", "1", "pool"]
    dicts = [dict(zip(names, students)), dict(zip(names[::-1], teachers[::-1])), dict(zip(names[::-1], masks[::-1]))]
    assert torch.equal(kd.masked_mse_loss(tuple(students), tuple(teachers), tuple(masks)), expected)
    assert torch.equal(kd.masked_mse_loss(*dicts), expected)
    assert torch.equal(kd.masked_mse_loss(dicts[0], dicts[1], masks), expected)
    assert torch.equal(kd.masked_mse_loss(dicts[0], teachers, masks), expected)


def test_more_levels_than_one_launch_takes(backend):
    """150 levels, the dtype changing from one to the next, some of them empty."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    students, teachers, masks = _levels(*[(1 + i % 2, i % 5, 1 + i % 3, 2) for i in range(150)])
    students = [s.to(dtypes[i % 3]) for i, s in enumerate(students)]
    teachers = [t.to(s.dtype) if i % 2 else t for i, (s, t) in enumerate(zip(students, teachers))]
    check(kd.masked_mse_loss, students, teachers, masks, length=1500, foreground_weight=3.0, background_weight=0.4)


@LAYOUTS
@pytest.mark.parametrize("shape", [(1, 4500, 2, 3), (2, 3, 70, 67), (1, 2, 1, 5000), (1, 2, 5000, 1)])
def test_long_lines(shape, layout, backend):
    """More channels, or pixels, than one block takes of a line."""
    students, teachers, masks = _levels(shape)
    weights = {"foreground_weight": 3.0, "background_weight": 0.4}
    check(
        kd.masked_mse_loss, [layout(students[0])], [layout(teachers[0])], masks, length=students[0].numel(), **weights
    )


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("float16", "bfloat16"), ("float32", "float64")])
def test_levels_of_different_dtypes(dtypes):
    """Each level's gradient has its own dtype; float64 among others takes the formula, and makes the loss float64."""
    students, teachers, masks = _levels((2, 4, 3, 5), (2, 4, 1, 2))
    students = [s.to(getattr(torch, d)) for s, d in zip(students, dtypes)]
    teachers = [t.to(s.dtype) for s, t in zip(students, teachers)]
    result = check(kd.masked_mse_loss, students, teachers, masks, length=136)
    assert result.loss.dtype == (torch.float64 if "float64" in dtypes else torch.float32)
    assert [g.dtype for g in result.grads] == [s.dtype for s in students]


@pytest.mark.parametrize("frozen", [[0], [1], [2], [0, 2], [0, 1]])
@LAYOUTS
def test_frozen_levels_get_none(frozen, layout, backend):
    """Levels that ask for no gradient get none; the others get exactly what they get when all ask."""
    students, teachers, masks = _levels((2, 4, 3, 5), (1, 7, 2, 3), (3, 1, 1, 4))
    students = [layout(s) for s in students]
    asked = [s.detach().requires_grad_() for s in students]
    kd.masked_mse_loss(asked, teachers, masks).backward()
    some = [s.detach().requires_grad_(i not in frozen) for i, s in enumerate(students)]
    kd.masked_mse_loss(some, teachers, masks).backward()
    for i, (x, y) in enumerate(zip(some, asked)):
        assert x.grad is None if i in frozen else torch.equal(x.grad, y.grad)


def test_weights_as_numbers_or_tensors(backend):
    s, t, m = (x[0] for x in _levels((2, 4, 3, 5)))
    expected = kd.masked_mse_loss(s, t, m, foreground_weight=3.0, background_weight=0.4)
    for f, b in ((torch.tensor(3.0), torch.tensor(0.4)), (3, torch.tensor(0.4)), (torch.tensor(3.0), 0.4)):
        found = kd.masked_mse_loss(s, t, m, foreground_weight=f, background_weight=b)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("full", [False, True])
@FLOATS
@LAYOUTS
def test_an_empty_region_gives_0(full, layout, dtype, backend):
    """No foreground or no background: that term is 0 however large its weight; alone, an exact 0 with a graph."""
    s, t = layout(torch.randn(2, 3, 4, 5).to(dtype)), layout(torch.randn(2, 3, 4, 5).to(dtype))
    mask = torch.full((2, 4, 5), full)
    empty, other = ("background_weight", "foreground_weight") if full else ("foreground_weight", "background_weight")
    loss, grad = run(kd.masked_mse_loss, s, t, mask, **{empty: 1e6})
    plain, plain_grad = run(kd.masked_mse_loss, s, t, mask, **{empty: 0.0})
    assert torch.equal(loss, plain) and torch.equal(grad, plain_grad) and loss > 0
    torch.testing.assert_close(loss, (s.to(loss.dtype) - t.to(loss.dtype)).square().mean() / 2)
    s = s.detach().requires_grad_()
    zero_with_graph(LOSS, [s], kd.masked_mse_loss(s, t, mask, **{empty: 1e6, other: 0.0}))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
@pytest.mark.parametrize("normalizer", ["elements", "pixels", "batch"])
def test_empty_levels(shape, normalizer, backend):
    student = torch.randn(shape, requires_grad=True)
    mask = torch.rand(shape[0], *shape[2:])
    loss = kd.masked_mse_loss(student, torch.randn(shape), mask, normalizer=normalizer)
    assert loss.shape == ()
    zero_with_graph(LOSS, [student], loss)


@FLOATS
@LAYOUTS
def test_equal_sides_give_0(layout, dtype, backend):
    s, _t, m = (x[0] for x in _levels((2, 9, 5, 7)))
    student = layout(s.to(dtype).clone()).requires_grad_()
    zero_with_graph(LOSS, [student], kd.masked_mse_loss(student, s.to(dtype), m))


@LAYOUTS
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_reaches_the_loss_even_where_the_mask_is_0(value, side, layout, backend):
    """As in the formula. The gradient is the others' own: each element's depends on itself alone."""
    sides = [torch.randn(2, 9, 5, 7), torch.randn(2, 9, 5, 7)]
    mask = torch.ones(2, 5, 7)
    mask[0, 1, 2] = 0
    sound, sound_grad = run(kd.masked_mse_loss, *map(layout, sides), mask)
    sides[side][0, 3, 1, 2] = value
    loss, grad = run(kd.masked_mse_loss, *map(layout, sides), mask)
    assert sound.isfinite() and not loss.isfinite()
    assert not grad[0, 3, 1, 2].isfinite()
    grad[0, 3, 1, 2] = sound_grad[0, 3, 1, 2] = 0
    assert torch.equal(grad, sound_grad)


@pytest.mark.parametrize("magnitude", [1e-12, 1e4, 1e15])
@LAYOUTS
def test_magnitudes(magnitude, layout, backend):
    """float32 features whose squares are far from 1 but in range."""
    s, t, m = (x[0] for x in _levels((2, 9, 15, 17)))
    result = check(kd.masked_mse_loss, layout(s * magnitude), layout(t * magnitude), m, length=s.numel())
    assert result.loss.isfinite() and result.loss > 0


def _zeros(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(shape, **options)


FIRST, SECOND = _zeros(2, 4, 5), _zeros(2, 2, 2)
BAD = bad_features() + bad_scalar("foreground_weight") + bad_scalar("background_weight")
BAD += [
    ({"mask": None}, TypeError, "mask|NoneType"),
    ({"mask": [FIRST, 1.0]}, TypeError, "mask[1]|float"),
    ({"mask": [FIRST]}, ValueError, "mask|1|student|2"),
    ({"mask": FIRST}, ValueError, "mask|1|student|2"),
    ({"mask": [FIRST.long(), SECOND]}, TypeError, "mask[0]|torch.int64"),
    ({"mask": [FIRST.byte(), SECOND]}, TypeError, "mask[0]|torch.uint8"),
    ({"mask": [FIRST[:, None], SECOND]}, ValueError, "mask[0]|(2, 4, 5)|(2, 1, 4, 5)|(2, 3, 4, 5)"),
    ({"mask": [FIRST, SECOND[:1]]}, ValueError, "mask[1]|(2, 2, 2)|(1, 2, 2)"),
    ({"mask": [FIRST, SECOND[0]]}, ValueError, "mask[1]|(2, 2, 2)|(2, 2)"),
    ({"mask": [FIRST, SECOND.to("meta")]}, ValueError, "mask[1]|meta|cpu"),
    ({"mask": [FIRST, SECOND.clone().requires_grad_()]}, ValueError, "mask[1]|detach"),
    ({"mask": [FIRST, SECOND + 1.5]}, ValueError, "mask[1]|[0, 1]|1.5"),
    ({"mask": [FIRST - 0.25, SECOND]}, ValueError, "mask[0]|[0, 1]|-0.25"),
    ({"mask": [FIRST, SECOND * float("nan")]}, ValueError, "mask[1]|[0, 1]|nan"),
    ({"normalizer": "element"}, ValueError, "normalizer|'elements'|'pixels'|'batch'|'element'"),
    ({"normalizer": None}, ValueError, "normalizer|None"),
    (
        {"student": [_zeros(2, 3, 5, 5), _zeros(2, 3, 2, 2)]},
        ValueError,
        "student[0]|teacher[0]|(2, 3, 5, 5)|(2, 3, 4, 5)",
    ),
    (
        {"teacher": [_zeros(2, 3, 4, 1), _zeros(2, 3, 2, 2)]},
        ValueError,
        "student[0]|teacher[0]|(2, 3, 4, 1)|(2, 3, 4, 5)",
    ),
    (
        {
            "student": {"a": _zeros(2, 3, 4, 5), "b": _zeros(2, 3, 2, 2)},
            "teacher": {"a": _zeros(2, 3, 4, 5), "b": _zeros(2, 3, 2, 2)},
            "mask": {"a": FIRST, "c": SECOND},
        },
        ValueError,
        "mask|'c'|'b'",
    ),
]


@pytest.mark.parametrize(("change", "error_type", "message"), BAD)
def test_bad_input(change, error_type, message):
    base = {
        "student": [_zeros(2, 3, 4, 5, requires_grad=True), _zeros(2, 3, 2, 2)],
        "teacher": [_zeros(2, 3, 4, 5), _zeros(2, 3, 2, 2)],
        "mask": [FIRST, SECOND],
    }
    check_bad(LOSS, base, change, error_type, message)
