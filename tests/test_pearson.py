"""Pearson: the error bound over the grid, invariance, constant channels, resizing, edges, layouts, and bad input."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from case_inputs import ALIKE, channels_last, contiguous
from edges import FLOATS
from grid import (
    bad_features,
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

LOSS = "pearson"
LAYOUTS = pytest.mark.parametrize("layout", [contiguous, channels_last])


@pytest.mark.parametrize(("case", "pair"), grid(LOSS))
def test_error_bound(case, pair, backend):
    check_case(LOSS, case, pair)


@pytest.mark.parametrize("pair", ALIKE)
@pytest.mark.parametrize("name", ["3x7x5x11", "channels_last", "levels of different N and C"])
def test_mutants_are_caught(name, pair, backend):
    check_mutants(LOSS, name, pair)


@pytest.mark.parametrize("pair", ALIKE)
def test_gradient_has_the_students_layout(pair, backend):
    check_layouts(LOSS, pair, backend)


def test_teacher_gets_nothing(backend):
    check_teacher_constant(LOSS, "pyramid")


def test_more_levels_than_one_launch_takes(backend):
    """70 levels, the dtype changing from one to the next, some of them empty."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    shapes = [(1 + i % 2, i % 4, 2 + i % 3, 5) for i in range(70)]
    students = [torch.randn(shape).to(dtypes[i % 3]) for i, shape in enumerate(shapes)]
    teachers = [torch.randn(s.shape).to(s.dtype) for s in students]
    check(kd.pearson_loss, students, teachers, length=2400)


@LAYOUTS
def test_is_one_minus_the_correlation(layout, backend):
    """(m - 1) / m (1 - r), r the mean of the channels' correlations."""
    s, t = torch.randn(3, 8, 5, 7), torch.randn(3, 8, 5, 7)
    a, b = (x.double().transpose(0, 1).flatten(1) for x in (s, t))
    r = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b)]).mean()
    found = kd.pearson_loss(layout(s), layout(t)).double()
    torch.testing.assert_close(found, 104 / 105 * (1 - r), rtol=1e-5, atol=0)


