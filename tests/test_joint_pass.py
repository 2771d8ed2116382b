"""The objective's calls in one op on CUDA: equal to the same calls apart, to the bit in every gradient, in fewer
launches. test_detection_distillation.py holds the objective against the formula on every backend.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from joint_cases import HEADS, MAIN, STRANGE, SUBSETS, Given, clones, same, step
from numerics import error
from objective_cases import EPS, FEATURES, TERMS, inputs_of, some, with_leaves
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import kdkernels as kd
from kdkernels import ops
from kdkernels.losses import feature_pass, joint_pass

pytestmark = pytest.mark.parametrize("backend", ["cuda"], indirect=True)
F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("terms", SUBSETS, ids="+".join)
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, BF16), (BF16, F32)], ids=str)
def test_equals_the_calls_apart(terms, dtypes, backend, monkeypatch):
    given = inputs_of(rows=300)
    for name, x in given.items():
        if name.startswith(("student_", "teacher_")):
            dtype = dtypes[name.startswith("teacher_")]
            given[name] = [v.to(dtype) for v in x] if isinstance(x, list) else x.to(dtype)
    same(monkeypatch, some(terms), given)


@pytest.mark.parametrize("upstream", [0.0, -3.0, 65536.0])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_any_upstream_gradient(upstream, dtype, backend, monkeypatch):
    same(monkeypatch, some(TERMS), inputs_of(dtype=dtype), upstream=upstream)


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1, 2)])
def test_frozen_levels(frozen, backend, monkeypatch):
    _, grads = same(monkeypatch, some(MAIN), inputs_of(), frozen=frozen)
    assert len(grads) == 3 - len(frozen) + 2


EMPTY = {
    "no rows": ("student_logits", "teacher_logits", "foreground", "target", "row_weight"),
    "no boxes": ("student_deltas", "teacher_deltas", "target_deltas", "delta_weight"),
}


@pytest.mark.parametrize("empty", [("no rows",), ("no boxes",), ("no rows", "no boxes")], ids="+".join)
@pytest.mark.parametrize("terms", [MAIN, HEADS], ids="+".join)
def test_empty_heads(empty, terms, backend, monkeypatch):
    given = inputs_of()
    for name in (name for kind in empty for name in EMPTY[kind]):
        given[name] = given[name][:0]
    found, _ = same(monkeypatch, some(terms), given)
    for name in terms:
        if name not in FEATURES and ("no boxes" if name == "bounded_regression" else "no rows") in empty:
            assert found.terms[name] == 0


def test_levels_without_pixels(backend, monkeypatch):
    found, _ = same(monkeypatch, some(MAIN), inputs_of([(2, 8, 0, 5), (2, 8, 0, 3), (0, 8, 2, 3)]))
    assert found.terms["masked_mse"] == 0 and found.terms["pearson"] == 0
    same(monkeypatch, some(MAIN), inputs_of([(2, 8, 9, 5), (2, 8, 0, 3), (2, 8, 2, 3)]))


def test_all_of_it_empty(backend, monkeypatch):
    found, grads = same(monkeypatch, some(TERMS), inputs_of([(2, 8, 0, 5)] * 3, 0))
    assert found.total == 0 and found.total.grad_fn is not None and not any(g.numel() for g in grads)


def test_no_foreground_and_no_background(backend, monkeypatch):
    for value in (False, True):
        given = inputs_of()
        given["foreground"][:] = value
        found, _ = same(monkeypatch, some(MAIN), given)
        assert found.details[f"decoupled_kl/{'background' if value else 'foreground'}"] == 0


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("layout", STRANGE)
def test_rows_that_do_not_follow_each_other(layout, dtype, backend, monkeypatch):
    given = inputs_of(dtype=dtype)
    for name in ("logits", "deltas"):
        for side in ("student", "teacher", "target"):
            if f"{side}_{name}" in given:
                given[f"{side}_{name}"] = STRANGE[layout](given[f"{side}_{name}"])
    rows = given["student_logits"].shape[:-1]
    for name in ("foreground", "target", "row_weight", "delta_weight"):
        given[name] = given[name].reshape(rows)
    same(monkeypatch, some(TERMS), given)


def test_weights_on_the_device(backend, monkeypatch):
    """They are read by the kernels: as tensors they give what they give as numbers."""
    numbers = {
        "masked_mse": {"foreground_weight": 3.0, "loss_weight": 2.0},
        "pearson": {"loss_weight": 0.5},
        "decoupled_kl": {"foreground_weight": 0.25, "background_weight": 2.0, "loss_weight": 0.5},
        "temperature_kl": {"avg_factor": 32.0, "loss_weight": 4.0},
        "soft_cross_entropy": {"hard_weight": 0.25, "avg_factor": 16.0, "loss_weight": 2.0},
        "binary_kl": {"avg_factor": -1.0},
        "bounded_regression": {"bound_weight": 0.5, "smooth_l1_weight": 2.0, "avg_factor": 8.0, "loss_weight": 0.5},
    }
    tensors = {name: {k: torch.tensor(x) for k, x in keywords.items()} for name, keywords in numbers.items()}
    wanted, expected = step(numbers, inputs_of())
    found, grads = same(monkeypatch, tensors, inputs_of())
    assert found.terms["binary_kl"] == 0  # a divisor that is not positive
    assert error(found.total, wanted.total.detach()) <= 8 * EPS
    assert all(error(a, b) <= 8 * EPS for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("terms", [MAIN, tuple(TERMS), HEADS], ids="+".join)
def test_every_value_is_written(terms, backend):
    """Outputs and workspace are allocated full of NaN here."""
    given = inputs_of(rows=300)
    wanted, expected = step(some(terms), given)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        found, grads = step(some(terms), given)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
    assert torch.equal(found.total, wanted.total) and found.total.isfinite()
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True) if b is not None)
    for a, b in ((found.terms, wanted.terms), (found.details, wanted.details)):
        assert all(torch.equal(x, b[name]) for name, x in a.items())


def test_a_head_that_is_not_in_the_node_is_added_to_it(backend, monkeypatch):
    """A weight that asks for a gradient multiplies its loss outside."""
    weight = torch.tensor(0.5, requires_grad=True)
    terms = {**some(MAIN), "decoupled_kl": {"loss_weight": weight}}
    given, leaves = with_leaves(inputs_of())
    total = kd.DetectionDistillationLoss(**terms)(**given).total
    grads = torch.autograd.grad(total, [*leaves, weight])
    wanted, expected = step({**some(MAIN), "decoupled_kl": {"loss_weight": 0.5}}, inputs_of())
    assert error(total.detach(), wanted.total.detach()) <= 8 * EPS
    assert all(error(a, b) <= 8 * EPS for a, b in zip(grads[:-1], expected, strict=True))
    assert error(grads[-1], 2 * wanted.terms["decoupled_kl"]) <= 8 * EPS


def test_second_derivatives_come_from_the_formula(backend):
    given, leaves = with_leaves(inputs_of([(1, 3, 4, 5)], 6))
    total = kd.DetectionDistillationLoss(**{name: {} for name in MAIN})(**given).total
    grads = torch.autograd.grad(total, leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
    assert all(x.isfinite().all() and x.any() for x in second)


# The op itself.


def recorded(monkeypatch: pytest.MonkeyPatch, terms: Given, given: Given) -> tuple[tuple[Any, ...], Any]:
    """The joint op's arguments and results."""
    calls, joint = [], ops.OPS[joint_pass.OP]["cuda"]

    def record(*arguments: Any) -> Any:
        results = joint(*arguments)
        calls.append((arguments, clones(results)))
        return results

    with monkeypatch.context() as patch:
        patch.setitem(ops.OPS[joint_pass.OP], "cuda", record)
        step(terms, given)
    (call,) = calls
    return call


