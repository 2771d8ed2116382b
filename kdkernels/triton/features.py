"""How the feature losses' Triton kernels walk over one pyramid level, without a copy whatever its layout is.

A program takes tiles of channels x pixels of one picture. Rows of a tile are channels and columns pixels (planes), or,
where the student's channels are innermost, rows are pixels and columns channels (`channels_inner`).

Vector loads need aligned addresses, and a plane of odd size starts anywhere. Planes whose channels differ by a multiple
of `vector` start alike, though: a program takes channels of one such residue class, skips the `lead` pixels up to the
next aligned address, and reads whole vectors from there (the body). The few pixels before and behind it, fewer than 16,
are the edges: programs of their own take them, for many channels at once.
"""

import contextlib
import inspect
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .numbers import INTERPRETED, device_function

EDGE = tl.constexpr(16)
_PEEL_FROM = 64  # pixels of a plane; below, there is little body to gain

# Elements of a tile. In the interpreter an operation costs the same for any small tile, so there are few of them.
TILE = 16384 if INTERPRETED.value else 2048
# Programs of a launch, where there is enough to share out: several for each multiprocessor of a large GPU.
_PROGRAMS = 1 if INTERPRETED.value else 1024


def level_kernel(function):
    """triton.jit of a kernel, compiled once per layout and not once per size: numbers are not specialised. Names of
    pointers end in _ptr.
    """
    parameters = inspect.signature(function).parameters.values()
    numbers = [p.name for p in parameters if p.annotation is not tl.constexpr and not p.name.endswith("_ptr")]
    return triton.jit(function, do_not_specialize=numbers)