@LAYOUTS
def test_scale_and_shift_do_not_matter(layout, backend):
    s, t = layout(torch.randn(3, 8, 5, 7)), layout(torch.randn(3, 8, 5, 7))
    expected = kd.pearson_loss(s, t)
    torch.testing.assert_close(kd.pearson_loss(8 * s + 3, t), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(kd.pearson_loss(s, 0.25 * t - 7), expected, rtol=1e-5, atol=0)


@LAYOUTS
@FLOATS
def test_equal_up_to_scale_gives_almost_0(layout, dtype, backend):
    """Not 1 - r, which would cancel: what remains is rounding, squared."""
    x = layout(torch.randn(3, 8, 5, 7).to(dtype))
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    assert 0 <= kd.pearson_loss(x, x.clone()) <= 8 * eps**2
    assert 0 <= kd.pearson_loss(4 * x, x, eps=0.0) <= 8 * eps**2


def test_eps_stands_outside_the_root(backend):
    """x / (sd + eps), the unbiased deviation: channels (0, 2) and (0, 1) with eps 1, by hand."""
    s, t = torch.tensor([0.0, 2.0]).view(1, 1, 1, 2), torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    a, b = 1 / (2**0.5 + 1), 0.5 / (0.5**0.5 + 1)
    torch.testing.assert_close(kd.pearson_loss(s, t, eps=1.0), torch.tensor((a - b) ** 2 / 2))


def test_levels_are_summed_or_averaged(backend):
    students = [torch.randn(2, 4, 3, 5), torch.randn(1, 7, 2, 2), torch.randn(2, 4, 0, 5)]
    teachers = [torch.randn_like(s) for s in students]
    each = [kd.pearson_loss(s, t) for s, t in zip(students, teachers)]
    torch.testing.assert_close(kd.pearson_loss(students, teachers), sum(each))
    torch.testing.assert_close(kd.pearson_loss(students, teachers, level_reduction="mean"), sum(each) / 3)


def test_tuples_and_dicts_of_levels(backend):
    """A dict's levels are matched by key, the teacher's order notwithstanding."""
    students = [torch.randn(2, 4, 3, 5) for _ in range(3)]
    teachers = [torch.randn(2, 4, 3, 5) for _ in range(3)]
    expected, names = kd.pearson_loss(students, teachers), ["0", "1", "pool"]
    assert torch.equal(kd.pearson_loss(tuple(students), tuple(teachers)), expected)
    student = dict(zip(names, students))
    assert torch.equal(kd.pearson_loss(student, dict(zip(names[::-1], teachers[::-1]))), expected)
    assert torch.equal(kd.pearson_loss(student, teachers), expected)


@pytest.mark.parametrize("dtypes", [("float32", "bfloat16"), ("float16", "bfloat16"), ("float32", "float64")])
def test_levels_of_different_dtypes(dtypes):
    """Each level's gradient has its own dtype; float64 among others takes the formula, and makes the loss float64."""
    students = [torch.randn(2, 4, 3, 5).to(getattr(torch, d)) for d in dtypes]
    teachers = [torch.randn(2, 4, 3, 5).to(s.dtype) for s in students]
    result = check(kd.pearson_loss, students, teachers, length=120)
    assert result.loss.dtype == (torch.float64 if "float64" in dtypes else torch.float32)
    assert [g.dtype for g in result.grads] == [s.dtype for s in students]


@pytest.mark.parametrize("frozen", [[0], [1], [2], [0, 2], [0, 1]])
@LAYOUTS
def test_frozen_levels_get_none(frozen, layout, backend):
    """Levels that ask for no gradient get none; the others get exactly what they get when all ask."""
    shapes = [(2, 4, 3, 5), (1, 7, 2, 3), (3, 70, 1, 4)]
    students, teachers = [layout(torch.randn(x)) for x in shapes], [layout(torch.randn(x)) for x in shapes]
    asked = [s.detach().requires_grad_() for s in students]
    kd.pearson_loss(asked, teachers).backward()
    some = [s.detach().requires_grad_(i not in frozen) for i, s in enumerate(students)]
    kd.pearson_loss(some, teachers).backward()
    for i, (x, y) in enumerate(zip(some, asked)):
        assert x.grad is None if i in frozen else torch.equal(x.grad, y.grad)


# Constant channels and too few samples.


@LAYOUTS
@FLOATS
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3e4])
@pytest.mark.parametrize("mode", ["zero", "reference"])
def test_constant_student_channels(mode, value, layout, dtype, backend):
    """Value (m - 1) / (2 m) per channel; gradient 0, or the published -t^ / (C m eps)."""
    s, t = torch.full((2, 3, 4, 5), value).to(dtype), torch.randn(2, 3, 4, 5).to(dtype)
    loss, grad = run(functools.partial(kd.pearson_loss, on_constant=mode), layout(s), layout(t))
    torch.testing.assert_close(loss.double(), torch.tensor(39 / 80).double(), rtol=1e-5, atol=0)
    x = t.double().transpose(0, 1).flatten(1)
    hat = ((x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-6)).view(3, 2, 4, 5).transpose(0, 1)
    expected = torch.zeros_like(hat) if mode == "zero" else -hat / (3 * 40 * 1e-6)
    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(grad.double(), expected, rtol=rtol, atol=rtol * expected.abs().max().item())


@LAYOUTS
@FLOATS
@pytest.mark.parametrize("mode", ["zero", "reference"])
def test_constant_teacher_channels(mode, layout, dtype, backend):
    """t^ = 0: value (m - 1) / (2 m) per channel, up to eps, whatever the student is: no gradient."""
    s, t = torch.randn(2, 3, 4, 5).to(dtype), torch.full((2, 3, 4, 5), 0.1).to(dtype)
    loss, grad = run(functools.partial(kd.pearson_loss, on_constant=mode), layout(s), layout(t))
    torch.testing.assert_close(loss.double(), torch.tensor(39 / 80).double(), rtol=1e-5, atol=0)
    assert grad.isfinite().all() and grad.abs().max() < 1e-6


@LAYOUTS
@FLOATS
@pytest.mark.parametrize(("mode", "eps"), [("zero", 1e-6), ("zero", 0.0), ("reference", 1e-6)])
def test_constant_on_both_sides_gives_0(eps, mode, layout, dtype, backend):
    student = layout(torch.full((2, 3, 4, 5), 0.1).to(dtype)).requires_grad_()
    teacher = layout(torch.full((2, 3, 4, 5), -7.3).to(dtype))
    zero_with_graph(LOSS, [student], kd.pearson_loss(student, teacher, on_constant=mode, eps=eps))


@FLOATS
@LAYOUTS
@pytest.mark.parametrize("channels", [1, 5, 70])
def test_one_sample_per_channel_gives_0(channels, layout, dtype, backend):
    student = layout(torch.randn(1, channels, 1, 1).to(dtype)).requires_grad_()
    zero_with_graph(LOSS, [student], kd.pearson_loss(student, torch.randn(1, channels, 1, 1).to(dtype)))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)])
@pytest.mark.parametrize("level_reduction", ["sum", "mean"])
def test_empty_levels(shape, level_reduction, backend):
    student = torch.randn(shape, requires_grad=True)
    loss = kd.pearson_loss(student, torch.randn(shape), level_reduction=level_reduction)
    assert loss.shape == ()
    zero_with_graph(LOSS, [student], loss)


