"""Inputs that once broke a kernel: close sides, magnitudes at the ends of float32, constants of unusual kinds."""

from __future__ import annotations

import pytest
import torch
from numerics import check, evaluate, exact

import kdkernels as kd

PAIRS = {
    "temperature_kl": (kd.temperature_kl_loss, {"temperature": 2.0}),
    "binary_kl": (kd.binary_kl_loss, {}),
    "decoupled_kl": (kd.decoupled_kl_loss, {"foreground_weight": 2.0, "foreground_temperature": 3.0}),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("classes", [5, 80, 5001])
def test_close_logits(name, distance, classes, backend):
    """A converged student: the divergence is many orders below the terms that make it up.

    The exact value is computed from the float32 inputs. Each term that is summed has a few roundings, and all are of
    one sign, so 32 eps bounds the sum whatever luck the formula's own cancellation has.
    """
    if backend == "reference":
        pytest.skip("the formula cancels here; it is the peer, not the subject")
    function, options = PAIRS[name]
    inputs = [torch.rand(6) > 0.5] if name == "decoupled_kl" else []
    teacher = torch.randn(6, classes) * 3
    student = teacher + distance * torch.randn(6, classes)
    got = evaluate(function, student, teacher, *inputs, **options)
    truth = exact(function, student, teacher, *inputs, **options)
    relative = (got.loss.double() - truth.loss).abs() / truth.loss
    assert relative < 32 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("temperature", [100.0, 1e4])
@pytest.mark.parametrize("name", ["temperature_kl", "binary_kl"])
def test_high_temperature(name, temperature, backend):
    """Softened until the two sides are close, whatever the logits."""
    if backend == "reference":
        pytest.skip("the formula cancels here; it is the peer, not the subject")
    function, _ = PAIRS[name]
    student, teacher = torch.randn(16, 80) * 3, torch.randn(16, 80) * 3
    got = evaluate(function, student, teacher, temperature=temperature)
    truth = exact(function, student, teacher, temperature=temperature)
    assert (got.loss.double() - truth.loss).abs() / truth.loss < 32 * torch.finfo(torch.float32).eps


def test_close_binary_logits_at_a_temperature(backend):
    """The difference of close logits is taken before T divides them: afterwards each has a rounding of its own."""
    if backend == "reference":
        pytest.skip("the formula cancels here; it is the peer, not the subject")
    teacher = torch.randn(6, 80) * 3
    student = teacher + 1e-4 * torch.randn(6, 80)
    got = evaluate(kd.binary_kl_loss, student, teacher, temperature=3.0)
    truth = exact(kd.binary_kl_loss, student, teacher, temperature=3.0)
    assert (got.loss.double() - truth.loss).abs() / truth.loss < 32 * torch.finfo(torch.float32).eps


def test_binary_logits_at_the_middle(backend):
    """log 2 to the last digits: every element is the same, so no errors average out."""
    teacher = torch.full((4, 33), 20.0)
    loss = kd.binary_kl_loss(torch.zeros(4, 33), teacher, reduction="mean")
    assert abs(loss.item() - 0.6931471373) < 4 * torch.finfo(torch.float32).eps * 0.7


def test_close_rows_with_an_offset(backend):
    """A common offset of one side changes nothing: it is taken out before anything is compared."""
    if backend == "reference":
        pytest.skip("the formula cancels here; it is the peer, not the subject")
    teacher = torch.randn(6, 80)
    student = teacher + 0.01 * torch.randn(6, 80)
    moved = (student.double() + 1000.0).float()
    got = evaluate(kd.temperature_kl_loss, moved, teacher)
    truth = exact(kd.temperature_kl_loss, moved, teacher)
    # Each logit's difference, about .01, is known to the rounding of the teacher less its maximum, about 3 * 2^-24.
    assert (got.loss.double() - truth.loss).abs() / truth.loss < 1e-4


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("magnitude", [1e-24, 1e-20, 1e-12, 1e12, 1e18, 1e19, 1e25])
def test_pearson_at_any_magnitude(magnitude, layout, backend):
    """Squares of these leave float32; the loss does not see the scale (but for eps, here 0)."""
    student = (torch.randn(2, 5, 6, 7) * magnitude).to(memory_format=layout)
    teacher = torch.randn(2, 5, 6, 7).to(memory_format=layout)
    check(kd.pearson_loss, student, teacher, eps=0.0, length=84)
    check(kd.pearson_loss, teacher, student, eps=0.0, length=84)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("exponent", [-19, -22, -24, -30, -38])
def test_pearson_of_a_nearly_dead_channel(exponent, layout, backend):
    """One value beside zeros, so small that its square is 0: finite, and the other channels are not lost."""
    student = torch.zeros(1, 8, 3, 3).to(memory_format=layout)
    student[0, :, 0, 0] = torch.randn(8) * 10.0**exponent
    student[0, 0] = torch.randn(3, 3)
    teacher = torch.randn(1, 8, 3, 3).to(memory_format=layout)
    check(kd.pearson_loss, student, teacher, length=9)


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
def test_teacher_from_inference_mode(backend_name):
    """A common way to run a teacher: its tensors cannot be saved by autograd, but they are constants."""
    with torch.inference_mode():
        features, logits = torch.randn(2, 3, 4, 5), torch.randn(6, 4)
        mask, labels = torch.rand(2, 4, 5), torch.randint(0, 4, (6,))
    student, rows = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(6, 4, requires_grad=True)
    with kd.use_backend(backend_name):
        losses = [
            kd.masked_mse_loss(student, features, mask),
            kd.pearson_loss(student, features),
            kd.temperature_kl_loss(rows, logits),
            kd.binary_kl_loss(rows, logits),
            kd.decoupled_kl_loss(rows, logits, labels > 1),
            kd.soft_cross_entropy_loss(rows, logits, target=labels, hard_weight=0.5),
            kd.bounded_regression_loss(rows, logits, logits + 1),
        ]
        for loss in losses:
            (grad,) = torch.autograd.grad(loss, student if loss in losses[:2] else rows)
            assert grad.isfinite().all() and grad.abs().sum() > 0


@pytest.mark.parametrize("convert", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, torch.Tensor.to_mkldnn])
def test_tensors_that_are_not_dense_are_refused(convert):
    x, y = torch.randn(6, 7), torch.randn(6, 7)
    with pytest.raises(TypeError, match=r"student.*dense"):
        kd.temperature_kl_loss(convert(x), y)
    with pytest.raises(TypeError, match=r"teacher.*dense"):
        kd.temperature_kl_loss(x, convert(y))


