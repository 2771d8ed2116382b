"""Masks for :func:`kdkernels.masked_mse_loss`, drawn from boxes: DeFeat's, TADF's and FGFI's, and all ones.

Here lives the drawing, in plain PyTorch: which level a box belongs to, which cells it covers, how boxes combine. It
runs where the boxes are, without a loop over boxes, without a host synchronisation and without a data-dependent shape,
so it compiles with ``fullgraph=True`` and, in the flat form, can be captured in a CUDA graph. How boxes are painted may
change freely as long as the masks stay the same; which cells a box covers is settled in ``_boxes.py``.

A kernel draws ground-truth and Gaussian masks where there is one (``csrc/cpu/masks.cpp``; on a GPU all images and
levels in one launch, ``csrc/cuda/masks.cuh``, ``triton/masks.py``): the former to the bit, the latter to a few units in
the last place. Under a forced backend only boxes on that backend's device go to its kernels.

What the three functions have in common:

``boxes``
    Pixels ``x1, y1, x2, y2`` of the picture that the features were computed from (torchvision: after
    ``model.transform``). Either a list of N tensors (n_i, 4), one per image, or one flat tensor (M, 5) whose first
    column is the image index; rows with an index below 0 are padding, rows with an index of ``batch_size`` or more mark
    nothing. The flat form needs ``batch_size`` and is the one for compiled and captured steps. Any real dtype, read as
    float32. Reversed boxes and boxes with a NaN mark nothing. No boxes at all give masks of zeros.
``sizes``, ``strides``
    Per level: (H, W) in cells, and pixels per cell. A level with no cells gives an empty mask.
``assign``
    ``"scale"``: a box goes to one level, ``clamp(floor(log2(scale / base_size + 1e-6)), 0, L - 1)`` with
    ``scale = sqrt((x2 - x1 + 1) * (y2 - y1 + 1))``. It is decided by ``scale >= base_size * (2^k - 1e-6)``, the right
    side rounded to float32, so that every backend decides alike. ``"all"``: a box goes to every level.
``base_size``
    Pixels. None means ``14 * strides[0]``, which is DeFeat's 56 at stride 4. Pictures much smaller than 800 x 1333 want
    a smaller one, or every box lands on the first level.
``batch_size``
    N. Required with the flat form, optional (and checked) with a list.
``image_size``
    (H, W) of the padded picture in pixels, optional. Each level must then have ``floor(H / stride)`` or
    ``ceil(H / stride)`` rows, and columns likewise. It catches boxes or sizes in another picture's units.

They return a list with one float32 mask (N, H, W) per level, on the boxes' device, without a gradient.

TypeError: boxes, anchors, sizes or strides of the wrong kind, boolean or complex boxes. ValueError: shapes that do not
fit, boxes on several devices, numbers of levels that differ, a stride or ``base_size`` that is not positive, an unknown
``assign``, a ``threshold`` outside [0, 1], a missing or contradicting ``batch_size``, an ``image_size`` that does not
fit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from . import ops
from ._boxes import (
    Boxes,
    Geometry,
    Sizes,
    anchor_grids,
    box_cells,
    box_level,
    flatten_boxes,
    is_number,
    of_level,
    read_boxes,
    read_geometry,
    shape,
    thresholds,
)

__all__ = ["all_ones", "fine_grained_masks", "gaussian_masks", "ground_truth_masks"]

# Elements of one temporary while painting. Fixed, so that the number of chunks follows from shapes alone. A CPU wants
# a temporary in its cache, an accelerator few launches.
_CHUNK_CPU, _CHUNK_OTHER = 2**19, 2**23


def _fake(
    boxes: Tensor,
    heights: list[int],
    widths: list[int],
    strides: list[float],
    thresholds: list[float],
    batch_size: int,
    all_levels: bool,
) -> list[Tensor]:
    return [boxes.new_empty((batch_size, h, w)) for h, w in zip(heights, widths)]


# boxes: (M, 5) float32, contiguous. thresholds: the smallest scale of a box on level 1, 2, ...; unused with all_levels.
_SCHEMA = (
    "(Tensor boxes, SymInt[] heights, SymInt[] widths, float[] strides, float[] thresholds, SymInt batch_size, "
    "bool all_levels) -> Tensor[]"
)
_KERNELS = {name: ops.define(name, _SCHEMA, _fake, module="masks") for name in ("ground_truth_masks", "gaussian_masks")}


def _kernel_masks(name: str, rows: Tensor, batch: int, geometry: Geometry) -> list[Tensor] | None:
    """The masks from a kernel, or None where PyTorch's operations are to draw them."""
    backend = ops.backend_for_masks(name, rows)
    if backend == "reference":
        return None
    return _KERNELS[name][backend](*_arguments(rows, batch, geometry))


