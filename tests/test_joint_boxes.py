"""The objective's masks drawn from boxes inside its first CUDA launch: the same bits as masks drawn before, in no more
launches than with masks that are there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from joint_cases import FIVE, HEADS, MAIN, Given, Operations, clones, launches, same, step, unchanged
from masks_oracle import INF, NAN, as_flat, random_boxes
from objective_cases import TERMS, inputs_of, some, with_leaves
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

import kdkernels as kd
from kdkernels import ops
from kdkernels.losses import feature_pass, joint_pass

pytestmark = pytest.mark.parametrize("backend", ["cuda"], indirect=True)
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU here, not in the emulator")
STRIDES = [4, 8, 16, 32, 64]
# Without a loss over features beside masked MSE, with one, with heads, with all.
WITH = {
    "masked_mse": ("masked_mse",),
    "features": ("masked_mse", "pearson"),
    "heads": ("masked_mse", "decoupled_kl"),
    "main": MAIN,
    "all": tuple(TERMS),
}


def some_boxes(per_picture: int, pictures: int = 2, seed: int = 0) -> Tensor:
    """Flat, in pixels of FIVE's picture of 84 x 124."""
    return as_flat([random_boxes(per_picture, seed + i, 84, 124) for i in range(pictures)])


def with_boxes(given: Given, boxes: Any, strides: list[float] = STRIDES) -> Given:
    return {**given, "masks": None, "boxes": boxes, "strides": strides[: len(given["student_features"])]}


def drawn(given: Given) -> Given:
    """The same call with the masks of its boxes."""
    sizes = [tuple(s.shape[2:]) for s in given["student_features"]]
    with kd.use_backend("reference"):
        masks = kd.masks.ground_truth_masks(
            given["boxes"], sizes, given["strides"], batch_size=given["student_features"][0].shape[0]
        )
    return {**given, "masks": masks, "boxes": None, "strides": None}


def equal(terms: Given, given: Given, **options: Any) -> Any:
    """A step with boxes, held to the bit against the step with their masks."""
    before = clones(given)
    found, grads = step(terms, given, **options)
    assert unchanged(given, before)
    wanted, expected = step(terms, drawn(given), **options)
    assert torch.equal(found.total, wanted.total)
    for a, b in ((found.terms, wanted.terms), (found.details, wanted.details)):
        assert a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())
    assert all(a is b if a is None else torch.equal(a, b) for a, b in zip(grads, expected, strict=True))
    return found


@pytest.fixture
def drawings(backend: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """How often masks are drawn by an op of their own."""
    calls, draw = [], ops.OPS["ground_truth_masks"]["cuda"]
    monkeypatch.setitem(
        ops.OPS["ground_truth_masks"], "cuda", lambda *x: (calls.append("ground_truth_masks"), draw(*x))[1]
    )
    return calls


NOT_A_NUMBER = [[0, NAN, 0, 50, 50], [0, 0, 0, INF, 30], [1, -INF, -INF, INF, INF], [NAN, 0, 0, 9, 9]]
BOXES = {
    "some": torch.cat([some_boxes(3), torch.tensor([[0.0, -300, 40, 300, 500], [1, -900, -900, 40, 50]])]),
    "none": torch.zeros(0, 5),
    "padding": torch.cat([torch.full((7, 5), -1.0), some_boxes(2), torch.tensor([[-1.0, 0, 0, 120, 80]])]),
    "a picture without": torch.cat([torch.ones(2, 1), random_boxes(2, 0, 84, 124)], 1),
    "no such picture": torch.tensor([[2.0, 0, 0, 90, 80], [1.5, 3, 3, 40, 40], [1e9, 0, 0, 9, 9]]),
    "outside": torch.tensor(
        [[0.0, -90, -90, -40, -40], [0, 200, 3, 240, 30], [1, -3, -3, -1, -1], [1, 90, 60, 500, 500]]
    ),
    "not finite": torch.tensor(NOT_A_NUMBER),
    "everything": torch.tensor([[0.0, 0, 0, 500, 500], [1.0, 0, 0, 500, 500]]),
    "more than a chunk": torch.cat([torch.full((255, 5), -1.0), some_boxes(200)]),
}


@pytest.mark.parametrize("boxes", BOXES)
def test_equals_masks_that_were_drawn_before(boxes, backend, drawings):
    given = with_boxes(inputs_of(FIVE), BOXES[boxes])
    found = equal(some(("masked_mse", "decoupled_kl")), given)
    assert not drawings
    if boxes == "none":
        assert found.details["masked_mse/foreground"] == 0
    equal(some(("masked_mse",)), given)


@pytest.mark.parametrize("terms", WITH.values(), ids=WITH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_terms(terms, dtype, backend, drawings, monkeypatch):
    given = with_boxes(inputs_of(dtype=dtype), some_boxes(4))
    equal(some(terms), given)
    assert not drawings
    same(monkeypatch, some(terms), given)
    assert len(drawings) == 1


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1, 2)])
def test_frozen_levels(frozen, backend, drawings):
    equal(some(MAIN), with_boxes(inputs_of(), some_boxes(4)), frozen=frozen)
    assert not drawings


