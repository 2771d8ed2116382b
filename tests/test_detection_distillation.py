"""The objective: equal to the sum of the single functions, whichever terms it has, in one pass and in two."""

from __future__ import annotations

import emulator_library
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numerics import bound, error
from objective_cases import (
    EPS,
    FEATURES,
    TERMS,
    assert_equals_the_sum,
    inputs_of,
    launches,
    reference,
    single,
    some,
    with_leaves,
)
from torch import Tensor

import kdkernels as kd
from kdkernels import ops
from kdkernels.losses.feature_pass import OP

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


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
def test_any_subset_shape_and_dtype(backend, names, shapes, rows, dtype, one_pass, seed):
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
    names = set()
    for name, keywords in some(FEATURES).items():
        _, _, grads = reference(some([name]), given, True)
        levels = [g.square().sum() for g in grads if g is not None]
        assert error(result.gradient_norms[name], sum(levels)) <= 2e-5
        assert not result.gradient_norms[name].requires_grad
        places = keywords.get("levels", range(3))
        for level, wanted in zip(places, levels, strict=True):
            assert error(result.gradient_norms[f"{name}/{level}"], wanted) <= 2e-5
        names |= {name, *(f"{name}/{level}" for level in places)}
    assert set(result.gradient_norms) == names
    plain = kd.DetectionDistillationLoss(**some(FEATURES))(**called)
    assert plain.gradient_norms == {}


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


# What the forward launches on CUDA; a backward of all is one launch.
MAIN = ("masked_mse", "pearson", "decoupled_kl", "bounded_regression")
LAUNCHES = {
    ("masked_mse",): 3,  # the masks' counts, the features, the sums
    ("pearson",): 2,
    ("masked_mse", "pearson"): 3,
    ("decoupled_kl",): 2,  # the rows, their sum
    ("temperature_kl",): 2,
    ("soft_cross_entropy",): 2,
    ("binary_kl",): 2,
    ("bounded_regression",): 2,
    ("decoupled_kl", "bounded_regression"): 2,
    ("pearson", "decoupled_kl", "bounded_regression"): 3,
    MAIN: 3,
    tuple(TERMS): 3,
}


@pytest.mark.parametrize("terms", LAUNCHES, ids=lambda x: "+".join(x))
def test_launches_of_the_objective(backend, terms):
    """Five levels and two heads, counted where kernels are launched."""
    if backend != "cuda" or torch.cuda.is_available():
        pytest.skip("the emulator counts launches")
    emulator = emulator_library.load()
    objective = kd.DetectionDistillationLoss(**{name: {} for name in terms})
    called, leaves = with_leaves(inputs_of([(2, 4, 20 // 2**i + 1, 30 // 2**i + 1) for i in range(5)], 1024))
    before = emulator.kdkernels_emulator_launches()
    total = objective(**called).total
    forward = emulator.kdkernels_emulator_launches() - before
    torch.autograd.grad(total, leaves, allow_unused=True)
    backward = emulator.kdkernels_emulator_launches() - before - forward
    assert (forward, backward) == (LAUNCHES[terms], 1)