def _arguments(rows: Tensor, batch: int, geometry: Geometry) -> tuple[Any, ...]:
    """What the kernels' ops are given."""
    return (
        rows.contiguous(),
        [h for h, _ in geometry.sizes],
        [w for _, w in geometry.sizes],
        [float(s) for s in geometry.strides],
        [] if geometry.every_level else thresholds(geometry),
        batch,
        geometry.every_level,
    )


def _offsets(lengths: Sequence[int]) -> list[int]:
    return [0, *accumulate(lengths)]


def ground_truth_masks(
    boxes: Boxes,
    sizes: Sizes,
    strides: Sequence[float],
    *,
    assign: str = "scale",
    base_size: float | None = None,
    batch_size: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> list[Tensor]:
    """1 in every cell that a box covers, 0 elsewhere (DeFeat's foreground).

    At stride s a box covers columns ``max(trunc(x1 / s), 0)`` up to, and without, ``min(trunc(x2 / s), W)``, and rows
    likewise; trunc rounds toward zero, and the division is a float32 one. The last cell, which it covers in part, is
    left out. If no column or no row is left, it covers the single cell where it starts. Boxes combine by union.

    Mended against DeFeat's code: a box that ends left of or above the picture by a cell or more (DeFeat marks almost a
    whole row), or that starts at or beyond the right or lower border (DeFeat raises), marks nothing. A box outside by
    less than a cell keeps the border's cell. An infinite coordinate reaches to the picture's border.

    Arguments, result, and errors: see the head of this module.
    Source: Guo et al. 2021 (DeFeat), the mask M of eq. 5, and its released code.
    """
    geometry = read_geometry(sizes, strides, assign, base_size, image_size)
    return _ground_truth(*flatten_boxes(boxes, batch_size), geometry)


def _ground_truth(rows: Tensor, batch: int, geometry: Geometry) -> list[Tensor]:
    if not geometry.sizes:
        return []
    drawn = _kernel_masks("ground_truth_masks", rows, batch, geometry)
    if drawn is not None:
        return drawn
    flat = read_boxes(rows, batch)
    cells = box_cells(flat, geometry)
    # Corner counts, then a running sum along either axis: integers, so the order of additions cannot matter, and the
    # cost does not grow with the boxes' areas. One row and one column more than the mask take the closing corners.
    planes = [(h + 1) * (w + 1) for h, w in geometry.sizes]
    offsets = _offsets([batch * plane for plane in planes])
    origin = of_level(cells.level, offsets[:-1]) + cells.image * of_level(cells.level, planes)
    pitch = of_level(cells.level, [w + 1 for _, w in geometry.sizes])
    top, bottom = origin + cells.rows.first * pitch, origin + cells.rows.last * pitch
    left, right = cells.columns.first, cells.columns.last
    corners = torch.stack([top + left, bottom + right, top + right, bottom + left])
    # The element past the end takes what marks nothing.
    corners = torch.where(cells.valid, corners, offsets[-1])
    sign = torch.ones_like(corners, dtype=torch.int32)
    sign[2:] = -1
    counts = torch.zeros(offsets[-1] + 1, dtype=torch.int32, device=corners.device)
    counts.scatter_add_(0, corners.flatten(), sign.flatten())
    masks = []
    for (h, w), start, stop in zip(geometry.sizes, offsets, offsets[1:]):
        covered = counts[start:stop].view(batch, h + 1, w + 1)[:, :h, :w]
        covered = covered.cumsum(1, dtype=torch.int32).cumsum(2, dtype=torch.int32)
        masks.append((covered > 0).to(torch.float32))
    return masks


class GroundTruth(Sequence[Tensor]):
    """:func:`ground_truth_masks` of the levels `places`, drawn when one is asked for: a kernel may draw them itself."""

    def __init__(
        self, boxes: Boxes, sizes: Sizes, strides: Sequence[float], *, places: Sequence[int], batch_size: int
    ) -> None:
        self._geometry = read_geometry(sizes, strides, "scale", None, None)
        self.boxes, self.batch_size = flatten_boxes(boxes, batch_size)
        self.places = list(places)
        self._drawn: list[Tensor] | None = None

    def arguments(self) -> tuple[Any, ...]:
        """Those of the op `ground_truth_masks`, which gives masks of all levels."""
        return _arguments(self.boxes, self.batch_size, self._geometry)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: Any) -> Any:
        if self._drawn is None:
            masks = _ground_truth(self.boxes, self.batch_size, self._geometry)
            self._drawn = [masks[place] for place in self.places]
        return self._drawn[i]


