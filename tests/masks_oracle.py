"""Slow masks for tests/test_masks*.py: loops over images, boxes, levels and cells, and the boxes and anchors to draw.

It rounds to float32 after every operation, so that comparisons with the library are exact but for the Gaussian's.
"""

from __future__ import annotations

import math
import struct

import pytest
import torch

import kdkernels as kd

# Who draws: PyTorch's operations, and the GPU's kernels.
COMPILED = pytest.mark.parametrize("backend", ["reference", "cuda"], indirect=True)
TRITON = pytest.mark.parametrize("backend", ["triton"], indirect=True)
DRAWN = pytest.mark.parametrize("backend", ["reference", "cuda", "triton"], indirect=True)

SIZES = [(200, 336), (100, 168), (50, 84), (25, 42), (13, 21)]
STRIDES = [4, 8, 16, 32, 64]
INF, NAN = math.inf, math.nan


def f32(x: float) -> float:
    """Rounded to float32. Of one operation on float32 numbers this is the float32 result."""
    return struct.unpack("f", struct.pack("f", x))[0] if math.isfinite(x) else x


def oracle_level(box, levels, base):
    x1, y1, x2, y2 = box
    w, h = f32(f32(x2 - x1) + 1), f32(f32(y2 - y1) + 1)
    scale = f32(math.sqrt(f32(w * h)))
    return max(k for k in range(levels) if k == 0 or scale >= f32(base * (2.0**k - 1e-6)))


def oracle(kind, images, sizes, strides, *, assign="scale", base=None, anchors=None, threshold=0.5):
    """Loops over images, boxes, levels and cells; finite boxes only."""
    base = 14 * strides[0] if base is None else base
    masks = [torch.zeros(len(images), h, w, dtype=torch.float64) for h, w in sizes]
    for n, boxes in enumerate(images):
        for box in boxes:
            x1, y1, x2, y2 = box
            if x2 < x1 or y2 < y1:
                continue
            only = oracle_level(box, len(sizes), base)
            for k, ((h, w), s) in enumerate(zip(sizes, strides)):
                if assign == "scale" and k != only:
                    continue
                if kind == "fine":
                    oracle_fine(masks[k][n], box, anchors[k].tolist(), threshold)
                    continue
                a, b, c, d = (int(f32(v / s)) for v in box)
                if c < 0 or d < 0 or a >= w or b >= h or h == 0 or w == 0:
                    continue
                left, top, right, bottom = max(a, 0), max(b, 0), min(c, w), min(d, h)
                if left == right or top == bottom:
                    masks[k][n, top, left] = 1
                    continue
                for y in range(top, bottom):
                    for x in range(left, right):
                        u, v = (x - a) / ((c - a) / 2) - 1, (y - b) / ((d - b) / 2) - 1
                        value = 1.0 if kind == "gt" else math.exp(-0.5 * u * u) * math.exp(-0.5 * v * v)
                        masks[k][n, y, x] = max(masks[k][n, y, x], value)
    return masks


def oracle_iou(a, b):
    def area(r):
        return f32(f32(f32(r[2] - r[0]) + 1) * f32(f32(r[3] - r[1]) + 1))

    if (a[0] == a[2] and a[1] == a[3]) or (b[0] == b[2] and b[1] == b[3]):
        return 0.0
    w = f32(f32(min(a[2], b[2]) - max(a[0], b[0])) + 1)
    h = f32(f32(min(a[3], b[3]) - max(a[1], b[1])) + 1)
    if w <= 0 or h <= 0:
        return 0.0
    inter = f32(w * h)
    return f32(inter / f32(f32(area(a) + area(b)) - inter))


def oracle_fine(mask, box, anchors, threshold):
    h, w = mask.shape
    if not anchors:
        return
    ious = [oracle_iou(anchor, box) for anchor in anchors]
    limit = f32(f32(threshold) * max(ious))
    per_cell = len(anchors) // (h * w)
    for i, iou in enumerate(ious):
        if iou > limit:
            mask[i // per_cell // w, i // per_cell % w] = 1


def grid_anchors(sizes, strides, shapes=((2, 2), (4, 2), (1.5, 5))):
    out = []
    for (h, w), s in zip(sizes, strides):
        rows = [
            (x * s - p * s, y * s - q * s, x * s + p * s, y * s + q * s)
            for y in range(h)
            for x in range(w)
            for p, q in shapes
        ]
        out.append(torch.tensor(rows, dtype=torch.float32).reshape(-1, 4))
    return out


def as_flat(images):
    """The flat form of a list of tensors, out of order and with padding."""
    rows = [torch.cat([torch.full((len(b), 1), float(i)), b], 1) for i, b in enumerate(images)]
    padding = torch.tensor([[-1.0, 0, 0, 30, 30], [-2, 8, 8, 90, 90], [len(images), 0, 0, 40, 40], [NAN, 0, 0, 40, 40]])
    flat = torch.cat([padding[:2], *rows, padding[2:]])
    return flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(0))]


def random_boxes(count, seed, height=800, width=1344):
    g = torch.Generator().manual_seed(seed)
    centre = torch.rand(count, 2, generator=g) * torch.tensor([width, height])
    half = torch.exp(torch.rand(count, 2, generator=g) * 5 + 1) / 2
    return torch.cat([centre - half, centre + half], 1)


def same(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert a.dtype == torch.float32 and a.shape == b.shape
        assert torch.equal(a, b.to(torch.float32))


def drawings(anchors=None, sizes=SIZES, strides=STRIDES):
    """The three functions as name -> f(boxes, **keywords)."""
    anchors = grid_anchors(sizes, strides, ((2, 2),)) if anchors is None else anchors
    return {
        "gt": lambda boxes, **kw: kd.masks.ground_truth_masks(boxes, sizes, strides, **kw),
        "gaussian": lambda boxes, **kw: kd.masks.gaussian_masks(boxes, sizes, strides, **kw),
        "fine": lambda boxes, **kw: kd.masks.fine_grained_masks(boxes, anchors, sizes, strides, **kw),
    }
