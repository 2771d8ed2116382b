"""Laws that every input obeys, tried on inputs that hypothesis picks: invariances, signs, and where a NaN may reach.

Tolerances are counts of float32 roundings of the quantity that is rounded; what needs no rounding is equal to the bit.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import FEATURES, LOSSES, ROWS, Inputs, loss_and_gradients
from numerics import error

import kdkernels as kd

EPS = torch.finfo(torch.float32).eps
KL = ("temperature_kl", "binary_kl", "decoupled_kl")
quick = settings(deadline=None, max_examples=25, derandomize=True)
seeds = st.integers(0, 2**31)
# Widths around every vector length and block size, and the rest.
widths = st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 2047, 2048, 2049, 5000]))
rows = st.integers(1, 9)


def logits(seed: int, k: int, c: int, scale: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(scale * torch.randn(k, c, generator=generator) for _ in range(2))


def of_rows(name: str, student: torch.Tensor, teacher: torch.Tensor, seed: int = 0, **keywords) -> Inputs:
    """A row loss, one value per row, with the extra inputs that it needs."""
    generator = torch.Generator().manual_seed(seed)
    k = student.shape[0]
    others: list = [teacher]
    if name == "decoupled_kl":
        others.append(torch.rand(k, generator=generator) < 0.5)
        keywords["background_temperature"] = keywords.pop("temperature", 1.0)
    if name == "bounded_regression":
        others.append(torch.randn(student.shape, generator=generator))
    return Inputs(LOSSES[name].function, [student], others, {"reduction": "none", **keywords})


def width_of(name: str, c: int) -> int:
    return 4 if name == "bounded_regression" else c


@pytest.mark.parametrize("name", ["temperature_kl", "decoupled_kl", "soft_cross_entropy"])
@quick
@given(seeds, rows, widths, st.integers(-512, 512))
def test_softmax_forgets_a_common_shift(name, seed, k, c, shift):
    """Multiples of 1/256 stay exact when an integer is added, and a kernel that subtracts its maximum sees the same."""
    student, teacher = ((x * 256).round() / 256 for x in logits(seed, k, c))
    loss, (grad,) = loss_and_gradients(of_rows(name, student, teacher, seed))
    moved, (moved_grad,) = loss_and_gradients(of_rows(name, student + shift, teacher - shift, seed))
    # The maximum's subtraction is exact; running maxima over blocks rescale by factors that depend on it alone. What is
    # left is the sum over c classes of terms up to max|z|, each rounded a few times.
    accepted = 8 * EPS * math.sqrt(c)
    assert (moved - loss).abs().max() <= accepted * (1 + student.abs().max() + teacher.abs().max())
    assert (moved_grad - grad).abs().max() <= accepted


@quick
@given(seeds, st.integers(2, 12), st.floats(0.125, 8), st.floats(-4, 4), st.sampled_from([1, 2]))
def test_pearson_forgets_scale_and_shift(seed, side, scale, shift, n):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(n, 3, side, side, generator=generator) for _ in range(2))
    loss = kd.pearson_loss(student, teacher, eps=0)
    moved = kd.pearson_loss(student * scale + shift, teacher, eps=0)
    # Scaling and shifting round each value to eps of its size, up to 5 * scale + |shift|, against a deviation of about
    # scale: a relative change of the standardised values, and twice that of the loss, whose terms are at most 4 apart.
    assert abs(moved - loss) <= 16 * EPS * (5 + abs(shift) / scale) * 4


@pytest.mark.parametrize("name", KL)
@quick
@given(seeds, rows, widths, st.sampled_from([0.01, 1.0, 30.0]))
def test_kl_is_not_negative(name, seed, k, c, scale):
    """Up to the rounding of c terms, each p (log p - log q) with a probability's rounding in it."""
    student, teacher = logits(seed, k, c, scale)
    loss, _ = loss_and_gradients(of_rows(name, student, teacher, seed))
    outcomes = 2 * c if name == "binary_kl" else 1  # each class has a distribution of its own
    assert loss.min() >= -8 * EPS * math.sqrt(c) * outcomes


