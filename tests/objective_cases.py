"""Inputs of the objective, the sum of the single functions, and the judge that holds one against the other."""

from __future__ import annotations

from typing import Any

import torch
from losses import OpCalls
from numerics import bound, error
from torch import Tensor

import kdkernels as kd
from kdkernels import ops

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


def launches(call: Any) -> list[str]:
    """The names of this library's ops that a call runs."""
    with OpCalls() as calls:
        call()
    return [op._opname for op, _, _ in calls.calls]