def test_a_sparse_mask_is_refused():
    x = torch.randn(1, 2, 3, 3)
    with pytest.raises(TypeError, match=r"mask\[0\].*dense"):
        kd.masked_mse_loss(x, x.clone(), torch.ones(1, 3, 3).to_sparse())


def test_ops_without_tensors_are_refused():
    kd.masked_mse_loss(torch.randn(1, 1, 1, 1), torch.randn(1, 1, 1, 1), torch.ones(1, 1, 1))  # the kernels are loaded
    with pytest.raises(RuntimeError, match="no kernel"):
        torch.ops.kdkernels.masked_mse([], [], [], 1.0, None, 1.0, None, 0, True)


def test_mask_range_of_a_parameter():
    x = torch.randn(1, 2, 3, 3)
    with pytest.raises(ValueError, match="values must lie"):
        kd.masked_mse_loss(x, x + 1, torch.nn.Parameter(torch.full((1, 3, 3), 3.0), requires_grad=False))


def test_nan_teacher_under_full_hard_weight(backend):
    """The gradient is NaN, so the loss must say so."""
    student = torch.tensor([[1.0, 2.0, 3.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, float("nan"), 1.0]])
    loss = kd.soft_cross_entropy_loss(student, teacher, target=torch.tensor([0]), hard_weight=1.0)
    assert loss.isnan()


def test_module_attributes_take_effect_after_construction():
    """A schedule sets them between steps, whether the constructor was given them or not."""
    x, y = torch.randn(6, 7), torch.randn(6, 7)
    module = kd.TemperatureKLLoss()
    assert module.temperature == 1.0 and "temperature=1.0" in repr(module)
    module.temperature = 4.0
    assert torch.equal(module(x, y), kd.temperature_kl_loss(x, y, temperature=4.0))
