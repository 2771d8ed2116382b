"""How often the objective launches on CUDA, counted by the emulator, and what does not change its results: the order of
threads, and more than a launch can take.
"""

from __future__ import annotations

import pytest
import torch
from joint_cases import FIVE, MAIN, STRANGE, SUBSETS, Given, Operations, launches, same, step, used
from objective_cases import LOGITS, TERMS, assert_equals_the_sum, inputs_of, some, with_leaves
from torch import Tensor

import kdkernels as kd

pytestmark = [
    pytest.mark.parametrize("backend", ["cuda"], indirect=True),
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU here, not in the emulator"),
]
F32, BF16 = torch.float32, torch.bfloat16


def with_logits(rows: int, classes: int, dtype: torch.dtype = F32) -> Given:
    return {
        "student_logits": torch.randn(rows, classes).to(dtype),
        "teacher_logits": torch.randn(rows, classes).to(dtype),
        "foreground": torch.rand(rows) < 0.3,
        "target": torch.randint(0, classes, (rows,)),
        "row_weight": torch.rand(rows),
    }


CHANNELS_LAST = {"memory_format": torch.channels_last}
# What is beyond the three launches: terms, changed inputs and keywords, the capability, launches of a forward.
BEYOND = {
    "rows of a cluster": (MAIN, lambda given: with_logits(3, 17000), {}, 90, 4),
    "rows of several blocks without clusters": (MAIN, lambda given: with_logits(3, 17000), {}, 80, 5),
    "wide rows of one block each": (MAIN, lambda given: with_logits(3, 2500), {}, 90, 3),
    "a gate over the batch": (MAIN, lambda given: {}, {"bounded_regression": {"gate": "batch"}}, 90, 6),
    "logits of another dtype": (MAIN, lambda given: with_logits(64, 9, BF16), {}, 90, 4),
    "labels to count": (("masked_mse", "soft_cross_entropy"), lambda given: with_logits(40000, 2), {}, 90, 5),
    "foreground to count": (("decoupled_kl",), lambda given: with_logits(66000, 2), {}, 90, 3),
    "Pearson on channels_last": (
        MAIN,
        lambda given: {
            side: [x.to(**CHANNELS_LAST) for x in given[side]] for side in ("student_features", "teacher_features")
        },
        {},
        90,
        5,
    ),
}


@pytest.mark.parametrize("case", BEYOND)
def test_what_takes_launches_of_its_own(case, backend, emulator, monkeypatch):
    terms, change, keywords, capability, expected = BEYOND[case]
    emulator.kdkernels_emulator_capability(capability)
    given = inputs_of(FIVE, 64)
    given |= change(given)
    configured = {name: keywords.get(name, {}) for name in terms}
    assert launches(emulator, configured, given) == (expected, 1)
    same(monkeypatch, configured, given)
    if "count" in case:  # elsewhere each block counts for itself: the single functions' grids have no such launch
        given["target"][::3] = -100
        assert_equals_the_sum(configured, given)


def test_more_levels_than_a_table_holds(backend, emulator, monkeypatch):
    """Masks beyond the twelfth are counted by launches of their own, and the heads are added up once."""
    terms = some(("masked_mse", "decoupled_kl", "bounded_regression"))
    thirteen = inputs_of([(1, 3, 5 + i % 4, 6) for i in range(13)])
    assert launches(emulator, terms, thirteen) == (5, 1)
    same(monkeypatch, terms, thirteen)
    same(monkeypatch, terms, inputs_of([(1, 3, 5 + i % 4, 6) for i in range(45)]))


def test_masks_of_a_heads_launch_may_begin_anywhere(backend, monkeypatch):
    given = inputs_of()
    given["masks"] = [STRANGE["misaligned"](m.flatten(0, 1)).view(m.shape) for m in given["masks"]]
    same(monkeypatch, some(MAIN), given)


@pytest.mark.parametrize("classes", [9, 2500])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_the_order_of_threads_changes_nothing(dtype, classes, backend, emulator):
    """Nor which warp runs ahead: wide rows exchange at once where the block has counted the foreground."""
    given = inputs_of(rows=300, dtype=dtype) | with_logits(300 if classes == 9 else 12, classes, dtype)
    found = []
    for seed in range(4):
        emulator.kdkernels_emulator_seed(seed)
        result, grads = step(some(TERMS), given)
        found.append([result.total, *result.terms.values(), *result.details.values(), *grads])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


class Unread(Tensor):
    """A mask whose values are not checked: those of the CPU are, where the emulator's are, but not those of a GPU."""


@pytest.mark.parametrize("terms", SUBSETS, ids="+".join)
def test_nothing_of_pytorch_runs_beside_the_launches(terms, backend):
    """So that the launches that are counted are all."""
    given, leaves = with_leaves(inputs_of())
    given["masks"] = [m.as_subclass(Unread) for m in given["masks"]]
    objective = kd.DetectionDistillationLoss(**some(terms))
    upstream = torch.tensor(1.0)
    with Operations() as operations:
        result = objective(**given)
    assert operations.names == []
    leaves = [x for x, needed in zip(leaves, used(terms), strict=True) if needed]
    with Operations() as operations:
        torch.autograd.grad(result.total, leaves, upstream)
    several = len([name for name in terms if name in LOGITS]) - 1
    assert operations.names == ["add"] * max(several, 0)  # autograd's sum of the gradients of the same logits