def _most_cells(geometry: Geometry, k: int) -> int:
    """How many cells a box assigned to level k can cover at most, from shapes alone."""
    (h, w), s = geometry.sizes[k], geometry.strides[k]
    everything = h * w
    if geometry.every_level or k == len(geometry.sizes) - 1 or everything == 0:
        return everything
    # A box p x q pixels (+1 convention) with p q < area covers less than ((p - 1) / s + 1) ((q - 1) / s + 1) cells.
    # With p q fixed that grows with p + q, so it is largest for the longest box that still fits the map: at most
    # `long` pixels. The margin is for float32's rounding of the coordinates.
    area = (geometry.base * 2.0 ** (k + 1)) ** 2
    long = (max(h, w) - 1) * s + 1
    bound = (area + max(s - 1, 0) * (long + area / long) + (s - 1) ** 2) / s**2
    return min(everything, int(1.001 * bound + (h + w) / 256 + 8))


def _chunks(count: int, per_item: int, device: torch.device) -> list[tuple[int, int]]:
    """Ranges that split `count` items of `per_item` elements each, decided by shapes."""
    step = max(1, (_CHUNK_CPU if device.type == "cpu" else _CHUNK_OTHER) // max(1, per_item))
    if count <= step:
        return [(0, count)]
    return [(start, min(start + step, count)) for start in range(0, count, step)]


def gaussian_masks(
    boxes: Boxes,
    sizes: Sizes,
    strides: Sequence[float],
    *,
    assign: str = "scale",
    base_size: float | None = None,
    batch_size: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> list[Tensor]:
    """A Gaussian bump per box, in the cells of :func:`ground_truth_masks` (TADF).

    A box that spans w columns and h rows has, at its column x = 0..w-1 and row y = 0..h-1,
    ``exp(-((x - w/2) / (w/2))^2 / 2 - ((y - h/2) / (h/2))^2 / 2)``: from exp(-1) to 1. The centre is w / 2, as
    published, not (w - 1) / 2, so the bump leans to the right and down. Boxes combine by maximum. A box with no column
    or no row left gives 1 in its single cell.

    w, h and the centre are those of the box before the picture's borders cut it, so a box that is cut keeps the part
    of its bump that lies inside; the published code fails there. Mask cells that are not 0 are exactly those of
    :func:`ground_truth_masks`. For an infinite coordinate the bump is its limit: 1 where both ends are infinite, the
    value at the box's edge where one is.

    Memory: chunks of 2^19 cells (2^23 on accelerators). Arguments, result, and errors: see the head of this module.
    Source: Sun et al. 2020 (TADF, arXiv 2006.13108), as coded in DeFeat's repository.
    """
    geometry = read_geometry(sizes, strides, assign, base_size, image_size)
    rows, batch = flatten_boxes(boxes, batch_size)
    if not sizes:
        return []
    drawn = _kernel_masks("gaussian_masks", rows, batch, geometry)
    if drawn is not None:
        return drawn
    flat = read_boxes(rows, batch)
    cells = box_cells(flat, geometry)
    device = flat.x1.device
    levels = range(len(sizes))
    planes = [h * w for h, w in geometry.sizes]
    offsets = _offsets([batch * plane for plane in planes])
    pitch = of_level(cells.level, [w for _, w in geometry.sizes])
    origin = of_level(cells.level, offsets[:-1]) + cells.image * of_level(cells.level, planes)
    fields = [origin, pitch, cells.valid, *cells.rows, *cells.columns]
    fields = [field.expand(cells.valid.shape) for field in fields]
    # Every box has as many slots as a box of its level can have cells; what is left over goes past the end of `out`.
    if geometry.every_level:
        groups = [(k, _most_cells(geometry, k)) for k in levels]
    else:
        groups = [(0, max(_most_cells(geometry, k) for k in levels))]
    out = torch.zeros(offsets[-1] + max(slots for _, slots in groups), device=device, dtype=torch.float32)
    for group, slots in groups:
        slot = torch.arange(slots, device=device)
        for start, stop in _chunks(flat.x1.shape[0], slots, device):
            part = [field[group, start:stop].unsqueeze(1) for field in fields]
            base, step, valid, top, bottom, y0, height, left, right, x0, width = part
            columns = (right - left).clamp(min=1)
            row = torch.div(slot, columns, rounding_mode="floor")
            y, x = top + row, left + (slot - row * columns)
            v = (2 * (y - y0) - height).to(torch.float32) / height.to(torch.float32)
            u = (2 * (x - x0) - width).to(torch.float32) / width.to(torch.float32)
            inside = valid & (y < bottom)
            where = torch.where(inside, base + y * step + x, offsets[-1] + slot)
            bump = torch.where(inside, torch.exp(-0.5 * (u * u + v * v)), 0.0)
            # A maximum does not depend on the order.
            out.scatter_reduce_(0, where.flatten(), bump.flatten(), "amax")
    # Copies, so that no level shares memory, and a version counter, with another.
    return [out[offsets[k] : offsets[k + 1]].view(batch, *sizes[k]).clone() for k in levels]


def fine_grained_masks(
    boxes: Boxes,
    anchors: Tensor | Sequence[Tensor],
    sizes: Sizes,
    strides: Sequence[float],
    *,
    threshold: float = 0.5,
    assign: str = "scale",
    base_size: float | None = None,
    batch_size: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> list[Tensor]:
    """1 in every cell with an anchor that overlaps a box nearly as well as the best one does (FGFI).

    For a box and a level it is assigned to: the cell counts if any of its anchors has ``IoU > threshold * max IoU``,
    the maximum over all anchors of the level, the comparison strict. Boxes combine by union. A box that overlaps no
    anchor marks nothing. The IoU has the +1 convention: width = x2 - x1 + 1. A box or an anchor that is a single point
    (x1 = x2 and y1 = y2) has IoU 0, as in FGFI's code. An infinite box has IoU 0. Borders play no part: anchors may
    reach beyond the picture, and so may boxes.

    Args:
        anchors: pixels x1, y1, x2, y2 of each level, (H * W * A, 4) or (H, W, A, 4): positions row by row, the A
            anchors of a position together. torchvision's AnchorGenerator gives this order with all levels in one
            tensor per image: split it with ``anchors[0].split([h * w * a for ...])``. One tensor will do for one level.
        threshold: in [0, 1]; FGFI's phi, 0.5. With 1 nothing is marked.

    Memory: chunks of 2^19 (box, anchor) pairs (2^23 on accelerators), at least one box. The work is boxes times
    anchors. The other arguments, result, and errors: see the head of this module.
    Source: Wang et al. 2019 (FGFI), section 3.2, and its released code; per level as coded in DeFeat's repository.
    """
    geometry = read_geometry(sizes, strides, assign, base_size, image_size)
    if not is_number(threshold):
        raise TypeError(f"threshold: expected a number in [0, 1], got {threshold!r}")
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold: expected a number in [0, 1], got {threshold}")
    flat = read_boxes(*flatten_boxes(boxes, batch_size))
    device = flat.x1.device
    grids = anchor_grids(anchors, geometry.sizes, device)
    point = (flat.x1 == flat.x2) & (flat.y1 == flat.y2)
    valid = flat.valid & ~point
    images = torch.arange(flat.batch, device=device).unsqueeze(1)
    level = None if geometry.every_level else box_level(flat, geometry)
    masks = []
    for k, ((h, w), grid) in enumerate(zip(geometry.sizes, grids)):
        counts = torch.zeros(flat.batch, h * w, device=device, dtype=torch.float32)
        ax1, ay1, ax2, ay2 = grid
        anchor_area = (ax2 - ax1 + 1) * (ay2 - ay1 + 1)
        # A NaN overlaps nothing.
        ax1 = torch.where((ax1 == ax2) & (ay1 == ay2), math.nan, ax1)
        here = valid if level is None else valid & (level == k)
        owner = ((flat.image == images) & here).to(torch.float32)
        for start, stop in _chunks(flat.x1.shape[0], ax1.numel(), device) if ax1.numel() else []:
            x1, y1, x2, y2 = (v[start:stop, None, None] for v in flat[3:])
            inter = (torch.minimum(x2, ax2) - torch.maximum(x1, ax1)).add_(1).clamp_(min=0)
            inter.mul_((torch.minimum(y2, ay2) - torch.maximum(y1, ay1)).add_(1).clamp_(min=0))
            union = anchor_area + (x2 - x1 + 1) * (y2 - y1 + 1) - inter
            iou = torch.where(inter > 0, inter / union, 0.0).amax(1)
            hits = iou > threshold * iou.amax(1, keepdim=True)
            # Which image has how many hits in which cell: ones and zeros, so exact in any order and precision.
            counts.addmm_(owner[:, start:stop], hits.to(torch.float32))
        masks.append((counts > 0).to(torch.float32).view(flat.batch, h, w))
    return masks


def all_ones(features: Tensor | Sequence[Tensor] | Mapping[Any, Tensor]) -> list[Tensor]:
    """Ones for every level (Mimic): the whole map is foreground.

    Args:
        features: (N, C, H, W), or a list, tuple or dict of levels; only shapes and devices are read.

    Returns one float32 mask (N, H, W) per level, on its features' device. Nothing is allocated at feature size.
    TypeError for what is not a tensor, ValueError for a shape that is not (N, C, H, W).
    Source: Li et al. 2017 (Mimic).
    """
    if isinstance(features, Tensor):
        features = [features]
    elif isinstance(features, Mapping):
        features = list(features.values())
    elif not isinstance(features, (list, tuple)):
        raise TypeError(f"features: expected a tensor or levels of tensors, got {type(features).__name__}")
    for k, x in enumerate(features):
        if not isinstance(x, Tensor):
            raise TypeError(f"features[{k}]: expected a tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"features[{k}]: expected shape (N, C, H, W), got {shape(x)}")
    return [torch.ones(x.shape[0], *x.shape[2:], device=x.device, dtype=torch.float32) for x in features]
