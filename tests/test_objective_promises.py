"""What the objective and the one-pass form promise in odd company: second derivatives of students that depend on each
other, operands that change, inference tensors, weights that move, and inputs that are wrong."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from numerics import error
from objective_cases import EPS, FEATURES, inputs_of, some, with_leaves
from torch import Tensor, nn

import kdkernels as kd
from kdkernels.losses import one_pass as one_pass_form

FORMS = pytest.mark.parametrize("one_pass", ["auto", False])
Objective = kd.DetectionDistillationLoss


def both_ways(loss: Tensor, leaf: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient, and the same with a graph of its own."""
    (plain,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, leaf, create_graph=True)
    assert twice.requires_grad
    return plain, twice.detach()


# Second derivatives.


@FORMS
@pytest.mark.parametrize("name", ["pearson", "masked_mse"])
def test_levels_that_depend_on_each_other(name, one_pass):
    """FPN's last level is pooled from the one before: each path counts once."""
    leaf = torch.randn(2, 4, 8, 8, requires_grad=True)
    level = leaf * 1.0
    students = [level, F.max_pool2d(level, 1, 2), level]
    teachers = [torch.randn_like(s) for s in students]
    masks = [[torch.rand(2, *s.shape[2:]) for s in students]] if name == "masked_mse" else []
    function = getattr(kd, f"{name}_loss")
    plain, twice = both_ways(function(students, teachers, *masks, one_pass=one_pass), leaf)
    assert error(twice, plain) <= 8 * EPS


@FORMS
def test_heads_of_the_same_features(one_pass):
    leaf = torch.randn(1, 4, 8, 8, requires_grad=True)
    features = leaf * 1.0
    logits = features.flatten(2).transpose(1, 2).reshape(64, 4)
    teachers, wanted = [torch.randn(1, 4, 8, 8)], torch.randn(64, 4)
    result = Objective(pearson={}, temperature_kl={}, soft_cross_entropy={}, one_pass=one_pass)(
        student_features=[features],
        teacher_features=teachers,
        student_logits=logits,
        teacher_logits=wanted,
    )
    plain, twice = both_ways(result.total, leaf)
    assert error(twice, plain) <= 8 * EPS


@pytest.mark.parametrize("resize", ["student", "teacher"])
def test_resized_sides_are_kept_for_them(resize):
    student, teacher = torch.randn(1, 3, 8, 8, requires_grad=True), torch.randn(1, 3, 4, 4)
    plain, twice = both_ways(kd.pearson_loss(student, teacher, resize=resize), student)
    assert error(twice, plain) <= 8 * EPS


CHANGED = {
    "loss weight": lambda s, x: kd.PearsonLoss(loss_weight=x)(s, s.detach().flip(0)),
    "foreground weight": lambda s, x: kd.masked_mse_loss(s, -s.detach(), torch.ones(2, 4, 4), foreground_weight=x),
    "row weight": lambda s, x: kd.temperature_kl_loss(s, -s.detach(), weight=x),
    "average": lambda s, x: kd.binary_kl_loss(s, -s.detach(), avg_factor=x),
    "class weight": lambda s, x: kd.soft_cross_entropy_loss(s, -s.detach(), class_weight=x),
    "bound weight": lambda s, x: kd.bounded_regression_loss(s, -s.detach(), s.detach() + 1, bound_weight=x),
}


@pytest.mark.parametrize("what", [*CHANGED, "mask"])
def test_an_operand_that_changed_is_noticed(what):
    student = torch.randn(2, 3, 4, 4, requires_grad=True)
    operand = torch.tensor(0.5)
    if what == "mask":
        operand = torch.rand(2, 4, 4)
        loss = kd.masked_mse_loss(student, -student.detach(), operand)
    else:
        operand = {"row weight": torch.rand(2, 3, 4), "class weight": torch.rand(4)}.get(what, operand)
        loss = CHANGED[what](student, operand)
    operand.mul_(2)
    with pytest.raises(RuntimeError, match="was changed in place"):
        torch.autograd.grad(loss, student, create_graph=True)


# Inference tensors.


def test_levels_and_weights_of_inference_mode():
    with torch.inference_mode():
        frozen, weight = torch.randn(1, 3, 4, 4), torch.tensor(2.0)
    student, teachers = torch.randn(1, 3, 4, 4, requires_grad=True), [torch.randn(1, 3, 4, 4)] * 2
    for one_pass in ("auto", False):
        objective = Objective(pearson={"loss_weight": weight}, one_pass=one_pass)
        total = objective(student_features=[frozen, student], teacher_features=teachers).total
        plain, twice = both_ways(total, student)
        assert error(twice, plain) <= 8 * EPS


