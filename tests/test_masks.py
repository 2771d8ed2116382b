"""Masks from boxes: worked examples, DeFeat's border bugs, a slow oracle in plain Python, and what must never happen.

Errors are in test_masks_errors.py, determinism, syncs and memory in test_masks_promises.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from masks_oracle import (
    COMPILED,
    DRAWN,
    INF,
    NAN,
    SIZES,
    STRIDES,
    TRITON,
    as_flat,
    drawings,
    f32,
    grid_anchors,
    oracle,
    random_boxes,
    same,
)

import kdkernels as kd

# Box, level, rows, columns: what DeFeat's own functions draw on a picture of 800 x 1344.
EXAMPLES = [
    ((0, 0, 31, 31), 0, (0, 7), (0, 7)),
    ((8, 8, 40, 40), 0, (2, 10), (2, 10)),
    ((10.5, 10.5, 13.9, 90), 0, (2, 22), (2, 3)),
    ((17, 33, 33, 49), 0, (8, 12), (4, 8)),
    ((0, 0, 110, 110), 0, (0, 27), (0, 27)),
    ((0, 0, 111, 111), 1, (0, 13), (0, 13)),
    ((100, 100, 322, 322), 1, (12, 40), (12, 40)),
    ((100, 100, 323, 323), 2, (6, 20), (6, 20)),
    ((100, 100, 547, 547), 3, (3, 17), (3, 17)),
    ((0, 0, 1343, 799), 4, (0, 12), (0, 20)),
    ((500, 300, 503, 303), 0, (75, 76), (125, 126)),
    ((30, 30, 30, 30), 0, (7, 8), (7, 8)),
    # A few pixels outside the corner, or outside one side only: the border's cell.
    ((-10, -10, -2, -2), 0, (0, 1), (0, 1)),
    ((-3, 10, -2, 50), 0, (2, 3), (0, 1)),
    ((-10, 10, 20, 50), 0, (2, 12), (0, 5)),
    # Cut by the right and lower borders; starting in the last cell.
    ((1300, 780, 1400, 820), 0, (195, 200), (325, 336)),
    ((1343, 799, 1343, 799), 0, (199, 200), (335, 336)),
    # Infinite coordinates reach to the border.
    ((0, 0, INF, INF), 4, (0, 13), (0, 21)),
    ((-INF, -INF, INF, INF), 4, (0, 13), (0, 21)),
    ((-INF, 64, 640, 128), 4, (1, 2), (0, 10)),
]
NOTHING = [
    (1344, 100, 1344, 200),  # DeFeat: IndexError
    (1344, 100, 1400, 103),  # DeFeat: IndexError
    (1350, 100, 1400, 200),
    (100, 800, 200, 800),
    (-100, 10, -20, 50),  # DeFeat: 331 of 336 columns
    (10, -100, 50, -20),
    (-1e30, 0, -1e29, 10),
    (1e30, 0, 2e30, 10),
    (40, 40, 30, 50),
    (40, 40, 50, 30),
    (NAN, 0, 10, 10),
    (0, NAN, 10, 10),
    (0, 0, NAN, 10),
    (0, 0, 10, NAN),
    (INF, 0, INF, 10),
    (-INF, 0, -INF, 10),
    (0, INF, 10, INF),
    (INF, INF, -INF, -INF),
]


# ---------------------------------------------------------------- worked examples


@DRAWN
@pytest.mark.parametrize("box, level, rows, columns", EXAMPLES)
def test_worked_examples(box, level, rows, columns, backend):
    want = [torch.zeros(2, h, w) for h, w in SIZES]
    want[level][1, rows[0] : rows[1], columns[0] : columns[1]] = 1
    boxes = [torch.zeros(0, 4), torch.tensor([box], dtype=torch.float32)]
    same(kd.masks.ground_truth_masks(boxes, SIZES, STRIDES, image_size=(800, 1344)), want)
    # The Gaussian lives in the same cells, between exp(-1) and 1.
    for g, m in zip(kd.masks.gaussian_masks(boxes, SIZES, STRIDES), want):
        assert torch.equal(g > 0, m > 0)
        assert ((g == 0) | ((g >= math.exp(-1) * (1 - 1e-6)) & (g <= 1))).all()


@DRAWN
@pytest.mark.parametrize("box", NOTHING)
@pytest.mark.parametrize("assign", ["scale", "all"])
def test_boxes_that_mark_nothing(box, assign, backend):
    boxes = [torch.tensor([box], dtype=torch.float32)]
    for draw in (kd.masks.ground_truth_masks, kd.masks.gaussian_masks):
        # "all" on the finest level only: a coarse cell may still touch the box.
        sizes, strides = (SIZES, STRIDES) if assign == "scale" else (SIZES[:1], STRIDES[:1])
        assert not any(m.any() for m in draw(boxes, sizes, strides, assign=assign))
    # And does not disturb its neighbour.
    both = [torch.tensor([box, (8, 8, 40, 40)], dtype=torch.float32)]
    alone = [torch.tensor([(8, 8, 40, 40)], dtype=torch.float32)]
    for name, draw in drawings(sizes=SIZES[2:], strides=STRIDES[2:]).items():
        if name != "fine" or not (box[0] <= box[2] and box[1] <= box[3]):  # FGFI has no border rule
            same(draw(both), draw(alone))


@DRAWN
def test_gaussian_worked_example(backend):
    # 4 x 2 cells at (1, 2); two boxes combine by maximum; a 1 x 1 box that is not degenerate is exp(-1).
    boxes = [torch.tensor([[4.0, 8, 20, 16], [4, 8, 8, 12], [40, 40, 44, 44]])]
    (mask,) = kd.masks.gaussian_masks(boxes, [(12, 12)], [4])
    want = torch.zeros(1, 12, 12)
    want[0, 2, 1:5] = torch.tensor([0.367879, 0.535261, 0.606531, 0.535261])
    want[0, 3, 1:5] = torch.tensor([0.606531, 0.882497, 1, 0.882497])
    want[0, 10, 10] = 0.367879
    torch.testing.assert_close(mask, want, rtol=0, atol=5e-7)  # six printed digits
    assert mask[0, 3, 3] == 1


@DRAWN
def test_gaussian_keeps_its_centre_when_cut(backend):
    # The same box whole, and moved out of the picture by 3 columns and 2 rows: the part inside is unchanged.
    (whole,) = kd.masks.gaussian_masks([torch.tensor([[12.0, 8, 40, 40]])], [(20, 20)], [4])
    (cut,) = kd.masks.gaussian_masks([torch.tensor([[-12.0, -8, 16, 24]])], [(20, 20)], [4])
    assert torch.equal(cut[0, :6, :4], whole[0, 4:10, 6:10]) and cut.count_nonzero() == 24
    (cut,) = kd.masks.gaussian_masks([torch.tensor([[12.0, 8, 40, 40]])], [(7, 6)], [4])
    assert torch.equal(cut[0], whole[0, :7, :6])


@DRAWN
def test_gaussian_of_infinite_boxes_is_the_limit(backend):
    (mask,) = kd.masks.gaussian_masks([torch.tensor([[-INF, 0, INF, 16]])], [(8, 9)], [4])
    column = torch.exp(-0.5 * ((torch.arange(4) - 2) / 2) ** 2)
    torch.testing.assert_close(mask[0, :4], column[:, None].expand(4, 9), rtol=1e-6, atol=0)
    (mask,) = kd.masks.gaussian_masks([torch.tensor([[0, 0, INF, INF]])], [(8, 9)], [4])
    torch.testing.assert_close(mask[0], torch.full((8, 9), math.exp(-1)), rtol=1e-4, atol=0)  # 9 of 2^21 cells


def test_fine_grained_worked_example():
    # One anchor of 10 x 10 pixels per cell, 10 apart. IoU with the box: 1 on its cell; 0 on its neighbours.
    anchors = torch.tensor([[x, y, x + 9.0, y + 9] for y in (0, 10) for x in (0, 10, 20)])
    box = torch.tensor([[10.0, 0, 19, 9]])
    (mask,) = kd.masks.fine_grained_masks([box], anchors, [(2, 3)], [10])
    assert mask.tolist() == [[[0, 1, 0], [0, 0, 0]]]
    # Half on two cells: IoU 1/3 each; both are above half of the best, neither is above all of it.
    box = torch.tensor([[5.0, 0, 14, 9]])
    (mask,) = kd.masks.fine_grained_masks([box], anchors, [(2, 3)], [10])
    assert mask.tolist() == [[[1, 1, 0], [0, 0, 0]]]
    (mask,) = kd.masks.fine_grained_masks([box], anchors, [(2, 3)], [10], threshold=1)
    assert not mask.any()
    # Strict: the cell with exactly half of the best IoU stays out. Areas 100 and 200: IoU 1/2 against IoU 1.
    pair = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 19]])
    (mask,) = kd.masks.fine_grained_masks([pair[:1]], pair, [(1, 2)], [10])
    assert mask.tolist() == [[[1, 0]]]
    # No overlap, a point, a NaN anchor beside a good one.
    for boxes in ([[900.0, 900, 910, 910]], [[5.0, 5, 5, 5]], [[-INF, 0, INF, 9]]):
        assert not kd.masks.fine_grained_masks([torch.tensor(boxes)], anchors, [(2, 3)], [10])[0].any()
    # A point among the anchors has IoU 0 too, with whatever lies on it.
    point = torch.tensor([[5.0, 5, 5, 5], [50, 50, 59, 59]])
    assert not kd.masks.fine_grained_masks([torch.tensor([[5.0, 5, 6, 6]])], point, [(1, 2)], [10])[0].any()
    anchors[0] = NAN
    (mask,) = kd.masks.fine_grained_masks([box], anchors, [(2, 3)], [10])
    assert mask.tolist() == [[[0, 1, 0], [0, 0, 0]]]


def test_fine_grained_takes_both_anchor_layouts():
    anchors = grid_anchors(SIZES[2:], STRIDES[2:])
    grid = [a.view(h, w, 3, 4) for a, (h, w) in zip(anchors, SIZES[2:])]
    boxes = [random_boxes(5, 0), random_boxes(3, 1)]
    want = kd.masks.fine_grained_masks(boxes, anchors, SIZES[2:], STRIDES[2:])
    assert sum(m.sum() for m in want) > 0
    same(kd.masks.fine_grained_masks(boxes, grid, SIZES[2:], STRIDES[2:]), want)


def test_all_ones():
    features = {"0": torch.zeros(2, 7, 3, 5), "1": torch.zeros(2, 7, 0, 3, dtype=torch.bfloat16)}
    same(kd.masks.all_ones(features), [torch.ones(2, 3, 5), torch.ones(2, 0, 3)])
    same(kd.masks.all_ones(features["0"]), [torch.ones(2, 3, 5)])
    with pytest.raises(TypeError, match="features"):
        kd.masks.all_ones(3)
    with pytest.raises(ValueError, match=r"features\[0\]: .*\(2, 3\)"):
        kd.masks.all_ones([torch.zeros(2, 3)])


# ---------------------------------------------------------------- against the oracle

# Halves and quarters fall on cell borders often; the others are any float32.
coordinate = st.one_of(
    st.integers(-200, 600).map(lambda v: v / 4), st.floats(-80, 300, width=32), st.sampled_from([-1e6, 1e6])
)
box_strategy = st.tuples(coordinate, coordinate, coordinate, coordinate).map(
    lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3]))
)
# A thin box is the worst case of the bound on a box's cells.
thin = st.tuples(coordinate, coordinate, st.floats(0, 3, width=32)).map(
    lambda b: (f32(b[0]), f32(b[1]), f32(b[0] + b[2]), f32(max(b[1], 200)))
)
images_strategy = st.lists(st.lists(st.one_of(box_strategy, thin), max_size=6), min_size=1, max_size=3)
pyramid = st.sampled_from(
    [
        ([(40, 30), (20, 15), (10, 8), (5, 4)], [4, 8, 16, 32]),
        ([(40, 3), (1, 15)], [4, 8]),
        ([(12, 11)], [14]),
        ([(30, 21), (0, 7), (9, 9)], [5.5, 11, 7]),
        ([(33, 27), (9, 9)], [0.75, 12]),
    ]
)
# The backend may stay as it is from one example to the next.
common = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
few = settings(common, max_examples=12)  # Triton's interpreter takes a second for one


def tensors(images):
    return [torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4) for boxes in images]


def against_the_oracle(backend, images, levels, assign, base):
    sizes, strides = levels
    boxes = tensors(images)
    images = [b.tolist() for b in boxes]
    keywords = {"assign": assign, "base_size": base}
    want = oracle("gt", images, sizes, strides, assign=assign, base=base)
    got = kd.masks.ground_truth_masks(boxes, sizes, strides, **keywords)
    same(got, want)
    same(kd.masks.ground_truth_masks(as_flat(boxes), sizes, strides, batch_size=len(boxes), **keywords), want)
    bumps = kd.masks.gaussian_masks(boxes, sizes, strides, **keywords)
    for a, b, m in zip(bumps, oracle("gaussian", images, sizes, strides, assign=assign, base=base), got):
        assert torch.equal(a > 0, m > 0)
        # The exponent is at most 1 and has four roundings of up to 2^-24 each side, exp two more: 8 in all. A GPU's
        # exp2 is good to four, and log2(e) costs it another rounding.
        torch.testing.assert_close(a.double(), b, rtol=(8 if backend == "reference" else 12) * 2.0**-24, atol=0)
    same(kd.masks.gaussian_masks(as_flat(boxes), sizes, strides, batch_size=len(boxes), **keywords), bumps)


drawn = (images_strategy, pyramid, st.sampled_from(["scale", "all"]), st.sampled_from([None, 7, 20.5, 300]))


@COMPILED
@common
@given(*drawn)
def test_ground_truth_and_gaussian_match_the_oracle(backend, images, levels, assign, base):
    against_the_oracle(backend, images, levels, assign, base)


@TRITON
@few
@given(*drawn)
def test_triton_matches_the_oracle(backend, images, levels, assign, base):
    against_the_oracle(backend, images, levels, assign, base)


@common
@given(
    images_strategy, st.sampled_from(["scale", "all"]), st.sampled_from([0, 0.25, 0.5, 0.9]), st.sampled_from([None, 9])
)
def test_fine_grained_matches_the_oracle(images, assign, threshold, base):
    sizes, strides = [(6, 8), (3, 4), (0, 2)], [16, 32, 64]
    anchors = grid_anchors(sizes, strides)
    anchors[0][5] = torch.tensor([20.0, 20, 20, 20])
    boxes = tensors(images)
    images = [b.tolist() for b in boxes]
    keywords = {"assign": assign, "threshold": threshold, "base_size": base}
    want = oracle("fine", images, sizes, strides, assign=assign, base=base, anchors=anchors, threshold=threshold)
    same(kd.masks.fine_grained_masks(boxes, anchors, sizes, strides, **keywords), want)
    flat = as_flat(boxes)
    same(kd.masks.fine_grained_masks(flat, anchors, sizes, strides, batch_size=len(boxes), **keywords), want)


@COMPILED
@common
@given(st.floats(0, 1100), st.sampled_from([56, 56.0, 14, 33.3]))
def test_levels_agree_with_the_logarithm(backend, side, base):
    side = f32(side)
    got = kd.masks.ground_truth_masks([torch.tensor([[0, 0, side, side]])], SIZES, STRIDES, base_size=base)
    exact = math.log2((side + 1) / base + 1e-6)
    if abs(exact - round(exact)) > 1e-6:  # there float32 decides
        assert [int(m.any()) for m in got] == [int(k == min(max(math.floor(exact), 0), 4)) for k in range(5)]


@pytest.mark.parametrize(
    "sizes, strides, base",
    [(SIZES, STRIDES, None), ([(90, 70), (9, 9)], [6, 12], 20), ([(50, 300), (9, 9)], [0.5, 1], 9)],
)
def test_the_largest_boxes_of_a_level_are_drawn_whole(sizes, strides, base):
    # gaussian_masks reserves cells per box from shapes: the boxes with most cells are just below the next level's
    # scale, of every aspect, and start at the end of a cell.
    limit = (2 * (14 * strides[0] if base is None else base) - 1e-3) ** 2
    for k, s in enumerate(strides[:-1]):
        area, offset = limit * 4**k, s * (1 - 2**-10)
        p = torch.logspace(0, math.log2(area), 400, base=2, dtype=torch.float64).clamp(1, area)
        boxes = torch.stack([0 * p + offset, 0 * p + offset, p - 1 + offset, area / p - 1 + offset], 1)
        # Image by image, or the union would hide what is missing.
        flat = torch.cat([torch.arange(400.0)[:, None], boxes], 1)
        rows = flat[::2], flat[1::2] - torch.tensor([1.0, 0, 0, 0, 0])
        for some in rows:
            some = some / torch.tensor([2.0, 1, 1, 1, 1])
            level = slice(k, k + 1)
            want = kd.masks.ground_truth_masks(some, sizes, strides, base_size=base, batch_size=200)[level]
            got = kd.masks.gaussian_masks(some, sizes, strides, base_size=base, batch_size=200)[level]
            assert want[0].flatten(1).any(1).all()
            same([(m > 0).float() for m in got], want)


def test_chunks_do_not_show(monkeypatch):
    boxes = [random_boxes(20, 0), random_boxes(9, 1)]
    for assign in ("scale", "all"):
        for draw in drawings(sizes=SIZES[1:], strides=STRIDES[1:]).values():
            want = draw(boxes, assign=assign)
            with monkeypatch.context() as patch:
                patch.setattr(kd.masks, "_CHUNK_CPU", 30_000)
                same(draw(boxes, assign=assign), want)