@pytest.mark.parametrize("terms", SUBSETS, ids="+".join)
def test_packing(terms, backend, monkeypatch):
    """Unpacked, the calls are what was packed; and the fake has the real results' shapes."""
    keywords = {name: {**TERMS[name], "loss_weight": torch.tensor(2.0)} for name in terms}
    packed, real = recorded(monkeypatch, keywords, inputs_of())
    calls = joint_pass.unpack(*packed)
    assert len(calls) == len([x for x in terms if x not in FEATURES]) + any(x in FEATURES for x in terms)
    again = joint_pass.pack(calls)
    assert all(a is b for a, b in zip(packed[0], again[0], strict=True)) and list(packed[1:]) == list(again[1:])
    with FakeTensorMode() as mode:
        fake = torch.ops.kdkernels.detection_distillation.default(
            *pytree.tree_map_only(Tensor, mode.from_tensor, packed)
        )
    for a, b in zip(pytree.tree_leaves(fake), pytree.tree_leaves(real), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def test_the_op_tells_of_wrong_arguments(backend, monkeypatch):
    (tensors, integers, numbers), _ = recorded(monkeypatch, some(MAIN), inputs_of())
    op = ops.OPS[joint_pass.OP]["cuda"]
    op(tensors, integers, numbers)
    calls = joint_pass.unpack(tensors, integers, numbers)
    features, head = calls[0], calls[1]
    assert features[0] == feature_pass.OP
    twice = joint_pass.pack([features, features])
    last = joint_pass.pack([head, features])
    many = joint_pass.pack([head] * (joint_pass.MOST_HEADS + 1))
    unknown = (tensors, [99], [])
    for bad, said in (
        ((tensors[:-1], integers, numbers), "end in an argument"),
        ((tensors, integers[:-1], numbers), "end in an argument"),
        ((tensors, integers, numbers[:-1]), "end in an argument"),
        (twice, "features come first"),
        (last, "features come first"),
        (many, "more heads"),
        (unknown, "no such op"),
    ):
        with pytest.raises(RuntimeError, match=said):
            op(*bad)
    op(*joint_pass.pack([head] * joint_pass.MOST_HEADS))
    name, (student, teacher, *rest) = head
    for changed in ((student, teacher.bfloat16()), (student.double(), teacher), (student, teacher[:, :-1])):
        with pytest.raises(RuntimeError):
            op(*joint_pass.pack([(name, [*changed, *rest])]))
