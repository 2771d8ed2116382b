"""The objective: equal to the sum of the single functions, whichever terms it has and whatever is empty."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import bound, error
from torch import Tensor

import kdkernels as kd
from kdkernels import ops
from kdkernels.losses.feature_pass import OP

SHAPES = [(2, 8, 20, 33), (2, 8, 10, 17), (2, 8, 5, 9)]
EPS = torch.finfo(torch.float32).eps
TERMS: dict[str, dict[str, Any]] = {
    "masked_mse": {"foreground_weight": 3.0, "background_weight": 0.5, "loss_weight": 2.0},
    "pearson": {"loss_weight": 5.0, "levels": [0, 2], "level_reduction": "mean"},
    "decoupled_kl": {"foreground_temperature": 2.0, "loss_weight": 0.5},
    "temperature_kl": {"temperature": 3.0, "loss_weight": 1.5},
    "soft_cross_entropy": {"hard_weight": 0.4, "loss_weight": 0.7},
    "binary_kl": {"temperature": 2.0, "loss_weight": 0.1},
    "bounded_regression": {"bound_weight": 0.8, "loss_weight": 3.0},
}
FEATURES, LOGITS = ("masked_mse", "pearson"), ("decoupled_kl", "temperature_kl", "soft_cross_entropy", "binary_kl")


def inputs_of(
    shapes: list[tuple[int, ...]] = SHAPES, rows: int = 50, dtype: torch.dtype = torch.float32, seed: int = 0
) -> dict[str, Any]:
    """Everything a call can be given."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return {
        "student_features": [normal(*s).to(dtype) for s in shapes],
        "teacher_features": [normal(*s).to(dtype) for s in shapes],
        "masks": [torch.rand(s[0], *s[2:], generator=generator) for s in shapes],
        "student_logits": (3 * normal(rows, 9)).to(dtype),
        "teacher_logits": (3 * normal(rows, 9)).to(dtype),
        "foreground": torch.rand(rows, generator=generator) < 0.3,
        "target": torch.randint(0, 9, (rows,), generator=generator),
        "row_weight": torch.rand(rows, generator=generator) + 0.5,
        "student_deltas": normal(rows, 4).to(dtype),
        "teacher_deltas": normal(rows, 4).to(dtype),
        "target_deltas": normal(rows, 4).to(dtype),
        "delta_weight": torch.rand(rows, generator=generator) + 0.5,
    }


STUDENTS = ("student_features", "student_logits", "student_deltas")


def with_leaves(given: dict[str, Any]) -> tuple[dict[str, Any], list[Tensor]]:
    """The same inputs with fresh leaves for the student, and those."""
    given, leaves = dict(given), []
    for name in STUDENTS:
        x = given.get(name)
        if x is None:
            continue
        fresh = [v.detach().clone().requires_grad_() for v in (x if isinstance(x, list) else [x])]
        leaves += fresh
        given[name] = fresh if isinstance(x, list) else fresh[0]
    return given, leaves


def single(name: str, keywords: dict[str, Any], given: dict[str, Any]) -> Tensor:
    """One weighted term by its own function."""
    keywords = dict(keywords)
    weight = keywords.pop("loss_weight", 1.0)
    function = getattr(kd, f"{name}_loss")
    if name in FEATURES:
        levels = keywords.pop("levels", None) or range(len(given["student_features"]))
        sides = [[given[side][i] for i in levels] for side in ("student_features", "teacher_features")]
        masks = [[given["masks"][i] for i in levels]] if name == "masked_mse" else []
        return weight * function(*sides, *masks, **keywords)
    if name == "bounded_regression":
        deltas = (given[f"{who}_deltas"] for who in ("student", "teacher", "target"))
        return weight * function(*deltas, weight=given["delta_weight"], **keywords)
    more = [given["foreground"]] if name == "decoupled_kl" else []
    target = {"target": given["target"]} if name == "soft_cross_entropy" else {}
    logits = given["student_logits"], given["teacher_logits"]
    return weight * function(*logits, *more, weight=given["row_weight"], **target, **keywords)


def reference(terms: dict[str, dict[str, Any]], given: dict[str, Any], double: bool) -> tuple[Tensor, dict, list]:
    """Total, terms and gradients by the formulas, in float64 or in the inputs' own dtype."""

    def convert(x: Any) -> Any:
        if isinstance(x, list):
            return [convert(v) for v in x]
        return x.double() if double and isinstance(x, Tensor) and x.is_floating_point() else x

    given, leaves = with_leaves({name: convert(x) for name, x in given.items()})
    with kd.use_backend("reference"):
        found = {name: single(name, keywords, given) for name, keywords in terms.items()}
        total = sum(found.values())
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return total.detach(), {name: x.detach() for name, x in found.items()}, list(grads)