@pytest.mark.parametrize("name", KL)
@quick
@given(seeds, rows, widths, st.sampled_from([1.0, 30.0]))
def test_kl_is_zero_for_equal_logits_and_only_there(name, seed, k, c, scale):
    student, _ = logits(seed, k, c, scale)
    loss, (grad,) = loss_and_gradients(of_rows(name, student, student.clone(), seed))
    terms = 2 * c if name == "binary_kl" else 1
    assert loss.abs().max() <= 4 * EPS * terms
    assert grad.abs().max() <= 8 * EPS
    if c > 1 or name == "binary_kl":
        teacher = student / scale  # so that no probability is so small that its change is lost in rounding
        other = teacher.clone()
        other[:, 0] += 3
        assert loss_and_gradients(of_rows(name, other, teacher, seed))[0].min() > 4 * EPS * terms


@pytest.mark.parametrize("name", ["temperature_kl", "decoupled_kl"])
@quick
@given(seeds, rows, widths)
def test_kl_gradients_sum_to_zero(name, seed, k, c):
    """Each row is p_s - p_t times a number. Both sum to 1 up to c roundings of eps / c each, and the kernel's own
    normaliser, rounded once: eps. Some room for exp2, whose error (2e-7) is the same sign on many."""
    student, teacher = logits(seed, k, c)
    inputs = of_rows(name, student, teacher, seed)
    rows_loss = inputs(x := student.requires_grad_())
    (grad,) = torch.autograd.grad(rows_loss.sum(), x)
    assert grad.double().sum(1).abs().max() <= 8 * EPS


@pytest.mark.parametrize("name", ROWS)
@quick
@given(seeds, st.integers(2, 9), widths, st.sampled_from([math.nan, math.inf]))
def test_a_nan_stays_in_its_row(name, seed, k, c, bad):
    """Loss and gradient of all other rows keep their bits."""
    student, teacher = logits(seed, k, width_of(name, c))
    loss, (grad,) = loss_and_gradients(of_rows(name, student, teacher, seed))
    row = seed % k
    for side in (student, teacher):
        broken = side.clone()
        broken[row, seed % side.shape[1]] = bad
        pair = (broken, teacher) if side is student else (student, broken)
        got, (got_grad,) = loss_and_gradients(of_rows(name, *pair, seed))
        others = torch.arange(k) != row
        assert torch.equal(got[others], loss[others])
        assert torch.equal(got_grad[others], grad[others])
        if math.isnan(bad) and name != "bounded_regression":  # a NaN teacher has no gate, so there it is not an input
            assert got[row].isnan()


