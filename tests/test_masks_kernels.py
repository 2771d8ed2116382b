"""The mask kernels against PyTorch's operations: ground truth to the bit, Gaussians to a few units in the last
place, on boxes chosen to disagree: edges and scales beside a rounding boundary, anything in the image column, hundreds
of boxes per picture, odd sizes, many levels. And what only a GPU shows: no synchronisation, capture in a graph.
"""

from __future__ import annotations

import emulator_library
import pytest
import torch
from masks_oracle import INF, NAN, SIZES, STRIDES, as_flat, random_boxes

import kdkernels as kd
from kdkernels import ops

KERNELS = pytest.mark.parametrize("backend", ["base", "avx512", "cuda", "triton"], indirect=True)
DRAW = {"gt": kd.masks.ground_truth_masks, "gaussian": kd.masks.gaussian_masks}
ODD = [(37, 51), (19, 27), (9, 14), (5, 7)], [8, 16, 32, 64]


def agree(boxes, sizes, strides, **keywords):
    """Both kinds of masks, drawn by the kernels, against PyTorch's."""
    for name, draw in DRAW.items():
        got = draw(boxes, sizes, strides, **keywords)
        with kd.use_backend("reference"):
            want = draw(boxes, sizes, strides, **keywords)
        assert len(got) == len(want)
        for a, b in zip(got, want):
            assert a.dtype == torch.float32 and a.shape == b.shape and a.is_contiguous()
            assert torch.equal(a > 0, b > 0)
            # Each side is within 12 units of the exact value (test_masks.py).
            torch.testing.assert_close(a, b, rtol=0 if name == "gt" else 20 * 2.0**-24, atol=0)


def some_of(x, backend):
    """All, or as much as Triton's interpreter does in seconds."""
    return x[::5] if backend == "triton" and not torch.cuda.is_available() else x


def beside(x: torch.Tensor) -> torch.Tensor:
    """Each number, its neighbour below, and its neighbour above."""
    return torch.cat([x, x.nextafter(torch.tensor(-INF)), x.nextafter(torch.tensor(INF))])


