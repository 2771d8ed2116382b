"""Each edge rule of the feature formulas by its own test: flat channels, deviations, resizing, empty levels."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

from kdkernels import reference as ref
from kdkernels.reference.pearson import resize_levels

INF = float("inf")


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


# Pearson.


@pytest.mark.parametrize("mode", ["zero", "reference"])
def test_a_flat_student_channel(mode):
    student, teacher = torch.randn(2, 3, 4, 5).double(), torch.randn(2, 3, 4, 5).double()
    student[:, 1] = 0.1
    leaf = student.clone().requires_grad_()
    loss = ref.pearson_loss([leaf], [teacher], on_constant=mode)
    (gradient,) = grad(loss, leaf, create_graph=True)
    (second,) = grad(gradient.square().sum(), leaf)
    assert second.isfinite().all()
    others = ref.pearson_loss([student[:, [0, 2]]], [teacher[:, [0, 2]]]) * 2 / 3
    flat = teacher[:, 1]
    standard = (flat - flat.mean()) / (flat.std() + 1e-6)
    close(loss.detach(), others + standard.square().sum() / (2 * 3 * 40))
    expected = torch.zeros_like(standard) if mode == "zero" else -standard / (3 * 40 * 1e-6)
    torch.testing.assert_close(gradient[:, 1], expected, rtol=1e-9, atol=1e-9)


def test_flat_in_both_is_zero_and_flat_teacher_alone_is_finite():
    student = torch.full((2, 1, 4, 5), 0.1).requires_grad_()
    loss = ref.pearson_loss([student], [torch.full((2, 1, 4, 5), 7.0)], on_constant="reference")
    assert loss == 0 and (grad(loss, student)[0] == 0).all()
    student = torch.randn(2, 1, 4, 5).double().requires_grad_()
    loss = ref.pearson_loss([student], [torch.full((2, 1, 4, 5), 7.0)])
    assert loss.item() == pytest.approx(39 / 80, rel=1e-5)
    assert grad(loss, student)[0].abs().max() < 1e-6


def test_no_eps_keeps_flat_channels_finite():
    student = torch.full((2, 1, 4, 5), 0.1).requires_grad_()
    loss = ref.pearson_loss([student], [torch.randn(2, 1, 4, 5)], eps=0.0, on_constant="reference")
    assert loss.item() == pytest.approx(39 / 80, rel=1e-5) and (grad(loss, student)[0] == 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-2, 1e30])
def test_deviations_of_any_size(scale):
    """Squares of 1e-30 vanish and squares of 1e30 overflow in float32: neither may reach the loss."""
    student, teacher = torch.randn(2, 3, 4, 5) * scale, torch.randn(2, 3, 4, 5)
    leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    loss, expected = (ref.pearson_loss([s], [t]) for s, t in ((leaf, teacher), (exact, teacher.double())))
    (found,), (wanted,) = grad(loss, leaf), grad(expected, exact)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_a_mean_that_dwarfs_the_deviation():
    student, teacher = 1e4 + 1e-2 * torch.randn(4, 3, 16, 16), 1e4 + 1e-2 * torch.randn(4, 3, 16, 16)
    leaf, exact = student.clone().requires_grad_(), student.double().requires_grad_()
    loss, expected = (ref.pearson_loss([s], [t]) for s, t in ((leaf, teacher), (exact, teacher.double())))
    (found,), (wanted,) = grad(loss, leaf), grad(expected, exact)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 4, 4)], ids=str)
def test_fewer_than_two_samples(shape):
    level, other = torch.full(shape, INF).requires_grad_(), torch.randn(2, 3, 4, 5).requires_grad_()
    teacher = torch.randn(2, 3, 4, 5)
    loss = ref.pearson_loss([level, other], [torch.randn(shape), teacher], level_reduction="mean")
    close(loss.detach(), ref.pearson_loss([other.detach()], [teacher]) / 2)
    assert (grad(loss, level)[0] == 0).all()


def test_resize_by_side():
    student, teacher = torch.randn(2, 3, 8, 10).bfloat16(), torch.randn(2, 3, 4, 5).bfloat16()
    scale = partial(torch.nn.functional.interpolate, mode="bilinear", align_corners=False)
    s, t = resize_levels([student], [teacher], "student")
    assert torch.equal(s[0], scale(student.float(), (4, 5))) and t[0] is teacher
    s, t = resize_levels([student], [teacher], "teacher")
    assert torch.equal(t[0], scale(teacher.float(), (8, 10))) and s[0] is student
    s, t = resize_levels([student], [torch.zeros(2, 3, 8, 10)], None)
    assert s[0] is student
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 10\).*\(2, 3, 4, 5\)"):
        resize_levels([student], [teacher], None)


def test_resize_of_empty_levels():
    student = torch.randn(2, 3, 4, 5).requires_grad_()
    (resized,), _ = resize_levels([student], [torch.zeros(2, 3, 0, 7)], "student")
    assert resized.shape == (2, 3, 0, 7) and (grad(resized.sum(), student)[0] == 0).all()
    with pytest.raises(ValueError, match="empty level"):
        resize_levels([torch.zeros(2, 3, 0, 7)], [student.detach()], "student")


# Masked MSE.


@pytest.mark.parametrize("normalizer", ["elements", "pixels", "batch"])
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 3, 0, 5), (2, 0, 4, 5)], ids=str)
def test_empty_feature_levels_count(normalizer, shape):
    empty, other = torch.randn(shape).requires_grad_(), torch.randn(2, 3, 4, 5)
    teachers, masks = (
        [torch.randn(shape), torch.zeros_like(other)],
        [torch.rand(shape[0], *shape[2:]), torch.rand(2, 4, 5)],
    )
    loss = ref.masked_mse_loss([empty, other], teachers, masks, normalizer=normalizer)
    close(loss.detach(), ref.masked_mse_loss([other], teachers[1:], masks[1:], normalizer=normalizer) / 2)
    assert grad(loss, empty)[0].shape == shape


@pytest.mark.parametrize("normalizer, divisor", [("elements", 2 * 3 * 1.5), ("pixels", 2 * 1.5), ("batch", 4)])
def test_masked_mse_divisors(normalizer, divisor):
    student, mask = torch.randn(2, 3, 4, 5).double(), torch.zeros(2, 4, 5)
    mask[0, 0, 0], mask[1, 2, 3] = 1.0, 0.5
    loss = ref.masked_mse_loss(
        [student], [torch.zeros_like(student)], [mask], background_weight=0.0, normalizer=normalizer
    )
    close(loss, (student.square() * mask.double()[:, None]).sum() / divisor)


def test_a_region_of_less_than_half_an_element_divides_by_one():
    student = torch.randn(1, 1, 2, 2).double()
    mask = torch.zeros(1, 2, 2)
    mask[0, 0, 0] = 0.25
    loss = ref.masked_mse_loss([student], [torch.zeros_like(student)], [mask], background_weight=0.0)
    close(loss, 0.25 * student[0, 0, 0, 0] ** 2)
