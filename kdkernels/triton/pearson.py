"""Pearson's loss (PKD) in Triton. Forward: each feature is read once (2b bytes for a pair of elements). A program holds
one chunk of pixels of a few channels and leaves 12 numbers per channel; a second launch merges all levels' chunks in
float64, in a fixed order, and a third adds up the channels. Backward: reads both features, writes the gradient (3b).
One launch per level each way. Compiled for NVIDIA and AMD GPUs, and run in Triton's interpreter; no speed is claimed.
"""

import torch
import triton.language as tl
from torch import Tensor

from .features import (
    TILE,
    Tiles,
    Walk,
    body_program,
    edge_program,
    launch_on,
    level_kernel,
    tile_of,
    tile_offsets,
    tiles_of,
    walk_over,
)
from .numbers import INTERPRETED, device_function, load_float32, store_rounded, sum_over
from .pearson_chunks import FIELDS, TABLE, finish, sum_chunk


@level_kernel
def _forward(
    s_ptr, t_ptr, chunks_ptr, table_ptr, level, records, slot, samples, first_channel, chunks, body_chunks, residues,
    channels, pixels, width, tiles, groups, edge_groups, edges_from, s_n, s_c, s_y, s_x, t_n, t_c, t_y, t_x,
    ALIKE: tl.constexpr, INNER: tl.constexpr, MERGED: tl.constexpr, VECTOR: tl.constexpr, EDGES: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, EDGE_CHANNELS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program == 0:  # what finish has to know of this level
        row = table_ptr + TABLE * level.to(tl.int64)
        tl.store(row, slot)
        tl.store(row + 1, chunks)
        tl.store(row + 2, channels)
        tl.store(row + 3, samples)
        tl.store(row + 4, first_channel)
    if not EDGES or program < edges_from:
        n, group, tile, lead, body = body_program(program, tiles, groups, pixels, s_n, s_c, INNER, VECTOR)
        c = tl.arange(0, CHANNELS).to(tl.int64)
        c = group * CHANNELS + c if INNER else group % residues + residues * (group // residues * CHANNELS + c)
        p = tile * PIXELS + tl.arange(0, PIXELS)
        sum_chunk(
            s_ptr, t_ptr, chunks_ptr, records, slot + (n * tiles + tile) * channels, n * s_n + lead, n * t_n + lead,
            c, channels, p, p < body, tile * PIXELS, tl.minimum(tl.maximum(body - tile * PIXELS, 0), PIXELS), width,
            s_c, s_y, s_x, t_c, t_y, t_x, ALIKE, INNER, MERGED, VECTOR,
        )  # fmt: skip
    else:
        n, group, edge_p, first, count = edge_program(program - edges_from, edge_groups, pixels, s_n, s_c, VECTOR)
        edge_c = group % residues + residues * (group // residues * EDGE_CHANNELS + tl.arange(0, EDGE_CHANNELS))
        sum_chunk(
            s_ptr, t_ptr, chunks_ptr, records, slot + (body_chunks + n) * channels, n * s_n, n * t_n, edge_c, channels,
            edge_p, edge_p < pixels, first, count, width,
            s_c, s_y, s_x, t_c, t_y, t_x, ALIKE, INNER, MERGED, 1,
        )  # fmt: skip


@level_kernel
def _total(losses_ptr, loss_ptr, count, BLOCK: tl.constexpr):
    """One program: the sum of all channels' losses."""
    total = tl.full([BLOCK], 0.0, tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        total += tl.load(losses_ptr + i, mask=i < count, other=0.0)
    tl.store(loss_ptr, sum_over(total, 0).to(tl.float32))


@device_function
def _load_statistics(statistics_ptr, at, mask):
    """shift, rest, scale and factor of one side."""
    return (
        tl.load(statistics_ptr + at, mask=mask, other=0.0),
        tl.load(statistics_ptr + at + 1, mask=mask, other=0.0),
        tl.load(statistics_ptr + at + 2, mask=mask, other=0.0),
        tl.load(statistics_ptr + at + 3, mask=mask, other=0.0),
    )


@device_function
def _differentiate(
    s_ptr, t_ptr, g_ptr, statistics_ptr, upstream, first_channel, s_start, t_start, g_start, c, channels,
    p, p_end, width, s_c, s_y, s_x, t_c, t_y, t_x, g_c, g_y, g_x,
    ALIKE: tl.constexpr, INNER: tl.constexpr, MERGED: tl.constexpr, VECTOR: tl.constexpr,
    PIXELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of channels c at pixels p, p + PIXELS, ..., below p_end."""
    AXIS: tl.constexpr = 0 if INNER else 1
    known = c < channels
    at = (first_channel + c) * 8
    s_shift, s_rest, s_scale, s_factor = _load_statistics(statistics_ptr, at, known)
    t_shift, t_rest, t_scale, t_factor = _load_statistics(statistics_ptr, at + 4, known)
    s_shift, t_shift = tl.expand_dims(s_shift, AXIS), tl.expand_dims(t_shift, AXIS)
    s_rest, t_rest = tl.expand_dims(s_rest, AXIS), tl.expand_dims(t_rest, AXIS)
    s_scale, t_scale = tl.expand_dims(s_scale, AXIS), tl.expand_dims(t_scale, AXIS)
    s_factor, t_factor = tl.expand_dims(s_factor, AXIS), tl.expand_dims(t_factor, AXIS)
    c_end = channels // VECTOR * VECTOR if INNER else channels
    here = p
    for _ in range(0, STEPS):
        valid = tile_of(c < c_end, here < p_end, INNER)
        of_s = tile_offsets(s_start, c, here, width, s_c, s_y, s_x, INNER, MERGED, VECTOR)
        of_t = of_s if ALIKE else tile_offsets(t_start, c, here, width, t_c, t_y, t_x, INNER, MERGED, VECTOR)
        of_g = of_s if ALIKE else tile_offsets(g_start, c, here, width, g_c, g_y, g_x, INNER, MERGED, VECTOR)
        s = ((load_float32(s_ptr + of_s, valid) - s_shift) - s_rest) * s_scale
        t = ((load_float32(t_ptr + of_t, valid) - t_shift) - t_rest) * t_scale
        store_rounded(g_ptr + of_g, upstream * (s_factor * s - t_factor * t), valid)
        here += PIXELS


@level_kernel
def _backward(
    s_ptr, t_ptr, g_ptr, upstream_ptr, statistics_ptr, first_channel, residues, channels, pixels, width,
    tiles, groups, edge_groups, edges_from, s_n, s_c, s_y, s_x, t_n, t_c, t_y, t_x, g_n, g_c, g_y, g_x,
    ALIKE: tl.constexpr, INNER: tl.constexpr, MERGED: tl.constexpr, VECTOR: tl.constexpr, EDGES: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, EDGE_CHANNELS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    upstream = tl.load(upstream_ptr)
    if not EDGES or program < edges_from:
        n, group, span, lead, body = body_program(program, tiles, groups, pixels, s_n, s_c, INNER, VECTOR)
        c = tl.arange(0, CHANNELS).to(tl.int64)
        c = group * CHANNELS + c if INNER else group % residues + residues * (group // residues * CHANNELS + c)
        p = span * (PIXELS * STEPS) + tl.arange(0, PIXELS)
        _differentiate(
            s_ptr, t_ptr, g_ptr, statistics_ptr, upstream, first_channel, n * s_n + lead, n * t_n + lead,
            n * g_n + lead, c, channels, p, body, width, s_c, s_y, s_x, t_c, t_y, t_x, g_c, g_y, g_x,
            ALIKE, INNER, MERGED, VECTOR, PIXELS, STEPS,
        )  # fmt: skip
    else:
        n, group, edge_p, _, _ = edge_program(program - edges_from, edge_groups, pixels, s_n, s_c, VECTOR)
        edge_c = group % residues + residues * (group // residues * EDGE_CHANNELS + tl.arange(0, EDGE_CHANNELS))
        _differentiate(
            s_ptr, t_ptr, g_ptr, statistics_ptr, upstream, first_channel, n * s_n, n * t_n, n * g_n, edge_c, channels,
            edge_p, pixels, width, s_c, s_y, s_x, t_c, t_y, t_x, g_c, g_y, g_x,
            ALIKE, INNER, MERGED, 1, PIXELS, 1,
        )  # fmt: skip


def _plan(student: Tensor, teacher: Tensor) -> tuple[Walk, Tiles, int]:
    """The forward's walk, tiles and warps. A chunk is long: it costs 12 numbers and ten reductions."""
    walk = walk_over(student, teacher)
    if walk.channels_inner:  # many pixels to a thread: each of its channels has reductions of its own
        elements = 4096 if INTERPRETED.value or walk.vector == 1 else 8192
        return walk, tiles_of(walk, columns=64, elements=elements, whole=False), 4
    columns = 512 if INTERPRETED.value else 4096
    while columns > 1024 and -walk.pixels % columns > walk.pixels // 8:  # what pads the last chunk
        columns //= 2
    return walk, tiles_of(walk, columns=columns, whole=False, elements=max(columns, TILE)), 4


def pearson(student, teacher, eps, mean_levels, zero_on_constant):
    """The op of kdkernels/losses/pearson.py: (loss, statistics)."""
    head = student[0]
    levels = [i for i, s in enumerate(student) if s.numel()]
    plans = {i: _plan(student[i], teacher[i]) for i in levels}
    body_chunks = {i: tile.body_programs // tile.groups for i, (_, tile, _) in plans.items()}
    chunks = {i: body_chunks[i] + (walk.pictures if walk.edges else 0) for i, (walk, _, _) in plans.items()}
    records = sum(chunks[i] * walk.channels for i, (walk, _, _) in plans.items())
    channels = [s.shape[1] for s in student]
    # A level without values writes neither its row of the table nor its statistics.
    new = head.new_empty if len(levels) == len(student) else head.new_zeros
    loss = head.new_empty((), dtype=torch.float32)
    statistics = new((sum(channels), 8), dtype=torch.float32)
    losses = new((sum(channels),), dtype=torch.float64)
    table = new((len(student), TABLE.value), dtype=torch.int64)
    numbers = head.new_empty((FIELDS, records), dtype=torch.float32)
    block = 128 if INTERPRETED.value else 8
    with launch_on(head):
        slot = 0
        for i, (walk, tile, warps) in plans.items():
            _forward[(tile.programs,)](
                student[i], teacher[i], numbers, table, i, records, slot, student[i].numel() // walk.channels,
                sum(channels[:i]), chunks[i], body_chunks[i], walk.residues, walk.channels, walk.pixels, walk.width,
                *tile.counts, *walk.strides,
                **walk.constants, **tile.constants, num_warps=warps, enable_fp_fusion=True,
            )  # fmt: skip
            slot += chunks[i] * walk.channels
        if levels:
            finish[(-(-max(channels) // block), len(student))](
                numbers, table, statistics, losses, eps, records, len(student),
                ZERO=zero_on_constant, MEAN=mean_levels, CHANNELS=block, CHUNKS=64, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
        _total[(1,)](losses, loss, sum(channels), BLOCK=1024, num_warps=4, enable_fp_fusion=True)
    return loss, statistics


def pearson_backward(grad_loss, student, teacher, statistics, first_channel):
    """The op of kdkernels/losses/pearson.py: one gradient per student level."""
    grads = [torch.empty_like(s) for s in student]
    for s, t, g, first in zip(student, teacher, grads, first_channel):
        if s.numel() == 0:
            continue
        walk = walk_over(s, t, g)
        steps = 8 if walk.channels_inner else 1  # to read a channel's statistics once for many pixels
        tile = tiles_of(walk, columns=256, whole=False, steps=steps)
        with launch_on(s):
            _backward[(tile.programs,)](
                s, t, g, grad_loss, statistics, first, walk.residues, walk.channels, walk.pixels, walk.width,
                *tile.counts, *walk.strides,
                **walk.constants, **tile.constants, STEPS=steps, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return grads