def test_some_levels(backend, drawings):
    """Boxes of the other levels go to none of those that are left."""
    terms = {"masked_mse": {"levels": [1, 3]}, "pearson": {"levels": [0, 3, 4]}}
    for names in (("masked_mse",), ("masked_mse", "pearson")):
        equal({name: terms[name] for name in names}, with_boxes(inputs_of(FIVE), some_boxes(9)))
    assert not drawings


def test_levels_without_pixels(backend, drawings):
    shapes = [(2, 8, 0, 5), (2, 8, 7, 3), (2, 0, 4, 3)]
    equal(some(("masked_mse", "decoupled_kl")), with_boxes(inputs_of(shapes), some_boxes(2)))
    equal(some(("masked_mse",)), with_boxes(inputs_of([(0, 8, 7, 3)]), torch.zeros(0, 5)))
    assert not drawings


@pytest.mark.parametrize("heads", [(), ("decoupled_kl",)], ids=len)
def test_blocks_of_several_tiles(heads, backend, drawings):
    """More tiles than blocks that count them: 299 pictures of two tiles, the last block with fewer than the others."""
    boxes = torch.cat([torch.arange(300.0)[:, None], random_boxes(300, 0, 68, 120)], 1)[::2]
    equal(some(("masked_mse", *heads)), with_boxes(inputs_of([(299, 1, 17, 30), (299, 1, 3, 70)]), boxes, [4, 8]))
    assert not drawings


@pytest.mark.parametrize(
    "boxes", [[random_boxes(3, 0, 84, 124), torch.zeros(0, 4)], some_boxes(3).double().flip(0)[::2]]
)
def test_other_forms_are_brought_to_the_flat_one(boxes, backend, drawings):
    equal(some(MAIN), with_boxes(inputs_of(), boxes))
    assert not drawings


def test_where_masks_are_drawn_first(backend, drawings):
    """Two passes, and a weight that multiplies the loss outside."""
    given = with_boxes(inputs_of(), some_boxes(4))
    wanted = step(some(("masked_mse",)), given)[0].total.detach()
    assert not drawings
    called, _ = with_leaves(given)
    two = kd.DetectionDistillationLoss(**some(("masked_mse",)), one_pass=False)(**called).total
    assert len(drawings) == 1
    torch.testing.assert_close(two.detach(), wanted, rtol=1e-6, atol=0)
    weight = torch.tensor(TERMS["masked_mse"]["loss_weight"], requires_grad=True)
    called, _ = with_leaves(given)
    keywords = {**TERMS["masked_mse"], "loss_weight": weight}
    outside = kd.DetectionDistillationLoss(masked_mse=keywords)(**called).total
    assert len(drawings) == 2
    torch.testing.assert_close(outside.detach(), wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("norms", [False, True])
def test_values_without_a_gradient(norms, backend, drawings):
    given = with_boxes(inputs_of(), some_boxes(4))
    objective = kd.DetectionDistillationLoss(**some(MAIN), gradient_norms=norms)
    with torch.no_grad():
        found, wanted = objective(**given), objective(**drawn(given))
    for a, b in zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True):
        assert torch.equal(a, b)


def second(given: Given, change: Any = None) -> list[Tensor]:
    given, leaves = with_leaves(given)
    total = kd.DetectionDistillationLoss(**some(("masked_mse", "bounded_regression")))(**given).total
    if change is not None:
        change(given)
    grads = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
    used = [g for g in grads if g is not None]
    return [*used, *torch.autograd.grad(sum(g.square().sum() for g in used), leaves[:2])]


def test_second_derivatives_draw_the_masks(backend):
    given = with_boxes(inputs_of(), some_boxes(4))
    assert all(torch.equal(a, b) for a, b in zip(second(given), second(drawn(given)), strict=True))