@KERNELS
@pytest.mark.parametrize("stride", [4, 3, 5.5, 0.7, 1 / 3, 7.3])
def test_edges_beside_a_cells_border(stride, backend):
    """Where x / s in float32 is, or rounds to, a whole number: a multiplication by 1 / s would be off by a cell."""
    cells = torch.arange(-3, 60, dtype=torch.float64)
    edges = beside((cells * stride).float())
    low = edges.repeat(2)
    high = edges[torch.randperm(2 * len(edges), generator=torch.Generator().manual_seed(0)) % len(edges)]
    ends = torch.stack([torch.minimum(low, high), torch.maximum(low, high)], 1)
    boxes = torch.stack([ends[:, 0], ends.flip(0)[:, 0], ends[:, 1], ends.flip(0)[:, 1]], 1)
    boxes = some_of(boxes, backend)
    # A few per picture, or the union would hide what is missing.
    flat = torch.cat([torch.arange(len(boxes) // 9).repeat(9)[:, None], boxes[: len(boxes) // 9 * 9]], 1)
    agree(flat, [(23, 41)], [stride], batch_size=len(boxes) // 9)


@KERNELS
@pytest.mark.parametrize("base", [None, 20, 33.3, 1e-3, 1e6])
def test_scales_beside_a_levels_border(base, backend):
    sides = [(56 if base is None else base) * (2.0**k - 1e-6) - 1 for k in range(1, 4)]
    sides = beside(beside(torch.tensor(sides, dtype=torch.float64).float()))
    sides = some_of(sides, backend)
    boxes = torch.stack([0 * sides, 0 * sides, sides, sides], 1)
    flat = torch.cat([torch.arange(float(len(boxes)))[:, None], boxes], 1)
    sizes, strides = [(9, 9), (8, 8), (7, 7), (6, 6)], [4, 8, 16, 32]
    agree(flat, sizes, strides, batch_size=len(boxes), base_size=base)


@KERNELS
@pytest.mark.parametrize("assign", ["scale", "all"])
def test_many_boxes(assign, backend):
    """500 per picture, in any order, with padding, on odd sizes."""
    sizes, strides = ODD
    boxes = [some_of(random_boxes(500, seed, 300, 410), backend) for seed in range(2)]
    agree(boxes, sizes, strides, assign=assign)
    agree(as_flat(boxes), sizes, strides, assign=assign, batch_size=2)


@KERNELS
def test_anything_in_any_column(backend):
    """Padding, images that do not exist or are no whole number, NaN, infinite, reversed and huge coordinates."""
    g = torch.Generator().manual_seed(0)
    images = torch.tensor([-1.0, -0.5, -0.0, 0, 0.99, 1, 1.5, 2, 2.99, 3, 1e9, 3e38, INF, -INF, NAN])
    far = torch.tensor([-INF, -3e38, -1e30, -5e7, -(2.0**24), -7, -0.0, 0, 3, 16, 33.5, 200, 5e7, 1e30, 3e38, INF, NAN])
    flat = torch.cat([images, torch.tensor([0.0, 1, 2]).repeat(80)])
    flat = torch.cat([flat[:, None], far[torch.randint(len(far), (len(flat), 4), generator=g)]], 1)
    flat[: len(images), 1:] = torch.tensor([8.0, 8, 90, 60])
    sizes, strides = ODD
    # One after the other, or a box that covers everything would hide the others.
    for some in some_of(flat.split(17), backend):
        agree(some, sizes, strides, batch_size=3)
        agree(some, sizes, strides, batch_size=3, assign="all")


@KERNELS
@pytest.mark.parametrize("width", [1, 3, 4, 61, 63, 64, 65, 128])
def test_widths(width, backend):
    """Around a tile's width, and rows that begin at any address."""
    boxes = [random_boxes(6, seed, 4 * 19, 4 * width) for seed in range(2)]
    agree(boxes, [(17, width), (1, width), (width, 1)], [4, 4, 4], assign="all")


@KERNELS
def test_many_levels(backend):
    """More than one launch has room for, empty ones among them."""
    levels = 40 if backend == "cuda" else 9
    sizes = [(5 + k % 3, 7 - k % 4) if k % 7 else (0, 3) for k in range(levels)]
    boxes = [random_boxes(10, 0, 64, 64)]
    agree(boxes, sizes, [4.0 + k for k in range(levels)], assign="all")
    agree(boxes, sizes, [4.0 + k for k in range(levels)], base_size=1e-3)


@KERNELS
def test_boxes_that_are_views(backend):
    flat = as_flat([random_boxes(9, 0, 300, 410), random_boxes(5, 1, 300, 410)])
    wide = torch.full((len(flat), 9), NAN)
    wide[:, 2:7] = flat
    sizes, strides = ODD
    agree(wide[:, 2:7], sizes, strides, batch_size=2)
    agree(flat.t().contiguous().t(), sizes, strides, batch_size=2)
    agree(torch.cat([flat[:1], flat])[1:], sizes, strides, batch_size=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU here, not in the emulator")
@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
def test_the_order_of_threads_changes_nothing(backend):
    sizes, strides = ODD
    seed = emulator_library.load().kdkernels_emulator_seed
    boxes = [random_boxes(300, 0, 300, 410), random_boxes(20, 1, 300, 410)]
    want = [draw(boxes, sizes, strides) for draw in DRAW.values()]
    try:
        for n in (1, 2, 3):
            seed(n)
            again = [draw(boxes, sizes, strides) for draw in DRAW.values()]
            assert all(torch.equal(a, b) for x, y in zip(want, again) for a, b in zip(x, y))
    finally:
        seed(0)


# Who draws.


def test_who_draws_on_the_cpu(monkeypatch):
    """Its own kernels, unless others are forced, or they cannot be had: then PyTorch's operations."""
    rows = torch.zeros(1, 5)
    for forced in ("cpu", "cuda", "triton", "reference"):
        with kd.use_backend(forced):
            who = ops.backend_for_masks("ground_truth_masks", rows)
            assert who == ("cpu" if forced == "cpu" else "reference")
            kd.masks.ground_truth_masks(rows, [(2, 2)], [4], batch_size=1)
    monkeypatch.setattr(ops, "_obstacle", lambda backend: "not built")
    assert ops.backend_for_masks("gaussian_masks", rows) == "reference"
    with kd.use_backend("cpu"), pytest.raises(RuntimeError, match="'cpu' is forced but cannot serve: not built"):
        kd.masks.gaussian_masks(rows, [(2, 2)], [4], batch_size=1)


def test_a_gpu_is_drawn_by_what_there_is(monkeypatch):
    monkeypatch.setattr(ops, "_order", lambda name, rows: ("cuda", "triton"))
    missing = {"cuda"}
    monkeypatch.setattr(ops, "_obstacle", lambda backend: "not built" if backend in missing else None)
    rows = torch.zeros(1, 5)
    assert ops.backend_for_masks("gaussian_masks", rows) == "triton"
    with kd.use_backend("cuda"), pytest.raises(RuntimeError, match=r"gaussian_masks.*'cuda'.*not built"):
        ops.backend_for_masks("gaussian_masks", rows)
    missing.clear()
    assert ops.backend_for_masks("gaussian_masks", rows) == "cuda"
    missing.update({"cuda", "triton"})
    assert ops.backend_for_masks("gaussian_masks", rows) == "reference"
    with kd.use_backend("reference"):
        assert ops.backend_for_masks("gaussian_masks", rows) == "reference"


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["cuda", "triton"])
@pytest.mark.parametrize("name", DRAW)
def test_captured_in_a_graph(name, kernels):
    """Nothing synchronises, and a replay draws the boxes that are there then."""
    flat = as_flat([random_boxes(30, 0), random_boxes(20, 1)]).cuda()
    other = as_flat([random_boxes(25, 2), random_boxes(25, 3)])
    with kd.use_backend(kernels):
        draw = lambda: DRAW[name](flat, SIZES, STRIDES, batch_size=2)  # noqa: E731
        draw()
        torch.cuda.set_sync_debug_mode("error")
        try:
            draw()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            masks = draw()
    flat.copy_(other.cuda())
    graph.replay()
    for got, want in zip(masks, DRAW[name](other, SIZES, STRIDES, batch_size=2)):
        torch.testing.assert_close(got.cpu(), want, rtol=0 if name == "gt" else 20 * 2.0**-24, atol=0)