@LAYOUTS
@pytest.mark.parametrize("side", [0, 1])
def test_nan_stays_in_its_channel(side, layout, backend):
    """The loss is NaN; the gradient of the other channels does not move by a bit."""
    sides = [torch.randn(2, 70, 5, 7), torch.randn(2, 70, 5, 7)]
    _, sound = run(kd.pearson_loss, *map(layout, sides))
    sides[side][1, 66, 2, 3] = float("nan")
    loss, grad = run(kd.pearson_loss, *map(layout, sides))
    others = [c for c in range(70) if c != 66]
    assert loss.isnan() and grad[:, 66].isnan().any()
    assert torch.equal(grad[:, others], sound[:, others])


@pytest.mark.parametrize("magnitude", [1e-12, 1e-3, 1e4, 1e15])
@LAYOUTS
def test_magnitudes(magnitude, layout, backend):
    """float32 features of any scale whose squares are in range."""
    s, t = torch.randn(2, 9, 15, 17) * magnitude, torch.randn(2, 9, 15, 17) * magnitude
    result = check(kd.pearson_loss, layout(s), layout(t), length=s.numel())
    assert result.loss.isfinite()


# Resizing.


@FLOATS
@pytest.mark.parametrize("resize", ["student", "teacher"])
@pytest.mark.parametrize("larger", ["student", "teacher"])
@LAYOUTS
def test_resize(larger, resize, layout, dtype, backend):
    """The side named is resized in float32, bilinear; the gradient goes through, in the student's dtype and size."""
    small, large = torch.randn(2, 3, 4, 5).to(dtype), torch.randn(2, 3, 7, 9).to(dtype)
    s, t = (large, small) if larger == "student" else (small, large)
    loss, grad = run(functools.partial(kd.pearson_loss, resize=resize), layout(s), layout(t))
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def by_hand(student):
        student, teacher = student.to(wide), t.to(wide)
        if resize == "student":
            student = F.interpolate(student, size=t.shape[2:], mode="bilinear", align_corners=False)
        else:
            teacher = F.interpolate(teacher, size=s.shape[2:], mode="bilinear", align_corners=False)
        with kd.use_backend("reference"):
            return kd.pearson_loss(student, teacher)

    expected, expected_grad = run(by_hand, s)
    assert grad.dtype == dtype and grad.shape == s.shape
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(grad, expected_grad)


def test_resize_only_where_sizes_differ(backend):
    """resize=None serves equal sizes, and the keyword changes nothing there."""
    s, t = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    assert torch.equal(kd.pearson_loss(s, t, resize=None), kd.pearson_loss(s, t, resize="teacher"))


def test_resize_to_nothing_gives_0(backend):
    student = torch.randn(2, 3, 4, 5, requires_grad=True)
    zero_with_graph(LOSS, [student], kd.pearson_loss(student, torch.randn(2, 3, 0, 5)))


def _zeros(*shape: int, **options) -> torch.Tensor:
    return torch.zeros(shape, **options)


FIRST, SECOND = _zeros(2, 3, 4, 5), _zeros(2, 3, 2, 2)
BAD = bad_features()
BAD += [
    ({"eps": -1e-6}, ValueError, "eps|-1e-06"),
    ({"eps": float("nan")}, ValueError, "eps|nan"),
    ({"eps": float("inf")}, ValueError, "eps|inf"),
    ({"eps": "1"}, TypeError, "eps|str"),
    ({"eps": None}, TypeError, "eps|NoneType"),
    ({"eps": torch.tensor(1e-6)}, TypeError, "eps|Tensor"),
    ({"on_constant": "raise"}, ValueError, "on_constant|'zero'|'reference'|'raise'"),
    ({"resize": "both"}, ValueError, "resize|'student'|'teacher'|None|'both'"),
    (
        {"teacher": [FIRST, _zeros(2, 3, 3, 2)], "resize": None},
        ValueError,
        "student[1]|teacher[1]|(2, 3, 2, 2)|(2, 3, 3, 2)",
    ),
    ({"student": [FIRST, _zeros(2, 3, 0, 2)]}, ValueError, "student[1]|(2, 3, 0, 2)|(2, 2)"),
    ({"teacher": [FIRST, _zeros(2, 3, 4, 4, requires_grad=True)]}, ValueError, "teacher[1]|detach"),
]


@pytest.mark.parametrize(("change", "error_type", "message"), BAD)
def test_bad_input(change, error_type, message):
    base = {"student": [FIRST.clone().requires_grad_(), SECOND], "teacher": [FIRST, SECOND]}
    check_bad(LOSS, base, change, error_type, message)