def test_boxes_that_change_in_place_are_noticed(backend):
    given = with_boxes(inputs_of(), some_boxes(4))
    with pytest.raises(RuntimeError, match="changed in place"):
        second(given, lambda g: g["boxes"].zero_())


def test_masks_that_do_not_fit_are_refused_as_before(backend):
    given = with_boxes(inputs_of([(2, 8, 5, 6), (3, 8, 4, 5)]), some_boxes(2))
    with pytest.raises(ValueError, match=r"mask\[1\]: expected \(N, H, W\)"):
        step(some(("masked_mse",)), given)


def test_every_cell_and_count_is_written(backend):
    """Masks, workspace and outputs are allocated full of NaN here."""
    given = with_boxes(inputs_of(FIVE), some_boxes(4))
    wanted, expected = step(some(MAIN[:1]), given)
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        found, grads = step(some(MAIN[:1]), given)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before
    assert torch.equal(found.total, wanted.total)
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True) if b is not None)


# Launches.


@NO_GPU
@pytest.mark.parametrize("terms", WITH.values(), ids=WITH)
def test_three_launches(terms, backend, emulator):
    given = with_boxes(inputs_of(FIVE), some_boxes(40))
    assert launches(emulator, some(terms), given) == (3, 1)


@NO_GPU
def test_no_boxes_are_three_launches_too(backend, emulator):
    assert launches(emulator, some(MAIN), with_boxes(inputs_of(FIVE), torch.zeros(0, 5))) == (3, 1)


@NO_GPU
def test_more_levels_than_a_table_holds(backend, emulator):
    """Those beyond the twelfth are drawn, and counted, by launches of their own."""
    shapes = [(1, 3, 5 + i % 4, 6) for i in range(13)]
    given = with_boxes(inputs_of(shapes), some_boxes(3, 1), [4 + i for i in range(13)])
    for terms in (("masked_mse",), ("masked_mse", "decoupled_kl", "bounded_regression")):
        assert launches(emulator, some(terms), given) == (5, 1)
        equal(some(terms), given)
    assert launches(emulator, some(HEADS), given) == (2, 1)


@NO_GPU
def test_the_order_of_threads_changes_nothing(backend, emulator):
    given = with_boxes(inputs_of(FIVE), BOXES["more than a chunk"])
    found = []
    for seed in range(4):
        emulator.kdkernels_emulator_seed(seed)
        result, grads = step(some(("masked_mse", "decoupled_kl")), given)
        found.append([result.total, *result.details.values(), *(g for g in grads if g is not None)])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("terms", WITH.values(), ids=WITH)
def test_nothing_of_pytorch_runs_beside_the_launches(terms, backend):
    """With flat boxes in float32: so that the launches that are counted are all, and no value is read on the host."""
    given, _ = with_leaves(with_boxes(inputs_of(), some_boxes(4)))
    objective = kd.DetectionDistillationLoss(**some(terms))
    with Operations() as operations:
        objective(**given)
    assert operations.names == []


# The op.


def test_the_op(backend):
    """Its fake has the real results' shapes, and it tells of wrong arguments."""
    s = torch.randn(2, 3, 4, 5)
    features = [[s], [s], [], [0], [], [], 1.0, None, 1.0, None, 0, True, 1e-6, True, True, 1.0, None, 1.0, None, False]
    boxes = [torch.zeros(0, 5), [4], [5], [8.0], [], 2, False]
    draw, read = (feature_pass.DRAW, boxes), (feature_pass.OP, features)
    op = ops.OPS[joint_pass.OP]["cuda"]
    packed = joint_pass.pack([draw, read])
    real = op(*packed)
    with FakeTensorMode() as mode:
        fake = torch.ops.kdkernels.detection_distillation.default(
            *pytree.tree_map_only(Tensor, mode.from_tensor, packed)
        )
    for a, b in zip(pytree.tree_leaves(fake), pytree.tree_leaves(real), strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    mask = (feature_pass.OP, [*features[:2], [torch.zeros(2, 4, 5)], *features[3:]])
    small = (feature_pass.DRAW, [boxes[0], [3], *boxes[2:]])
    other = (feature_pass.DRAW, [torch.zeros(4, 4), *boxes[1:]])
    for calls, said in (
        ([mask, draw], "masks come before"),
        ([draw, draw, read], "masks come before"),
        ([draw, mask], "masks that are drawn, and others"),
        ([small, read], "expected \\(N, H, W\\)"),
        ([other, read], "boxes: expected"),
        ([read], "no such mask"),
    ):
        with pytest.raises(RuntimeError, match=said):
            op(*joint_pass.pack(calls))
