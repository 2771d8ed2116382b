"""What the objective is configured with and given: levels, weights, boxes, what is empty, what is missing or wrong."""

from __future__ import annotations

import itertools

import pytest
import torch
from numerics import error
from objective_cases import (
    EPS,
    FEATURES,
    SHAPES,
    TERMS,
    assert_equals_the_sum,
    inputs_of,
    launches,
    reference,
    some,
    with_leaves,
)

import kdkernels as kd


def test_terms_of_weight_zero_cost_nothing():
    terms = {**some(TERMS), "pearson": {"loss_weight": 0}, "temperature_kl": {"loss_weight": 0.0}}
    called, _ = with_leaves(inputs_of())
    results = []
    objective = kd.DetectionDistillationLoss(**terms)
    names = launches(lambda: results.append(objective(**called)))
    assert not any(name.startswith(("pearson", "temperature_kl")) for name in names)
    assert results[0].terms["pearson"] == 0 and results[0].terms["temperature_kl"] == 0
    alone = kd.DetectionDistillationLoss(masked_mse={}, pearson={"loss_weight": 0}, decoupled_kl={"loss_weight": 0})
    features = {k: v for k, v in called.items() if "features" in k or k == "masks"}
    assert alone(**features).terms["decoupled_kl"] == 0  # its inputs may be missing


def test_only_terms_of_weight_zero():
    called, leaves = with_leaves(inputs_of())
    total = kd.DetectionDistillationLoss(pearson={"loss_weight": 0})(**called).total
    assert total == 0
    total.backward()
    assert all(s.grad is None or not s.grad.any() for s in leaves)


def test_weights_of_a_call_replace_the_configured_ones():
    called, _ = with_leaves(inputs_of())
    objective = kd.DetectionDistillationLoss(**some(FEATURES))
    plain = objective(**called).terms
    changed = objective(**called, loss_weights={"pearson": torch.tensor(10.0), "masked_mse": 0}).terms
    assert error(changed["pearson"], 2 * plain["pearson"]) <= 4 * EPS and changed["masked_mse"] == 0
    with pytest.raises(ValueError, match="loss_weights: 'peason' is not a configured term"):
        objective(**called, loss_weights={"peason": 1.0})


def test_a_weight_that_learns_gets_its_gradient():
    weight = torch.tensor(0.7, requires_grad=True)
    called, _ = with_leaves(inputs_of())
    objective = kd.DetectionDistillationLoss(**some(FEATURES))
    result = objective(**called, loss_weights={"pearson": weight})
    result.total.backward()
    assert error(weight.grad * weight.detach(), result.terms["pearson"]) <= 4 * EPS
    assert not result.terms["pearson"].requires_grad


def test_tensor_weights_follow_the_module():
    objective = kd.DetectionDistillationLoss(pearson={"loss_weight": torch.tensor(2.0)})
    assert objective.to("meta").configured["pearson"]["loss_weight"].device.type == "meta"
    assert not objective.state_dict()


def test_dicts_of_levels():
    given = inputs_of()
    names = ["0", "1", "pool"]
    as_dict = {side: dict(zip(names, given[side])) for side in ("student_features", "teacher_features", "masks")}
    as_dict["teacher_features"] = dict(reversed(as_dict["teacher_features"].items()))
    terms = {"masked_mse": {}, "pearson": {"levels": ["0", "pool"]}}
    called, _ = with_leaves(given)
    students = dict(zip(names, called["student_features"]))
    found = kd.DetectionDistillationLoss(**terms)(**{**as_dict, "student_features": students})
    wanted = kd.DetectionDistillationLoss(masked_mse={}, pearson={"levels": [0, 2]})(**called)
    assert torch.equal(found.total, wanted.total)
    assert "pearson/pool" in found.details


def test_boxes_make_the_masks():
    boxes = [torch.tensor([[4.0, 4.0, 60.0, 50.0]]), torch.zeros(0, 4)]
    called, _ = with_leaves(inputs_of())
    del called["masks"]
    strides = [4, 8, 16]
    objective = kd.DetectionDistillationLoss(masked_mse={})
    found = objective(**called, boxes=boxes, strides=strides)
    masks = kd.masks.ground_truth_masks(boxes, [s[2:] for s in SHAPES], strides)
    assert torch.equal(found.total, objective(**called, masks=masks).total)
    flat = torch.tensor([[0.0, 4.0, 4.0, 60.0, 50.0], [-1.0, 0, 0, 9, 9]])
    assert torch.equal(found.total, objective(**called, boxes=flat, strides=strides).total)


def test_unequal_sizes_are_resized_for_pearson():
    given = inputs_of()
    given["teacher_features"][2] = torch.randn(2, 8, 7, 9)
    given["masks"] = given["masks"][:2]
    terms = {"pearson": {}}
    assert_equals_the_sum(terms, {**given, "masks": None})


EMPTY = {
    "no boxes": lambda g: {**g, "masks": [torch.zeros_like(m) for m in g["masks"]]},
    "no rows": lambda g: {
        k: (v[:0] if k not in ("student_features", "teacher_features", "masks") else v) for k, v in g.items()
    },
    "no pictures": lambda g: {
        k: ([x[:0] for x in v] if k in ("student_features", "teacher_features", "masks") else v) for k, v in g.items()
    },
    "a level without pixels": lambda g: {
        k: ([*v[:2], v[2][..., :0]] if k in ("student_features", "teacher_features", "masks") else v)
        for k, v in g.items()
    },
}