@pytest.mark.parametrize("name", ROWS)
@quick
@given(seeds, st.integers(1, 9), widths)
def test_rows_are_independent_of_each_other_and_of_their_order(name, seed, k, c):
    """One row alone, and the rows reversed: the same bits."""
    inputs = of_rows(name, *logits(seed, k, width_of(name, c)), seed)
    loss, (grad,) = loss_and_gradients(inputs)
    upstream = torch.linspace(1, 2, k)

    def picked(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        part = Inputs(inputs.function, [inputs.students[0][index]], [x[index] for x in inputs.others], inputs.keywords)
        (student,) = part.leaves()
        value = part(student)
        value.backward(upstream[index])
        return value.detach(), student.grad

    backwards = torch.arange(k).flip(0)
    for index in (backwards, torch.tensor([seed % k])):
        value, gradient = picked(index)
        if len(loss) > 1:  # with one row the ramp of loss_and_gradients is 1, as here
            assert torch.equal(gradient, grad[index])
        assert torch.equal(value, loss[index])


@pytest.mark.parametrize("name", ROWS)
@quick
@given(seeds, rows, widths)
def test_the_order_of_classes_does_not_matter(name, seed, k, c):
    """Up to the order of c roundings."""
    c = width_of(name, c)
    student, teacher = logits(seed, k, c)
    inputs = of_rows(name, student, teacher, seed)
    order = torch.randperm(c, generator=torch.Generator().manual_seed(seed))
    others = [x[:, order] if x.dim() == 2 else x for x in inputs.others]
    moved = Inputs(inputs.function, [student[:, order]], others, inputs.keywords)
    loss, (grad,) = loss_and_gradients(inputs)
    got, (got_grad,) = loss_and_gradients(moved)
    largest = 1 + student.abs().max() + teacher.abs().max()
    # Bounded regression sums squares of up to largest^2.
    scale = largest**2 if name == "bounded_regression" else largest * (c if name == "binary_kl" else 1)
    assert (got - loss).abs().max() <= 8 * EPS * math.sqrt(c) * scale
    assert (got_grad - grad[:, order]).abs().max() <= 8 * EPS * math.sqrt(c) * largest


@pytest.mark.parametrize("name", LOSSES)
def test_layouts_agree(name):
    """Strided copies have the same runs and so the same bits; channels_last sums in another order."""
    inputs = LOSSES[name].inputs("wide")
    loss, grads = loss_and_gradients(inputs)
    sliced = inputs.to_layout(lambda x: torch.cat([x, x], 0)[: x.shape[0]])
    got, got_grads = loss_and_gradients(sliced)
    assert torch.equal(got, loss) and all(torch.equal(a, b) for a, b in zip(got_grads, grads))
    strided = inputs.to_layout(lambda x: torch.stack([x, x], -1)[..., 0])
    got, got_grads = loss_and_gradients(strided)
    assert torch.equal(got, loss) and all(torch.equal(a, b) for a, b in zip(got_grads, grads))
    if name in FEATURES:
        got, got_grads = loss_and_gradients(inputs.to_layout(lambda x: x.to(memory_format=torch.channels_last)))
        # Sums of some 10^4 positive values, each partial sum rounded: the root of their number.
        assert error(got, loss) <= 4 * EPS * 100
        assert all(error(a, b) <= 4 * EPS * 100 for a, b in zip(got_grads, grads))


@pytest.mark.parametrize("name", FEATURES)
@quick
@given(seeds, st.integers(1, 5), st.integers(1, 6), st.integers(1, 40))
def test_the_order_of_the_batch_does_not_matter(name, seed, n, c, w):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(n, c, 5, w, generator=generator) for _ in range(2))
    mask = torch.rand(n, 5, w, generator=generator)

    def run(index):
        others = [mask[index]] if name == "masked_mse" else []
        return loss_and_gradients(Inputs(LOSSES[name].function, [student[index]], [teacher[index], *others]))

    loss, (grad,) = run(torch.arange(n))
    got, (got_grad,) = run(torch.arange(n).flip(0))
    assert error(got, loss) <= 8 * EPS * math.sqrt(n * 5 * w)
    assert error(got_grad, grad.flip(0)) <= 8 * EPS * math.sqrt(n * 5 * w)


@quick
@given(seeds, st.integers(1, 4), st.integers(1, 9), st.integers(1, 40))
def test_a_mask_of_ones_is_half_the_mean_squared_error(seed, n, c, w):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(n, c, 7, w, generator=generator) for _ in range(2))
    loss, (grad,) = loss_and_gradients(Inputs(kd.masked_mse_loss, [student], [teacher, torch.ones(n, 7, w)]))
    difference = student.double() - teacher.double()
    assert error(loss, difference.square().mean() / 2) <= 4 * EPS * math.sqrt(difference.numel())
    assert error(grad, difference / difference.numel()) <= 4 * EPS


@quick
@given(seeds, st.integers(1, 4), st.integers(1, 9), st.integers(1, 40), st.booleans())
def test_foreground_and_background_are_dual(seed, n, c, w, soft):
    """The complement of the mask with the weights exchanged. Masks of quarters have an exact complement."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(n, c, 7, w, generator=generator) for _ in range(2))
    mask = torch.randint(0, 5, (n, 7, w), generator=generator) / 4 if soft else torch.randint(0, 2, (n, 7, w)).float()
    weights = {"foreground_weight": 1.5, "background_weight": 0.25}
    swapped = {"foreground_weight": 0.25, "background_weight": 1.5}
    loss, (grad,) = loss_and_gradients(Inputs(kd.masked_mse_loss, [student], [teacher, mask], weights))
    got, (got_grad,) = loss_and_gradients(Inputs(kd.masked_mse_loss, [student], [teacher, 1 - mask], swapped))
    assert error(got, loss) <= 8 * EPS * math.sqrt(w)
    assert error(got_grad, grad) <= 4 * EPS


@quick
@given(seeds, rows, widths)
def test_decoupling_by_a_full_or_empty_foreground_is_temperature_kl(seed, k, c):
    student, teacher = logits(seed, k, c)
    plain = kd.temperature_kl_loss(student, teacher, temperature=2.0)
    for full in (True, False):
        foreground = torch.full((k,), full)
        loss = kd.decoupled_kl_loss(
            student, teacher, foreground, foreground_temperature=2.0, background_temperature=2.0
        )
        assert torch.equal(loss, plain)
