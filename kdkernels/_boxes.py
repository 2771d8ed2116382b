"""Boxes in cells: the argument checks of :mod:`kdkernels.masks`, a box's level, and the cells that it covers.

The rules of one box (:func:`box_level`, :func:`box_cells`) are the definition that every kernel that draws boxes is
tested against: they may change only together with csrc/math/masks.h and triton/masks.py. Nothing here reads a tensor on
the host.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Boxes = Tensor | Sequence[Tensor]
Sizes = Sequence[tuple[int, int]]

# Cells farther out count as this far: it keeps infinite coordinates finite, and all cell arithmetic exact in float32.
_FAR = 2**22


class Geometry(NamedTuple):
    sizes: list[tuple[int, int]]
    strides: list[float]
    base: float
    every_level: bool


class FlatBoxes(NamedTuple):
    """M boxes: image index, whether the box may mark anything, and coordinates, 0 where it may not."""

    batch: int
    image: Tensor  # (M,) int64 in [0, batch)
    valid: Tensor  # (M,) bool
    x1: Tensor  # (M,) float32, as the next three
    y1: Tensor
    x2: Tensor
    y2: Tensor


class Axis(NamedTuple):
    """One axis of each box in cells: [first, last) after the picture's borders, and the span before them."""

    first: Tensor
    last: Tensor
    start: Tensor
    length: Tensor


class Cells(NamedTuple):
    """What every box covers: (1, M) where a box has one level, (L, M) where it has all."""

    valid: Tensor
    level: Tensor  # (1, M) or (L, 1)
    image: Tensor
    rows: Axis
    columns: Axis


def shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def _is_int(x: Any) -> bool:
    return isinstance(x, (int, torch.SymInt)) and not isinstance(x, bool)


def is_number(x: Any) -> bool:
    return (_is_int(x) or isinstance(x, float)) and not isinstance(x, bool)


def _check_pair(name: str, x: Any) -> tuple[int, int]:
    if not isinstance(x, (tuple, list)) or len(x) != 2 or not all(_is_int(v) for v in x):
        raise TypeError(f"{name}: expected two integers (H, W), got {x!r}")
    if x[0] < 0 or x[1] < 0:
        raise ValueError(f"{name}: expected (H, W) of 0 or more, got {tuple(x)}")
    return x[0], x[1]


def read_geometry(sizes: Any, strides: Any, assign: str, base_size: float | None, image_size: Any) -> Geometry:
    for name, x in (("sizes", sizes), ("strides", strides)):
        if not isinstance(x, (list, tuple)):
            raise TypeError(f"{name}: expected a list with one entry per level, got {type(x).__name__}")
    sizes = [_check_pair(f"sizes[{k}]", size) for k, size in enumerate(sizes)]
    if len(sizes) != len(strides):
        raise ValueError(f"sizes has {len(sizes)} levels, strides has {len(strides)}")
    for k, stride in enumerate(strides):
        if not is_number(stride):
            raise TypeError(f"strides[{k}]: expected a number of pixels, got {stride!r}")
        if not 0 < stride < math.inf:
            raise ValueError(f"strides[{k}]: expected a positive number of pixels, got {stride}")
    if assign not in ("scale", "all"):
        raise ValueError(f'assign: expected "scale" or "all", got {assign!r}')
    if base_size is None:
        base_size = 14 * strides[0] if strides else 1.0
    elif not is_number(base_size):
        raise TypeError(f"base_size: expected a number of pixels or None, got {base_size!r}")
    elif not 0 < base_size < math.inf:
        raise ValueError(f"base_size: expected a positive number of pixels, got {base_size}")
    if image_size is not None:
        picture = _check_pair("image_size", image_size)
        for k, (size, stride) in enumerate(zip(sizes, strides)):
            # |cells - pixels / stride| < 1 holds for floor and ceil, and for nothing else.
            if any(abs(cells * stride - pixels) >= stride for cells, pixels in zip(size, picture)):
                raise ValueError(
                    f"sizes[{k}] = {size} at strides[{k}] = {stride} does not fit image_size = {picture}: expected "
                    f"floor or ceil of ({picture[0]} / {stride}, {picture[1]} / {stride}). image_size is the picture "
                    "that the features were computed from, padding included"
                )
    return Geometry(sizes, list(strides), base_size, assign == "all")


def _check_boxes(name: str, x: Any, columns: int) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype == torch.bool or x.dtype.is_complex:
        raise TypeError(f"{name}: expected real numbers, got {x.dtype}")
    if x.dim() != 2 or x.shape[1] != columns:
        form = "(n, 4)" if columns == 4 else "(M, 5): image index, x1, y1, x2, y2"
        raise ValueError(f"{name}: expected shape {form}, got {shape(x)}")
    return x.detach().to(torch.float32)


def flatten_boxes(boxes: Boxes, batch_size: int | None) -> tuple[Tensor, int]:
    """Boxes of either form as rows (M, 5) of float32, image index first, and the number of images."""
    if batch_size is not None and not _is_int(batch_size):
        raise TypeError(f"batch_size: expected an integer or None, got {batch_size!r}")
    if batch_size is not None and batch_size < 0:
        raise ValueError(f"batch_size: expected 0 or more, got {batch_size}")
    if isinstance(boxes, Tensor):
        flat = _check_boxes("boxes", boxes, 5)
        if batch_size is None:
            raise ValueError(f"batch_size: required with flat boxes (M, 5), here {shape(boxes)}")
        batch = batch_size
    elif isinstance(boxes, (list, tuple)):
        batch = len(boxes)
        if batch_size is not None and batch_size != batch:
            raise ValueError(f"batch_size = {batch_size}, but boxes is a list of {batch} images")
        images = [_check_boxes(f"boxes[{i}]", x, 4) for i, x in enumerate(boxes)]
        for i, x in enumerate(images):
            if x.device != images[0].device:
                raise ValueError(f"boxes[{i}]: on {x.device}, but boxes[0] is on {images[0].device}")
        # The number goes in as a fill: an index tensor made on the host would be a synchronising copy.
        numbered = [F.pad(x, (1, 0), value=float(i)) for i, x in enumerate(images)]
        flat = torch.cat(numbered) if numbered else torch.zeros(0, 5)
    else:
        raise TypeError(f"boxes: expected a list of tensors (n, 4) or one (M, 5), got {type(boxes).__name__}")
    return flat, batch