def launch_on(x: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else contextlib.nullcontext()


def power_of_two(x: int, *, least: int = 1, most: int = 1 << 30) -> int:
    """The smallest power of two that is not below x, between `least` and `most`."""
    return max(least, min(most, triton.next_power_of_2(max(1, x))))


def pixel_strides(x: Tensor) -> tuple[int, int]:
    """Strides of y and x, with those of a dimension of one chosen so that neighbours merge."""
    _, _, h, w = x.shape
    y_stride, x_stride = x.stride(2), x.stride(3)
    if h == w == 1:
        return x.stride(0), x.stride(0)
    if w == 1:
        return y_stride, y_stride
    return (w * x_stride if h == 1 else y_stride), x_stride


@dataclass(frozen=True)
class Walk:
    """The walk over one level: sizes, (n, c, y, x) strides per tensor, and what is known of the layout."""

    pictures: int
    channels: int
    pixels: int
    width: int
    strides: tuple[int, ...]  # four per tensor
    channels_inner: bool
    merged: bool  # y and x are one dimension of stride x
    vector: int  # rows start at multiples of this many elements, which follow each other; 1: nothing is promised
    residues: int  # classes of channels whose planes start alike
    edges: bool

    @property
    def constants(self) -> dict[str, bool | int]:
        """Of the layout, what a kernel is compiled for."""
        return {
            "ALIKE": self.strides == self.strides[:4] * (len(self.strides) // 4),
            "INNER": self.channels_inner,
            "MERGED": self.merged,
            "VECTOR": self.vector,
        }


def walk_over(*tensors: Tensor) -> Walk:
    """The walk over student, teacher and, in a backward, gradient; all (N, C, H, W) with at least one pixel."""
    student = tensors[0]
    n, c, h, w = student.shape
    pixels = h * w
    strides = [(x.stride(0) if n > 1 else 0, x.stride(1) if c > 1 else 0, *pixel_strides(x)) for x in tensors]
    inner = student.stride(1) == 1 and (strides[0][3] != 1 or pixels == 1)
    merged = all(y_stride == w * x_stride for _, _, y_stride, x_stride in strides)
    if inner and merged and n * pixels < 1 << 31 and all(s[0] == pixels * s[3] or n == 1 for s in strides):
        strides = [(0, s[1], pixels * n * s[3], s[3]) for s in strides]
        n, pixels = 1, n * pixels

    # 16 bytes; in the interpreter, where any number is as fast, one that makes few residue classes.
    wide = 2 if INTERPRETED.value else 16 // min(x.element_size() for x in tensors)

    def known(*values: int) -> bool:
        return all(value % wide == 0 for value in values)

    vector, residues, edges = 1, 1, False
    if inner:
        if all(x.stride(1) == 1 or c == 1 for x in tensors) and known(c, *(v for s in strides for v in (s[0], *s[2:]))):
            vector = wide
    elif merged and all(s[3] == 1 for s in strides):
        starts = [(s[0] % wide, s[1] % wide) for s in strides]
        if all(start == (0, 0) for start in starts):
            edges = not known(pixels)
            vector = wide if pixels >= _PEEL_FROM or not edges else 1
        elif pixels >= _PEEL_FROM and all(start == starts[0] for start in starts):
            vector, residues, edges = wide, wide, True
    return Walk(
        pictures=n,
        channels=c,
        pixels=pixels,
        width=w,
        strides=tuple(v for s in strides for v in s),
        channels_inner=inner,
        merged=merged,
        vector=vector,
        residues=residues,
        edges=edges and vector > 1,
    )


@dataclass(frozen=True)
class Tiles:
    """A level cut into tiles, and the channels shared out in groups: the programs of one launch.

    Body programs come first: (picture, group, tile of pixels), the tile varying fastest. Then, with edges, one program
    per (picture, edge group).
    """

    channel_block: int
    pixel_block: int
    edge_block: int
    tiles: int  # of a picture and group
    groups: int
    edge_groups: int
    body_programs: int
    programs: int

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """What a program needs to know its place: tiles, groups, edge_groups, edges_from."""
        return self.tiles, self.groups, self.edge_groups, self.body_programs

    @property
    def constants(self) -> dict[str, int]:
        return {
            "CHANNELS": self.channel_block,
            "PIXELS": self.pixel_block,
            "EDGE_CHANNELS": self.edge_block,
            "EDGES": self.edge_groups > 0,
        }


def tiles_of(walk: Walk, *, columns: int, whole: bool, elements: int = TILE, steps: int = 1) -> Tiles:
    """Tiles of at most `columns` columns and `elements` elements; a program takes `steps` of them one after another.

    With `whole`, it takes them for all channels of its group, block after block; else a group is one block of channels.
    """
    if walk.channels_inner:
        channels = power_of_two(walk.channels, most=columns)
        pixels = power_of_two(walk.pixels, most=elements // channels)
        edge, classes = 1, -(-walk.channels // channels)
    else:
        each = -(-walk.channels // walk.residues)
        pixels = power_of_two(walk.pixels, most=columns)
        channels = power_of_two(each, most=elements // pixels)
        edge, classes = power_of_two(each, most=elements // EDGE.value), -(-each // channels)
    tiles = -(-walk.pixels // (pixels * steps))
    share = classes
    if whole:  # the fewest groups that give enough programs
        share = 1
        while share * 2 <= classes and walk.pictures * tiles * walk.residues * share < _PROGRAMS:
            share *= 2
    groups = walk.residues * max(1, share)
    edge_groups = 0
    if walk.edges:
        edge_groups = walk.residues * (1 if whole else -(-each // edge))
    body = walk.pictures * tiles * groups
    return Tiles(channels, pixels, edge, tiles, groups, edge_groups, body, body + walk.pictures * edge_groups)


# Indices are 64-bit once program numbers are taken apart: for offsets beyond 2^31, and since the interpreter checks
# each 32-bit sum for overflow, at ten times its cost.


@device_function
def _body_bounds(n, group, pixels, s_n, s_c, INNER: tl.constexpr, VECTOR: tl.constexpr):
    """The pixels before the body of this picture's planes, and how many the body has."""
    if INNER or VECTOR == 1:
        lead = group * 0
        body = pixels - lead
    else:  # alike for every channel of the group, and for all tensors
        lead = -(n * s_n + group * s_c) & (VECTOR - 1)
        body = (pixels - lead) // VECTOR * VECTOR
    return lead, body


@device_function
def body_program(program, tiles, groups, pixels, s_n, s_c, INNER: tl.constexpr, VECTOR: tl.constexpr):
    """Picture, group, tile, lead and body of a body program."""
    n = (program // tiles // groups).to(tl.int64)
    group = (program // tiles % groups).to(tl.int64)
    lead, body = _body_bounds(n, group, pixels, s_n, s_c, INNER, VECTOR)
    return n, group, (program % tiles).to(tl.int64), lead, body


@device_function
def edge_program(program, groups, pixels, s_n, s_c, VECTOR: tl.constexpr):
    """Picture, group and pixels of an edge program (before the body, behind it, then some past the end); the first
    pixel, and how many there are.
    """
    n = (program // groups).to(tl.int64)
    group = (program % groups).to(tl.int64)
    lead, body = _body_bounds(n, group, pixels, s_n, s_c, False, VECTOR)
    e = tl.arange(0, EDGE)
    return n, group, tl.where(e < lead, e, body + e), tl.where(lead > 0, 0, body), pixels - body


@device_function
def pixel_offsets(p, width, stride_y, stride_x, MERGED: tl.constexpr, UNIT: tl.constexpr):
    """Offsets of pixels p from a plane's first."""
    if UNIT:
        offsets = p
    elif MERGED:
        offsets = p * stride_x
    else:
        p = p.to(tl.int32)  # division is slow, and there are fewer than 2^31
        offsets = (p // width).to(tl.int64) * stride_y + (p % width).to(tl.int64) * stride_x
    return offsets


@device_function
def tile_offsets(
    start, c, p, width, stride_c, stride_y, stride_x, INNER: tl.constexpr, MERGED: tl.constexpr, VECTOR: tl.constexpr
):
    """Offsets of the tile of channels c and pixels p, from offset `start`; rows begin at multiples of VECTOR."""
    if INNER:
        rows = start + pixel_offsets(p, width, stride_y, stride_x, MERGED, False)
        columns = c if VECTOR > 1 else c * stride_c
    else:
        rows = start + c * stride_c
        columns = pixel_offsets(p, width, stride_y, stride_x, MERGED, VECTOR > 1)
    if VECTOR > 1:
        rows = rows // VECTOR * VECTOR  # changes nothing, but is a multiple by its form; AMD's compiler drops hints
    return rows[:, None] + columns[None, :]


@device_function
def tile_of(by_channel, by_pixel, INNER: tl.constexpr):
    """Both conditions at once, over the tile."""
    if INNER:
        both = by_pixel[:, None] & by_channel[None, :]
    else:
        both = by_channel[:, None] & by_pixel[None, :]
    return both
