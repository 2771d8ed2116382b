"""The objective's calls in one op held against the same calls apart: for the tests of the joint pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import error
from objective_cases import EPS, FEATURES, LOGITS, STUDENTS, TERMS, with_leaves
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import kdkernels as kd
from kdkernels import ops
from kdkernels.losses import joint_pass

MAIN = ("masked_mse", "pearson", "decoupled_kl", "bounded_regression")
HEADS = (*LOGITS, "bounded_regression")
FIVE = [(2, 4, 20 // 2**i + 1, 30 // 2**i + 1) for i in range(5)]
Given = dict[str, Any]


def used(terms: Any) -> list[bool]:
    """Which of the students' leaves these terms of TERMS read."""
    levels = {i for name in terms if name in FEATURES for i in TERMS[name].get("levels", (0, 1, 2))}
    return [*(i in levels for i in range(3)), any(x in LOGITS for x in terms), "bounded_regression" in terms]


def clones(x: Any) -> Any:
    return pytree.tree_map_only(Tensor, torch.clone, x)


def unchanged(given: Given, before: Given) -> bool:
    """Whether a call left its tensors as they were."""
    both = zip(pytree.tree_leaves(given), pytree.tree_leaves(before), strict=True)
    return all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in both if isinstance(a, Tensor))


def step(terms: Given, given: Given, upstream: float = 1.0, frozen: tuple[int, ...] = ()) -> tuple[Any, list[Tensor]]:
    """A call's result and the gradients of the students that ask for one."""
    given = dict(given)
    leaves = []
    for name in STUDENTS:
        x = given.get(name)
        many = isinstance(x, list)
        fresh = [v.detach().requires_grad_() for v in (x if many else [] if x is None else [x])]
        if many:
            fresh = [v.requires_grad_(i not in frozen) for i, v in enumerate(fresh)]
        leaves += [v for v in fresh if v.requires_grad]
        given[name] = fresh if many else fresh[0] if fresh else None
    result = kd.DetectionDistillationLoss(**terms, one_pass=True)(**given)
    grads = torch.autograd.grad(result.total, leaves, torch.tensor(upstream), allow_unused=True)
    return result, list(grads)


def same(monkeypatch: pytest.MonkeyPatch, terms: Given, given: Given, **options: Any) -> tuple[Any, list[Tensor]]:
    """A step by the joint op, held against the same step by an op for each call."""
    before, calls = clones(given), []
    joint = ops.OPS[joint_pass.OP]["cuda"]
    with monkeypatch.context() as patch:
        patch.setitem(ops.OPS[joint_pass.OP], "cuda", lambda *x: (calls.append(x), joint(*x))[1])
        found, grads = step(terms, given, **options)
    assert len(calls) == 1
    assert unchanged(given, before)
    has_kernel = ops.has_kernel
    with monkeypatch.context() as patch:
        patch.setattr(ops, "has_kernel", lambda op, backend: op != joint_pass.OP and has_kernel(op, backend))
        wanted, expected = step(terms, given, **options)
    for a, b in zip(grads, expected, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b))
    magnitude = sum(x.abs() for x in wanted.terms.values())
    assert (found.total - wanted.total).abs() <= 4 * EPS * magnitude
    for a, b in ((found.terms, wanted.terms), (found.details, wanted.details)):
        assert a.keys() == b.keys()
        assert all(x.dim() == 0 and not x.requires_grad and error(x, b[name]) <= 8 * EPS for name, x in a.items())
    return found, grads


def launches(emulator: Any, terms: Given, given: Given) -> tuple[int, int]:
    """Of forward and backward."""
    given, leaves = with_leaves(given)
    objective = kd.DetectionDistillationLoss(**terms)
    before = emulator.kdkernels_emulator_launches()
    total = objective(**given).total
    forward = emulator.kdkernels_emulator_launches() - before
    torch.autograd.grad(total, leaves, allow_unused=True)
    return forward, emulator.kdkernels_emulator_launches() - before - forward


class Operations(TorchDispatchMode):
    """The names of PyTorch's operations that a call runs, but for those that give another view of the same memory."""

    VIEWS = ("alias", "as_strided", "detach", "select", "slice", "view")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aten" and func._opname not in self.VIEWS:
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


SUBSETS = [MAIN, tuple(TERMS), FEATURES, HEADS, *((name,) for name in TERMS), ("pearson", "temperature_kl")]


STRANGE = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every second row": lambda x: torch.stack([x, x], 1).flatten(0, 1)[::2],
    "from column 1": lambda x: torch.cat([x, x], 1)[:, 1 : x.shape[1] + 1],
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "two dimensions of rows": lambda x: x.view(2, -1, x.shape[1]).transpose(0, 1),
}