@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
def test_inside_inference_mode(backend_name):
    given = inputs_of(dtype=torch.float64)
    objective = Objective(**some(FEATURES), gradient_norms=True)
    expected = objective(**with_leaves(given)[0])
    with torch.inference_mode(), kd.use_backend(backend_name):
        found = objective(**given)
    assert error(found.total, expected.total) <= 8 * EPS
    assert all(error(found.gradient_norms[k], expected.gradient_norms[k]) <= 2e-5 for k in FEATURES)


# Weights.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_model_keeps_its_weights(dtype):
    objective = Objective(temperature_kl={"avg_factor": torch.tensor(1e5), "loss_weight": torch.tensor(0.3)})
    single = kd.TemperatureKLLoss(avg_factor=torch.tensor(1e5), loss_weight=torch.tensor(0.3))
    model = nn.ModuleList([objective, single]).to(dtype)
    assert model[0].configured["temperature_kl"]["avg_factor"] == 1e5
    assert model[0].configured["temperature_kl"]["loss_weight"].dtype == torch.float32
    assert model[1].avg_factor == 1e5 and model[1].loss_weight.dtype == torch.float32


def test_a_weight_that_is_a_parameter():
    weight = nn.Parameter(torch.tensor(2.0))
    objective = Objective(pearson={"loss_weight": weight})
    assert list(objective.parameters()) == [weight]
    twin = copy.deepcopy(objective.double())
    assert twin.configured["pearson"]["loss_weight"] is next(twin.parameters())
    given = inputs_of()
    objective.float()(**given).total.backward()
    assert weight.grad is not None


def test_a_changed_total_leaves_the_terms():
    for one_pass in ("auto", False):
        called, _ = with_leaves(inputs_of())
        result = Objective(temperature_kl={}, one_pass=one_pass)(**called)
        before = result.terms["temperature_kl"].clone()
        total = result.total
        total /= 4
        assert torch.equal(result.terms["temperature_kl"], before)


def test_weights_of_zero_find_a_tensor_with_a_graph():
    levels = [torch.randn(1, 2, 3, 3), torch.randn(1, 2, 3, 3, requires_grad=True)]
    teachers = [torch.randn(1, 2, 3, 3)] * 2
    Objective(pearson={"loss_weight": 0})(student_features=levels, teacher_features=teachers).total.backward()


@pytest.mark.parametrize(
    "bad, kind", [(torch.ones(1), ValueError), ("1", TypeError), (None, TypeError), (True, TypeError)]
)
def test_bad_loss_weights(bad, kind):
    given = inputs_of()
    with pytest.raises(kind, match=r"pearson\.loss_weight: expected a number or a 0-d"):
        Objective(pearson={"loss_weight": bad})
    with pytest.raises(kind, match=r"loss_weights\['pearson'\]: expected a number or a 0-d"):
        Objective(pearson={})(**given, loss_weights={"pearson": bad})
    with pytest.raises(kind, match="loss_weight: expected a number or a 0-d"):
        kd.PearsonLoss(loss_weight=bad)(given["student_features"], given["teacher_features"])
    with pytest.raises(TypeError, match="loss_weights: expected a dict"):
        Objective(pearson={})(**given, loss_weights=2.0)


# Wrong inputs.


@pytest.mark.parametrize(
    "changed, kind, text",
    [
        ({"student_features": [], "teacher_features": []}, ValueError, "student_features: no levels"),
        ({"student_features": [None] * 3}, TypeError, r"student_features\[0\]: expected a tensor"),
        (
            {"teacher_features": [torch.randn(3, 4)] * 3},
            ValueError,
            r"teacher_features\[0\]: expected \(N, C, H, W\)",
        ),
        ({"strides": 4}, TypeError, "strides: expected a list with one entry per level, got int"),
    ],
)
def test_wrong_inputs_are_named(changed, kind, text):
    given = {**inputs_of(), "masks": None, "boxes": [torch.zeros(0, 4)] * 2, "strides": [4, 8, 16]}
    with pytest.raises(kind, match=text):
        Objective(masked_mse={})(**{**given, **changed})
    with pytest.raises(TypeError, match="pearson: levels: expected a list of levels, got int"):
        Objective(pearson={"levels": 2})(**given)


def test_the_form_without_private_names(monkeypatch):
    """Where autograd cannot be asked, every backward copies."""
    monkeypatch.setattr(one_pass_form, "_graph_is_kept", lambda: True)
    called, leaves = with_leaves(inputs_of())
    expected = torch.autograd.grad(Objective(**some(FEATURES), one_pass=False)(**called).total, leaves[:3])
    found = torch.autograd.grad(Objective(**some(FEATURES))(**called).total, leaves[:3])
    assert all(error(a, b) <= 8 * EPS for a, b in zip(found, expected))