def read_boxes(rows: Tensor, batch: int) -> FlatBoxes:
    """What `flatten_boxes` gave, with the boxes that may not mark anything told apart."""
    index, x1, y1, x2, y2 = rows.unbind(1)
    # Written so that a NaN anywhere makes it false.
    valid = (index >= 0) & (index < batch) & (x2 >= x1) & (y2 >= y1)
    index, x1, y1, x2, y2 = (torch.where(valid, v, 0.0) for v in (index, x1, y1, x2, y2))
    return FlatBoxes(batch, index.to(torch.int64), valid, x1, y1, x2, y2)


def thresholds(geometry: Geometry) -> list[float]:
    """The smallest scale of a box on level 1, 2, ..., to be rounded to float32."""
    return [geometry.base * (2.0**k - 1e-6) for k in range(1, len(geometry.sizes))]


def box_level(flat: FlatBoxes, geometry: Geometry) -> Tensor:
    """The level of each box by its scale: (M,) int64."""
    scale = ((flat.x2 - flat.x1 + 1) * (flat.y2 - flat.y1 + 1)).sqrt()
    level = torch.zeros_like(flat.image)
    for threshold in thresholds(geometry):
        level = level + (scale >= threshold)
    return level


def of_level(level: Tensor, values: Sequence[float], dtype: torch.dtype = torch.int64) -> Tensor:
    """``values[level]``, without a table that would have to be copied from the host."""
    out = torch.full_like(level, values[0], dtype=dtype)
    for k in range(1, len(values)):
        out = torch.where(level >= k, values[k], out)
    return out


def box_cells(flat: FlatBoxes, geometry: Geometry) -> Cells:
    """Which cells each box covers (contract in :func:`ground_truth_masks`)."""
    levels = len(geometry.sizes)
    if geometry.every_level:
        level = torch.arange(levels, device=flat.image.device).unsqueeze(1)
    else:
        level = box_level(flat, geometry).unsqueeze(0)
    # A tensor, not a number: eager CUDA multiplies by the reciprocal of a number, which is not the quotient.
    stride = of_level(level, geometry.strides, torch.float32)

    def axis(low: Tensor, high: Tensor, size: Tensor) -> tuple[Tensor, Axis]:
        start = (low / stride).trunc().clamp(-_FAR, _FAR).to(torch.int64)
        stop = (high / stride).trunc().clamp(-_FAR, _FAR).to(torch.int64)
        first, last = start.clamp(min=0), torch.minimum(stop, size)
        return (first < size) & (stop >= 0), Axis(first, last, start, stop - start)

    on_x, x = axis(flat.x1, flat.x2, of_level(level, [w for _, w in geometry.sizes]))
    on_y, y = axis(flat.y1, flat.y2, of_level(level, [h for h, _ in geometry.sizes]))
    single = (x.first == x.last) | (y.first == y.last)

    def settle(a: Axis) -> Axis:
        # A single cell becomes the middle of a span of two, where the Gaussian is exactly 1.
        return Axis(
            a.first,
            torch.where(single, a.first + 1, a.last),
            torch.where(single, a.first - 1, a.start),
            torch.where(single, 2, a.length),
        )

    return Cells(flat.valid & on_x & on_y, level, flat.image, settle(y), settle(x))


def anchor_grids(anchors: Any, sizes: Sizes, device: torch.device) -> list[Tensor]:
    """Per level (4, A, H * W) float32: positions last, where they are contiguous."""
    if isinstance(anchors, Tensor):
        anchors = [anchors]
    if not isinstance(anchors, (list, tuple)):
        raise TypeError(f"anchors: expected a list of tensors, one per level, got {type(anchors).__name__}")
    if len(anchors) != len(sizes):
        raise ValueError(f"anchors has {len(anchors)} levels, sizes has {len(sizes)}")
    out = []
    for k, (x, (h, w)) in enumerate(zip(anchors, sizes)):
        if not isinstance(x, Tensor):
            raise TypeError(f"anchors[{k}]: expected a tensor, got {type(x).__name__}")
        if x.dtype == torch.bool or x.dtype.is_complex:
            raise TypeError(f"anchors[{k}]: expected real numbers, got {x.dtype}")
        flat = x.dim() == 2 and x.shape[1] == 4 and x.shape[0] % max(1, h * w) == 0
        grid = x.dim() == 4 and (x.shape[0], x.shape[1], x.shape[3]) == (h, w, 4)
        if not (flat or grid) or (h * w == 0 and x.numel()):
            raise ValueError(
                f"anchors[{k}]: expected (H * W * A, 4) or (H, W, A, 4) with (H, W) = {(h, w)}, got {shape(x)}"
            )
        if x.device != device:
            raise ValueError(f"anchors[{k}]: on {x.device}, but boxes are on {device}")
        per_cell = 0 if h * w == 0 else x.numel() // (4 * h * w)
        x = x.detach().to(torch.float32).reshape(h * w, per_cell, 4)
        out.append(x.permute(2, 1, 0).contiguous())
    return out