@pytest.mark.parametrize("what", EMPTY)
@pytest.mark.parametrize("one_pass", ["auto", False])
def test_empty_inputs(what, one_pass):
    terms = {**some(TERMS), "pearson": {}}
    result = assert_equals_the_sum(terms, EMPTY[what](inputs_of()), one_pass=one_pass)
    assert result.total.isfinite()


@pytest.mark.parametrize("one_pass", ["auto", False])
def test_everything_empty_is_zero_with_a_graph(one_pass):
    given = EMPTY["no rows"](EMPTY["no pictures"](inputs_of()))
    called, leaves = with_leaves(given)
    total = kd.DetectionDistillationLoss(**some(TERMS), one_pass=one_pass)(**called).total
    assert total == 0
    total.backward()
    assert all(s.grad is not None and s.grad.shape == s.shape for s in leaves)


@pytest.mark.parametrize(
    "term, missing",
    [
        ("masked_mse", "student_features"),
        ("masked_mse", "teacher_features"),
        ("masked_mse", "masks"),
        ("pearson", "teacher_features"),
        ("decoupled_kl", "foreground"),
        ("decoupled_kl", "teacher_logits"),
        ("temperature_kl", "student_logits"),
        ("soft_cross_entropy", "teacher_logits"),
        ("binary_kl", "student_logits"),
        ("bounded_regression", "target_deltas"),
        ("bounded_regression", "student_deltas"),
    ],
)
def test_a_missing_input_is_named(term, missing):
    given = inputs_of()
    del given[missing]
    with pytest.raises(
        ValueError, match=rf"{term} is configured, but .*{missing}.* (is|are) not given|{term}.*{missing}"
    ):
        kd.DetectionDistillationLoss(**some([term]))(**given)


@pytest.mark.parametrize(
    "keywords, kind, text",
    [
        ({}, ValueError, "no term is configured"),
        ({"pearson": 1.0}, TypeError, "pearson: expected a dict of keywords or None, got float"),
        ({"pearson": {"temperature": 1.0}}, TypeError, "pearson: no keyword 'temperature'; expected eps"),
        ({"decoupled_kl": {"levels": [0]}}, TypeError, "decoupled_kl: no keyword 'levels'"),
        ({"binary_kl": {"reduction": "none"}}, ValueError, "binary_kl: reduction='none'"),
        ({"pearson": {}, "one_pass": "no"}, ValueError, "one_pass: expected 'auto', True or False"),
        ({"pearson": {}, "one_pass": True, "process_group": object()}, ValueError, "process_group: .* two passes"),
    ],
)
def test_bad_configurations(keywords, kind, text):
    with pytest.raises(kind, match=text):
        kd.DetectionDistillationLoss(**keywords)


@pytest.mark.parametrize(
    "changed, text",
    [
        ({"levels": [3]}, r"pearson: levels has 3, the student's levels are \[0, 1, 2\]"),
        ({"levels": [0, 0]}, "pearson: levels has 0 twice"),
        ({"levels": []}, "pearson: levels is empty"),
        ({"eps": -1.0}, "eps: expected a number of at least 0"),
    ],
)
def test_bad_levels(changed, text):
    with pytest.raises(ValueError, match=text):
        kd.DetectionDistillationLoss(pearson=changed)(**inputs_of())


def test_bad_calls():
    given = inputs_of()
    objective = kd.DetectionDistillationLoss(masked_mse={})
    boxes = {"boxes": [torch.zeros(0, 4)] * 2, "strides": [4, 8, 16]}
    with pytest.raises(ValueError, match="masks and boxes are both given"):
        objective(**given, **boxes)
    del given["masks"]
    with pytest.raises(ValueError, match="strides has 2 levels, student_features has 3"):
        objective(**given, boxes=boxes["boxes"], strides=[4, 8])
    with pytest.raises(ValueError, match="strides is not given"):
        objective(**given, boxes=boxes["boxes"])
    with pytest.raises(ValueError, match="masks has 1 levels, student_features has 3"):
        objective(**given, masks=[torch.ones(2, 20, 33)])
    with pytest.raises(ValueError, match="teacher_features has 1"):
        objective(**{**given, "teacher_features": given["teacher_features"][:1]}, **boxes)
    with pytest.raises(TypeError):
        objective(given["student_features"])


@pytest.mark.parametrize("frozen", list(itertools.combinations(range(3), 2)), ids=str)
def test_frozen_levels(frozen):
    called, _ = with_leaves(inputs_of())
    for i in frozen:
        called["student_features"][i].requires_grad_(False)
    (level,) = set(range(3)) - set(frozen)
    kd.DetectionDistillationLoss(**some(FEATURES))(**called).total.backward()
    _, _, grads64 = reference(some(FEATURES), inputs_of(), True)
    assert error(called["student_features"][level].grad, grads64[level]) <= 1e-5
    assert all(called["student_features"][i].grad is None for i in frozen)