def assert_equals_the_sum(terms: dict[str, dict[str, Any]], given: dict[str, Any], **options: Any) -> Any:
    """Value, terms and every gradient, at the grid's bound."""
    objective = kd.DetectionDistillationLoss(**terms, **options)
    called, leaves = with_leaves(given)
    result = objective(**called)
    grads = torch.autograd.grad(result.total, leaves, allow_unused=True)
    total64, terms64, grads64 = reference(terms, given, True)
    total32, terms32, grads32 = reference(terms, given, False)
    assert result.total.dim() == 0 and result.total.grad_fn is not None
    assert error(result.total, total64) <= bound(error(total32, total64), result.total.dtype, 1)
    assert list(result.terms) == list(terms)
    for name, x in result.terms.items():
        assert not x.requires_grad and x.dim() == 0
        assert error(x, terms64[name]) <= bound(error(terms32[name], terms64[name]), x.dtype, 1)
    summed = sum(result.terms.values())
    assert error(summed, result.total.detach()) <= 4 * torch.finfo(summed.dtype).eps * len(terms)
    for leaf, grad, wanted, peer in zip(leaves, grads, grads64, grads32, strict=True):
        assert (grad is None) == (wanted is None)
        if grad is not None:
            assert grad.dtype == leaf.dtype and (ops._forced == "reference" or grad.stride() == leaf.stride())
            assert error(grad, wanted) <= bound(error(peer, wanted), grad.dtype, 1)
    return result


def some(names: Any) -> dict[str, dict[str, Any]]:
    return {name: TERMS[name] for name in names}


GRID = [
    FEATURES,
    ("masked_mse",),
    ("pearson",),
    ("masked_mse", "decoupled_kl", "bounded_regression"),
    tuple(TERMS),
    ("temperature_kl", "bounded_regression"),
]


@pytest.mark.parametrize("terms", GRID, ids=lambda x: "+".join(x))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_equals_the_sum_of_the_single_functions(backend, terms, dtype):
    assert_equals_the_sum(some(terms), inputs_of(dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "misaligned", "sliced", "transposed"])
def test_layouts(backend, dtype, layout):
    def change(x: Tensor) -> Tensor:
        if layout == "channels_last":
            return x.to(memory_format=torch.channels_last)
        if layout == "misaligned":
            return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        if layout == "sliced":
            return torch.cat([x, x], -1)[..., : x.shape[-1]]
        return x.transpose(2, 3).contiguous().transpose(2, 3)

    given = inputs_of(dtype=dtype)
    for side in ("student_features", "teacher_features"):
        given[side] = [change(x) for x in given[side]]
    objective = kd.DetectionDistillationLoss(**some(FEATURES))
    students = [s.detach().requires_grad_() for s in given["student_features"]]
    result = objective(**{**given, "student_features": students})
    grads = torch.autograd.grad(result.total, students)
    total64, _, grads64 = reference(some(FEATURES), given, True)
    total32, _, grads32 = reference(some(FEATURES), given, False)
    assert error(result.total, total64) <= bound(error(total32, total64), torch.float32, 1)
    for grad, wanted, peer in zip(grads, grads64, grads32):
        assert error(grad, wanted) <= bound(error(peer, wanted), dtype, 1)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sets(st.sampled_from(sorted(TERMS)), min_size=1),
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 5), st.integers(0, 7), st.integers(1, 40)), min_size=1, max_size=4
    ),
    st.integers(0, 20),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(["auto", False]),
    st.integers(0, 99),
)
def test_any_subset_shape_and_dtype(names, shapes, rows, dtype, one_pass, seed):
    terms = {name: {k: v for k, v in TERMS[name].items() if k != "levels"} for name in TERMS if name in names}
    assert_equals_the_sum(terms, inputs_of(shapes, rows, dtype, seed), one_pass=one_pass)


def test_mutants_are_caught():
    """The judge above must tell a wrong gradient, weight or term."""
    given = inputs_of()
    terms = some(FEATURES)
    for wrong in (
        {"masked_mse": {**terms["masked_mse"], "loss_weight": 2.1}, "pearson": terms["pearson"]},
        {"masked_mse": terms["masked_mse"], "pearson": {**terms["pearson"], "levels": [0, 1]}},
        {"masked_mse": {**terms["masked_mse"], "background_weight": 0.0}, "pearson": terms["pearson"]},
    ):
        called, leaves = with_leaves(given)
        grads = torch.autograd.grad(kd.DetectionDistillationLoss(**wrong)(**called).total, leaves, allow_unused=True)
        _, _, grads64 = reference(terms, given, True)
        assert any(g is not None and error(g, w) > 1e-4 for g, w in zip(grads, grads64))


