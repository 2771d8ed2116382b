"""Masks from boxes in Triton: one launch for all pictures and levels.

A program has a tile of cells of one picture. It goes through all boxes: of many at a time it finds whether any touches
the tile, and where one does, takes them again a few at a time. A box is a product of rows and columns, so its squared
distances (0 for ground truth, infinite outside) are a term per row plus a term per column, and a cell keeps the
smallest sum. The rules of a box are those of kdkernels/_boxes.py, operation by operation.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .features import launch_on
from .numbers import INTERPRETED, device_function, max_over

_FAR = tl.constexpr(2.0**22)
# The tile, and how many boxes are looked at and drawn at a time. In the interpreter an operation costs the same for any
# small tile.
_ROWS, _COLUMNS, _MANY, _FEW = (128, 128, 64, 64) if INTERPRETED.value else (16, 64, 256, 4)


@device_function
def _cell(pixel, stride):
    """The cell of a coordinate. Nothing is NaN here; a number far out, and infinity, is 2^22."""
    cell = tl.div_rn(pixel, stride)
    return tl.minimum(tl.maximum(cell, -_FAR), _FAR).to(tl.int32)  # rounds toward zero


@device_function
def _cells(
    boxes, first, count, pictures, picture, level, stride, h, w, top, left, thresholds,
    EVERY: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BOXES: tl.constexpr,
):  # fmt: skip
    """Of BOXES boxes: whether each touches the tile; first, last, start and length of its columns, then of its rows."""
    i = first + tl.arange(0, BOXES)
    at = boxes + i.to(tl.int64) * 5
    owner = tl.load(at, mask=i < count, other=-1.0)
    x1 = tl.load(at + 1, mask=i < count, other=0.0)
    y1 = tl.load(at + 2, mask=i < count, other=0.0)
    x2 = tl.load(at + 3, mask=i < count, other=0.0)
    y2 = tl.load(at + 4, mask=i < count, other=0.0)
    # Written so that a NaN anywhere makes it false.
    valid = (owner >= 0) & (owner < pictures.to(tl.float32)) & (x2 >= x1) & (y2 >= y1)
    touches = valid & (tl.where(valid, owner, 0.0).to(tl.int32) == picture)
    x1, y1 = tl.where(touches, x1, 0.0), tl.where(touches, y1, 0.0)
    x2, y2 = tl.where(touches, x2, 0.0), tl.where(touches, y2, 0.0)
    if not EVERY:
        scale = tl.sqrt_rn((x2 - x1 + 1) * (y2 - y1 + 1))
        own = tl.zeros_like(i)
        for k in tl.static_range(LEVELS - 1):
            own += (scale >= thresholds[k]).to(tl.int32)
        touches &= own == level
    x, y = _cell(x1, stride), _cell(y1, stride)
    x_stop, y_stop = _cell(x2, stride), _cell(y2, stride)
    x_first, y_first = tl.maximum(x, 0), tl.maximum(y, 0)
    x_last, y_last = tl.minimum(x_stop, w), tl.minimum(y_stop, h)
    touches &= (x_first < w) & (x_stop >= 0) & (y_first < h) & (y_stop >= 0)
    # A single cell becomes the middle of a span of two, where the Gaussian is exactly 1.
    single = (x_first == x_last) | (y_first == y_last) | (touches == 0)  # the latter only keeps lengths above 0
    x_last, y_last = tl.where(single, x_first + 1, x_last), tl.where(single, y_first + 1, y_last)
    width, height = tl.where(single, 2, x_stop - x), tl.where(single, 2, y_stop - y)
    x, y = tl.where(single, x_first - 1, x), tl.where(single, y_first - 1, y)
    touches &= (x_first < left + COLUMNS) & (x_last > left) & (y_first < top + ROWS) & (y_last > top)
    return touches, x_first, x_last, x, width, y_first, y_last, y, height


@device_function
def _closeness(cell, touches, first, last, start, length, GAUSSIAN: tl.constexpr):
    """Minus the squared distance of cells to the middle of a span, in half spans; -infinity outside."""
    value = cell * 0.0
    if GAUSSIAN:
        distance = tl.div_rn((2 * (cell - start) - length).to(tl.float32), length.to(tl.float32))
        value = -(distance * distance)
    return tl.where(touches & (cell >= first) & (cell < last), value, float("-inf"))


@triton.jit(do_not_specialize=["count", "pictures"])
def draw(
    boxes, masks, heights, widths, strides, thresholds, count, pictures,
    GAUSSIAN: tl.constexpr, EVERY: tl.constexpr, LEVELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    MANY: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """Writes masks[k] (pictures, heights[k], widths[k]) for every level k."""
    program = tl.program_id(0)
    begin = program * 0
    level, h, w, across, tiles, mine = begin, begin, begin, begin, begin, begin
    nothing = begin.to(tl.float32)
    stride = nothing
    for k in tl.static_range(LEVELS):
        h_k, w_k = (nothing + heights[k]).to(tl.int32), (nothing + widths[k]).to(tl.int32)
        across_k = (w_k + COLUMNS - 1) // COLUMNS
        tiles_k = (h_k + ROWS - 1) // ROWS * across_k
        here = (program >= begin) & (program < begin + tiles_k * pictures)
        level, h, w = tl.where(here, k, level), tl.where(here, h_k, h), tl.where(here, w_k, w)
        across, tiles = tl.where(here, across_k, across), tl.where(here, tiles_k, tiles)
        stride, mine = tl.where(here, strides[k], stride), tl.where(here, program - begin, mine)
        begin += tiles_k * pictures
    picture, tile = mine // tiles, mine % tiles
    top, left = tile // across * ROWS, tile % across * COLUMNS
    row = top + tl.arange(0, ROWS)
    column = left + tl.arange(0, COLUMNS)

    best = tl.full([ROWS, COLUMNS], float("-inf"), tl.float32)
    for first in range(0, count, MANY):
        many = _cells(
            boxes, first, count, pictures, picture, level, stride, h, w, top, left, thresholds,
            EVERY, LEVELS, ROWS, COLUMNS, MANY,
        )  # fmt: skip
        if max_over(many[0].to(tl.int32), 0) > 0:
            for some in range(first, first + MANY, FEW):
                touches, x_first, x_last, x, width, y_first, y_last, y, height = _cells(
                    boxes, some, count, pictures, picture, level, stride, h, w, top, left, thresholds,
                    EVERY, LEVELS, ROWS, COLUMNS, FEW,
                )  # fmt: skip
                if max_over(touches.to(tl.int32), 0) > 0:
                    rows = _closeness(
                        row[:, None], touches[None, :], y_first[None, :], y_last[None, :], y[None, :], height[None, :],
                        GAUSSIAN,
                    )  # fmt: skip
                    columns = _closeness(
                        column[None, :], touches[:, None], x_first[:, None], x_last[:, None], x[:, None],
                        width[:, None], GAUSSIAN,
                    )  # fmt: skip
                    best = tl.maximum(best, max_over(rows[:, :, None] + columns[None, :, :], 1))

    inside = best > float("-inf")
    value = tl.where(inside, tl.exp(0.5 * best) if GAUSSIAN else 1.0, 0.0)
    at = (picture.to(tl.int64) * h + row[:, None]) * w + column[None, :]
    for k in tl.static_range(LEVELS):  # one of these stores something
        exists = (row[:, None] < tl.where(level == k, h, 0)) & (column[None, :] < w)
        tl.store(masks[k] + at, value, mask=exists)


def _float32(x: float) -> float:
    """x rounded to float32; too large a number is infinity."""
    return ctypes.c_float(x).value


def _masks(
    gaussian: bool,
    boxes: Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    strides: Sequence[float],
    thresholds: Sequence[float],
    batch_size: int,
    all_levels: bool,
) -> list[Tensor]:
    sizes = list(zip(heights, widths))
    masks = [torch.empty((batch_size, h, w), dtype=torch.float32, device=boxes.device) for h, w in sizes]
    programs = batch_size * sum(triton.cdiv(h, _ROWS) * triton.cdiv(w, _COLUMNS) for h, w in sizes)
    if programs == 0:
        return masks
    with launch_on(boxes):
        # As floats, because a tuple's integers are compiled for: each new picture size would be compiled anew.
        draw[(programs,)](
            boxes,
            tuple(masks),
            tuple(map(float, heights)),
            tuple(map(float, widths)),
            tuple(map(_float32, strides)),
            tuple(map(_float32, [*thresholds, 0.0])),
            boxes.shape[0],
            batch_size,
            GAUSSIAN=gaussian,
            EVERY=all_levels,
            LEVELS=len(masks),
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            MANY=_MANY,
            FEW=_FEW,
            num_warps=8,
            enable_fp_fusion=True,
        )
    return masks


def ground_truth_masks(*arguments) -> list[Tensor]:
    """kdkernels_triton::ground_truth_masks."""
    return _masks(False, *arguments)


def gaussian_masks(*arguments) -> list[Tensor]:
    """kdkernels_triton::gaussian_masks."""
    return _masks(True, *arguments)
