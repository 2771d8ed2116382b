"""Masked MSE in Triton. Forward: each feature is read once (2b bytes for a pair of elements), the mask once per group
of channels; every program leaves four partial sums, and one more launch adds up those of all levels in a fixed order.
Backward: reads both features, writes the gradient (3b). One launch per level and one to finish; nothing of a feature's
size is allocated. Compiled for NVIDIA and AMD GPUs, and run in Triton's interpreter; no speed is claimed.
"""

import torch
import triton.language as tl

from .features import body_program, edge_program, launch_on, level_kernel, tile_of, tile_offsets, tiles_of, walk_over
from .numbers import device_function, load_float32, store_rounded, sum_over

_WARPS = 4


@device_function
def _add_up(
    s_ptr, t_ptr, m_ptr, sums_ptr, sums, slot, s_start, t_start, m_start, p, inside, c_from, c_step, c, channels, width,
    s_c, s_y, s_x, t_c, t_y, t_x, counts,
    ALIKE: tl.constexpr, INNER: tl.constexpr, MERGED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Over pixels p and channels c_from + c, c_from + c_step + c, ...: the sums of both regions, and with `counts`
    their numbers of pixels.
    """
    c_end = channels // VECTOR * VECTOR if INNER else channels
    squares = tl.full([p.shape[0], c.shape[0]] if INNER else [c.shape[0], p.shape[0]], 0.0, tl.float32)
    for first in range(c_from, channels, c_step):
        at = first + c
        valid = tile_of(at < c_end, inside, INNER)
        of_s = tile_offsets(s_start, at, p, width, s_c, s_y, s_x, INNER, MERGED, VECTOR)
        of_t = of_s if ALIKE else tile_offsets(t_start, at, p, width, t_c, t_y, t_x, INNER, MERGED, VECTOR)
        difference = load_float32(s_ptr + of_s, valid) - load_float32(t_ptr + of_t, valid)
        squares += difference * difference
    of_pixel = sum_over(squares, 1 if INNER else 0)
    m = tl.load(m_ptr + m_start + p, mask=inside, other=0.0)
    rest = tl.where(inside, 1.0 - m, 0.0)
    to = sums_ptr + slot
    tl.store(to, sum_over(m * of_pixel, 0))
    tl.store(to + sums, sum_over(rest * of_pixel, 0))
    tl.store(to + sums + sums, tl.where(counts, sum_over(m, 0), 0.0))
    tl.store(to + sums + sums + sums, tl.where(counts, sum_over(rest, 0), 0.0))


@level_kernel
def _forward(
    s_ptr, t_ptr, m_ptr, sums_ptr, table_ptr, level, sums, first, pictures, channels, pixels, width,
    tiles, groups, edge_groups, edges_from, s_n, s_c, s_y, s_x, t_n, t_c, t_y, t_x,
    ALIKE: tl.constexpr, INNER: tl.constexpr, MERGED: tl.constexpr, VECTOR: tl.constexpr, EDGES: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, EDGE_CHANNELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    slot = first + program.to(tl.int64)
    sums = sums.to(tl.int64)
    if program == 0:  # what _finish has to know of this level
        row = table_ptr + 4 * level.to(tl.int64)
        tl.store(row, first)
        tl.store(row + 1, tl.num_programs(0))
        tl.store(row + 2, pictures)
        tl.store(row + 3, channels)
    if not EDGES or program < edges_from:
        n, group, tile, lead, body = body_program(program, tiles, groups, pixels, s_n, s_c, INNER, VECTOR)
        p = tile * PIXELS + tl.arange(0, PIXELS)
        c = tl.arange(0, CHANNELS).to(tl.int64)
        _add_up(
            s_ptr, t_ptr, m_ptr, sums_ptr, sums, slot, n * s_n + lead, n * t_n + lead, n * pixels + lead, p, p < body,
            group * CHANNELS if INNER else group, groups.to(tl.int64) * CHANNELS, c if INNER else groups * c,
            channels, width, s_c, s_y, s_x, t_c, t_y, t_x, group == 0, ALIKE, INNER, MERGED, VECTOR,
        )  # fmt: skip
    else:
        n, group, edge_p, _, _ = edge_program(program - edges_from, edge_groups, pixels, s_n, s_c, VECTOR)
        edge_c = edge_groups * tl.arange(0, EDGE_CHANNELS).to(tl.int64)
        _add_up(
            s_ptr, t_ptr, m_ptr, sums_ptr, sums, slot, n * s_n, n * t_n, n * pixels, edge_p, edge_p < pixels,
            group, edge_groups.to(tl.int64) * EDGE_CHANNELS, edge_c, channels, width,
            s_c, s_y, s_x, t_c, t_y, t_x, group == 0, ALIKE, INNER, MERGED, 1,
        )  # fmt: skip


@device_function
def _scale(weight, mask_sum, channels, pictures, share, NORMALIZER: tl.constexpr):
    """region_scale of csrc/math/masked_mse.h, in float64."""
    if NORMALIZER == 0:
        size = mask_sum * channels
    elif NORMALIZER == 1:
        size = mask_sum
    else:
        size = pictures
    return tl.cast(weight, tl.float64) * share / tl.where(2 * size > 1, 2 * size, 1)


@level_kernel
def _finish(
    sums_ptr, table_ptr, loss_ptr, scales_ptr, foreground, foreground_ptr, background, background_ptr, sums, levels,
    NORMALIZER: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: every level's sums in float64, the scales of the backward, and the loss."""
    if foreground_ptr is not None:
        foreground = tl.load(foreground_ptr)
    if background_ptr is not None:
        background = tl.load(background_ptr)
    share = 1.0 / (levels.to(tl.float64) if MEAN else tl.cast(1.0, tl.float64))
    loss = tl.cast(0.0, tl.float64)
    sums = sums.to(tl.int64)
    for level in range(0, levels):
        row = table_ptr + 4 * level
        first, count = tl.load(row), tl.load(row + 1)
        pictures, channels = tl.load(row + 2).to(tl.float64), tl.load(row + 3).to(tl.float64)
        inside = tl.full([BLOCK], 0.0, tl.float64)
        outside = tl.full([BLOCK], 0.0, tl.float64)
        inside_size = tl.full([BLOCK], 0.0, tl.float64)
        outside_size = tl.full([BLOCK], 0.0, tl.float64)
        for start in range(0, count, BLOCK):
            i = start + tl.arange(0, BLOCK)
            at = sums_ptr + first + i
            inside += tl.load(at, mask=i < count, other=0.0).to(tl.float64)
            outside += tl.load(at + sums, mask=i < count, other=0.0).to(tl.float64)
            inside_size += tl.load(at + 2 * sums, mask=i < count, other=0.0).to(tl.float64)
            outside_size += tl.load(at + 3 * sums, mask=i < count, other=0.0).to(tl.float64)
        f = _scale(foreground, sum_over(inside_size, 0), channels, pictures, share, NORMALIZER)
        b = _scale(background, sum_over(outside_size, 0), channels, pictures, share, NORMALIZER)
        loss += f * sum_over(inside, 0) + b * sum_over(outside, 0)
        tl.store(scales_ptr + 2 * level, (2 * f).to(tl.float32))
        tl.store(scales_ptr + 2 * level + 1, (2 * b).to(tl.float32))
    tl.store(loss_ptr, loss.to(tl.float32))


@device_function
def _differentiate(
    s_ptr, t_ptr, m_ptr, g_ptr, s_start, t_start, g_start, m_start, p, inside, c_from, c_step, c, channels, width,
    s_c, s_y, s_x, t_c, t_y, t_x, g_c, g_y, g_x, foreground, background,
    ALIKE: tl.constexpr, INNER: tl.constexpr, MERGED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Writes the gradient at pixels p and channels c_from + c, c_from + c_step + c, ..."""
    c_end = channels // VECTOR * VECTOR if INNER else channels
    m = tl.load(m_ptr + m_start + p, mask=inside, other=0.0)
    weight = tl.expand_dims(m * foreground + (1.0 - m) * background, 1 if INNER else 0)
    for first in range(c_from, channels, c_step):
        at = first + c
        valid = tile_of(at < c_end, inside, INNER)
        of_s = tile_offsets(s_start, at, p, width, s_c, s_y, s_x, INNER, MERGED, VECTOR)
        of_t = of_s if ALIKE else tile_offsets(t_start, at, p, width, t_c, t_y, t_x, INNER, MERGED, VECTOR)
        of_g = of_s if ALIKE else tile_offsets(g_start, at, p, width, g_c, g_y, g_x, INNER, MERGED, VECTOR)
        difference = load_float32(s_ptr + of_s, valid) - load_float32(t_ptr + of_t, valid)
        store_rounded(g_ptr + of_g, difference * weight, valid)


@level_kernel
def _backward(
    s_ptr, t_ptr, m_ptr, g_ptr, upstream_ptr, scales_ptr, level, channels, pixels, width,
    tiles, groups, edge_groups, edges_from, s_n, s_c, s_y, s_x, t_n, t_c, t_y, t_x, g_n, g_c, g_y, g_x,
    ALIKE: tl.constexpr, INNER: tl.constexpr, MERGED: tl.constexpr, VECTOR: tl.constexpr, EDGES: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, EDGE_CHANNELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    upstream = tl.load(upstream_ptr)
    foreground = upstream * tl.load(scales_ptr + level + level)
    background = upstream * tl.load(scales_ptr + level + level + 1)
    if not EDGES or program < edges_from:
        n, group, tile, lead, body = body_program(program, tiles, groups, pixels, s_n, s_c, INNER, VECTOR)
        p = tile * PIXELS + tl.arange(0, PIXELS)
        c = tl.arange(0, CHANNELS).to(tl.int64)
        _differentiate(
            s_ptr, t_ptr, m_ptr, g_ptr, n * s_n + lead, n * t_n + lead, n * g_n + lead, n * pixels + lead, p, p < body,
            group * CHANNELS if INNER else group, groups.to(tl.int64) * CHANNELS, c if INNER else groups * c,
            channels, width, s_c, s_y, s_x, t_c, t_y, t_x, g_c, g_y, g_x, foreground, background,
            ALIKE, INNER, MERGED, VECTOR,
        )  # fmt: skip
    else:
        n, group, edge_p, _, _ = edge_program(program - edges_from, edge_groups, pixels, s_n, s_c, VECTOR)
        edge_c = edge_groups * tl.arange(0, EDGE_CHANNELS).to(tl.int64)
        _differentiate(
            s_ptr, t_ptr, m_ptr, g_ptr, n * s_n, n * t_n, n * g_n, n * pixels, edge_p, edge_p < pixels,
            group, edge_groups.to(tl.int64) * EDGE_CHANNELS, edge_c, channels, width,
            s_c, s_y, s_x, t_c, t_y, t_x, g_c, g_y, g_x, foreground, background, ALIKE, INNER, MERGED, 1,
        )  # fmt: skip


def masked_mse(student, teacher, mask, fw, fw_tensor, bw, bw_tensor, normalizer, mean_levels):
    """The op of kdkernels/losses/masked_mse.py: (loss, scales)."""
    first = student[0]
    levels = [i for i, s in enumerate(student) if s.shape[0] * s.shape[2] * s.shape[3]]
    walks = {i: walk_over(student[i], teacher[i]) for i in levels}
    tiles = {i: tiles_of(walks[i], columns=512, whole=True) for i in levels}
    count = sum(tiles[i].programs for i in levels)
    loss = first.new_empty((), dtype=torch.float32)
    scales = first.new_empty((len(student), 2), dtype=torch.float32)
    sums = first.new_empty((4, count), dtype=torch.float32)
    # A level without pixels writes no row.
    table = (first.new_empty if len(levels) == len(student) else first.new_zeros)((len(student), 4), dtype=torch.int64)
    with launch_on(first):
        slot = 0
        for i in levels:
            walk, tile = walks[i], tiles[i]
            _forward[(tile.programs,)](
                student[i], teacher[i], mask[i], sums, table, i, count, slot, student[i].shape[0], walk.channels,
                walk.pixels, walk.width, *tile.counts, *walk.strides,
                **walk.constants, **tile.constants, num_warps=_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
            slot += tile.programs
        _finish[(1,)](
            sums, table, loss, scales, fw, fw_tensor, bw, bw_tensor, count, len(student),
            NORMALIZER=normalizer, MEAN=mean_levels, BLOCK=1024, num_warps=_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return loss, scales


def masked_mse_backward(grad_loss, student, teacher, mask, scales, level_of):
    """The op of kdkernels/losses/masked_mse.py: one gradient per student level."""
    grads = [torch.empty_like(s) for s in student]
    for s, t, m, g, level in zip(student, teacher, mask, grads, level_of):
        if s.numel() == 0:
            continue
        walk = walk_over(s, t, g)
        tile = tiles_of(walk, columns=512, whole=True)
        with launch_on(s):
            _backward[(tile.programs,)](
                s, t, m, g, grad_loss, scales, level, walk.channels, walk.pixels, walk.width,
                *tile.counts, *walk.strides,
                **walk.constants, **tile.constants, num_warps=_WARPS, enable_fp_fusion=True,
            )  # fmt: skip
    return grads