# One pass.


def launches(call) -> list[str]:
    from losses import OpCalls

    with OpCalls() as calls:
        call()
    return [op._opname for op, _, _ in calls.calls]


def test_features_are_read_once_and_all_is_one_node():
    objective = kd.DetectionDistillationLoss(**some(("masked_mse", "pearson", "decoupled_kl", "bounded_regression")))
    called, leaves = with_leaves(inputs_of())
    results = []
    forward = launches(lambda: results.append(objective(**called)))
    assert forward.count(OP) == 1
    assert not {"masked_mse", "pearson", "decoupled_kl"} & set(forward)
    total = results[0].total
    assert type(total.grad_fn).__name__ == "_OnePassBackward"
    assert launches(lambda: torch.autograd.grad(total, leaves)) == ["one_pass_scale_"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_without_a_gradient_features_are_read_once_too(dtype):
    objective = kd.DetectionDistillationLoss(**some(FEATURES), gradient_norms=True)
    given = inputs_of(dtype=dtype)
    results = []
    assert launches(lambda: results.append(objective(**given))) == [OP]
    called, _ = with_leaves(given)
    expected = objective(**called)
    assert results[0].total.grad_fn is None
    for found, wanted in zip(results[0][1:], expected[1:]):
        assert found.keys() == wanted.keys()
        assert all(error(found[k], wanted[k]) <= 8 * EPS for k in found)
    with torch.no_grad():
        assert error(objective(**called).total, expected.total.detach()) <= 8 * EPS


@pytest.mark.parametrize("upstream", [1.0, 0.3, 65536.0])
def test_kept_graphs_and_any_upstream_gradient(upstream):
    objective = kd.DetectionDistillationLoss(**some(("masked_mse", "pearson", "decoupled_kl", "bounded_regression")))
    called, leaves = with_leaves(inputs_of())
    total = objective(**called).total
    factor = torch.tensor(upstream)
    once = [g.clone() for g in torch.autograd.grad(total, leaves, retain_graph=True)]
    for keep in (True, True, False):
        found = torch.autograd.grad(total, leaves, factor, retain_graph=keep)
        assert all(torch.equal(a, b * factor) for a, b in zip(found, once))


def test_one_pass_true_is_taken_at_its_word():
    given, _ = with_leaves(inputs_of())
    kd.DetectionDistillationLoss(**some(TERMS), one_pass=True)(**given)
    half, _ = with_leaves(inputs_of(dtype=torch.float16))
    with pytest.raises(RuntimeError, match=r"masked_mse.*one_pass=True cannot be had: torch.float16"):
        kd.DetectionDistillationLoss(**some(FEATURES), one_pass=True)(**half)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("one_pass", ["auto", False])
def test_second_derivatives(dtype, one_pass):
    terms = some(("masked_mse", "pearson", "temperature_kl"))
    objective = kd.DetectionDistillationLoss(**terms, one_pass=one_pass)
    given = inputs_of([(1, 2, 3, 4)] * 3, 5, dtype)

    def penalty(function):
        called, leaves = with_leaves(given)
        leaves = leaves[:-1]  # no deltas
        grads = torch.autograd.grad(function(called), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.float().square().sum() for g in grads), leaves, allow_unused=True)

    found = penalty(lambda called: objective(**called).total)
    with kd.use_backend("reference"):
        wanted = penalty(lambda called: sum(single(name, k, called) for name, k in terms.items()))
    for a, b in zip(found, wanted):
        assert error(a, b) <= 8 * torch.finfo(dtype).eps


# What it tells.


@pytest.mark.parametrize("one_pass", ["auto", False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend_name", ["cpu", "reference"])
def test_details_add_up(one_pass, dtype, backend_name):
    terms = some(("masked_mse", "pearson", "decoupled_kl"))
    with kd.use_backend(backend_name):
        given, _ = with_leaves(inputs_of(dtype=dtype))
        result = kd.DetectionDistillationLoss(**terms, one_pass=one_pass)(**given)
    details = result.details
    levels = {f"masked_mse/{i}" for i in range(3)} | {f"pearson/{i}" for i in (0, 2)}
    regions = {f"{name}/{r}" for name in ("masked_mse", "decoupled_kl") for r in ("foreground", "background")}
    assert set(details) == levels | regions
    assert not any(x.requires_grad or x.dim() for x in details.values())
    for name in ("masked_mse", "decoupled_kl"):
        parts = details[f"{name}/foreground"] + details[f"{name}/background"]
        assert error(parts, result.terms[name]) <= 8 * EPS
    for name, places in (("masked_mse", range(3)), ("pearson", (0, 2))):
        assert error(sum(details[f"{name}/{i}"] for i in places), result.terms[name]) <= 8 * EPS
    other, _ = with_leaves(inputs_of(dtype=dtype))
    only_background = {**terms, "masked_mse": {**terms["masked_mse"], "foreground_weight": 0.0}}
    wanted = kd.DetectionDistillationLoss(**only_background)(**other).terms["masked_mse"]
    assert error(details["masked_mse/background"], wanted) <= 8 * EPS


@pytest.mark.parametrize("one_pass", ["auto", False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradient_norms(one_pass, dtype, layout):
    """Of each term alone at the features: they add up float32 numbers, before any rounding to the student's dtype."""
    given = inputs_of([(2, 8, 9, 13), (2, 8, 10, 17), (2, 8, 5, 9)], dtype=dtype)
    for side in ("student_features", "teacher_features"):
        given[side] = [x.to(memory_format=layout) for x in given[side]]
    called, _ = with_leaves(given)
    result = kd.DetectionDistillationLoss(**some(FEATURES), one_pass=one_pass, gradient_norms=True)(**called)
    assert set(result.gradient_norms) == set(FEATURES)
    for name in FEATURES:
        _, _, grads = reference(some([name]), given, True)
        wanted = sum(g.square().sum() for g in grads if g is not None)
        assert error(result.gradient_norms[name], wanted) <= 2e-5
        assert not result.gradient_norms[name].requires_grad
    plain = kd.DetectionDistillationLoss(**some(FEATURES))(**called)
    assert plain.gradient_norms == {}


# Configuration and inputs.


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


@pytest.mark.parametrize("frozen", itertools.combinations(range(3), 2), ids=str)
def test_frozen_levels(frozen):
    called, _ = with_leaves(inputs_of())
    for i in frozen:
        called["student_features"][i].requires_grad_(False)
    (level,) = set(range(3)) - set(frozen)
    kd.DetectionDistillationLoss(**some(FEATURES))(**called).total.backward()
    _, _, grads64 = reference(some(FEATURES), inputs_of(), True)
    assert error(called["student_features"][level].grad, grads64[level]) <= 1e-5
    assert all(called["student_features"][i].grad is None for i in frozen)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    """One graph: two passes, the same numbers to rounding."""
    terms = some(("masked_mse", "pearson", "decoupled_kl", "bounded_regression"))
    objective = kd.DetectionDistillationLoss(**terms)
    called, leaves = with_leaves(inputs_of())
    expected = objective(**called).total
    wanted = torch.autograd.grad(expected, leaves)

    def step(given):
        result = objective(**given)
        return result.total, result.terms

    called, leaves = with_leaves(inputs_of())
    total, terms_found = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")(called)
    assert error(total, expected.detach()) <= 8 * EPS and set(terms_found) == set(terms)
    for a, b in zip(torch.autograd.grad(total, leaves), wanted):
        assert error(a, b) <= 8 * EPS


def test_a_level_of_neither_term_has_a_gradient_of_zero(backend):
    if backend in ("triton", "reference"):
        pytest.skip("it has no such op")
    op = ops.OPS[OP]["cuda" if backend.startswith("cuda") else "cpu"]
    levels = [torch.randn(1, 2, 3, 4), torch.randn(1, 2, 5, 4)]
    rest = (1.0, None, 1.0, None, 0, True, 1e-6, False, True, 1.0, None, 1.0, None, False)
    _, values, grads = op(levels, [-x for x in levels], [torch.ones(1, 3, 4)], [0, -1], [], [0, 1], *rest)
    assert grads[0].any() and not grads[1].any()
    assert not values[1].any()


def test_the_op_tells_of_wrong_arguments():
    op = ops.OPS[OP]["cpu"]
    s, mask = torch.randn(1, 2, 3, 4), torch.ones(1, 3, 4)
    rest = (1.0, None, 1.0, None, 0, True, 1e-6, False, True, 1.0, None, 1.0, None, False)
    op([s], [s], [mask], [0], [0], [0], *rest)
    for bad in (
        ([s], [s], [mask], [1], [0], [0]),
        ([s], [s], [mask], [0], [1], [0]),
        ([s], [s], [mask], [0], [0], [1]),
        ([s], [s], [mask], [0], [0], [0, 0]),
        ([s], [s], [mask[:, :2]], [0], [0], [0]),
        ([s], [s], [mask.double()], [0], [0], [0]),
        ([s.double()], [s], [mask], [0], [0], [0]),
        ([s], [s[:, :1]], [mask], [0], [0], [0]),
        ([s], [], [mask], [0], [0], [0]),
        ([s], [s], [mask], [0, 0], [0], [0]),
        ([], [], [], [], [], []),
    ):
        with pytest.raises(RuntimeError):
            op(*bad, *rest)
