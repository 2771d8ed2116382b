"""What the Triton kernels of the row losses share: rows of any layout, two ways to walk them, and their reductions.

Rows of up to `TILE_COLUMNS` values are taken several at a time, each whole, as a tile of strips [rows, columns]: a row
is read once and stays in the registers of a few lanes. Wider rows have a program each, which walks over them in steps
of LANES x VEC columns; every lane keeps sums of its own, so nothing is exchanged before the row's end. A walk has two
loops: over the columns from the first 16-byte boundary of the student's row on, without a mask, in 16-byte accesses;
and over what is left at both ends, masked. Strided columns are walked by the second loop alone.

Wide accesses need columns that begin alike in every operand: rows of the same odd width do, a teacher sliced at
another column does not (it is read by single values, the student still in 16 bytes). Tiles of an odd width are
moved by single values, neighbours by neighbouring threads.

Each row kernel writes one value per row, or one partial sum per program; `finish` adds the partial sums in order.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..losses.arguments import MEAN_OF_ELEMENTS, NONE, SUM
from .numbers import INTERPRETED, device_function, store_rounded, sum_over, to_float32

TILE_COLUMNS = 2048
WARP = 64 if torch.version.hip else 32
COUNTERS = tl.constexpr(64)


class Operand(NamedTuple):
    """Rows of one tensor: element (r, c) is `data[lead + offset of r + c * column]`, and data begins at 16 bytes.

    `strides` belong to the leading dimensions as `rows_of` merges them, the innermost first.
    """

    data: Tensor
    lead: int
    column: int
    strides: tuple[int, ...]


class Rows(NamedTuple):
    """Tensors of one shape (..., C) as a kernel takes them. `other` is what else the kernel reads or writes by rows."""

    columns: int
    sizes: tuple[int, ...]  # the merged leading dimensions but the outermost, the innermost first
    student: Operand
    teacher: Operand
    other: Operand | None


class Scale(NamedTuple):
    """What a row's value is multiplied by: `factor`, over `average` and times the row's `weight` where they are given.

    An average that is not positive gives 0.
    """

    factor: float
    average: Tensor | None
    weight: Tensor | None


def rows_of(student: Tensor, teacher: Tensor, other: Tensor | None = None) -> Rows:
    """Any strides, any number of leading dimensions, which are merged where all strides allow it."""
    tensors = [student, teacher] if other is None else [student, teacher, other]
    *leading, columns = student.shape
    merged: list[tuple[int, list[int]]] = []
    for i, size in enumerate(leading):
        strides = [x.stride(i) for x in tensors]
        if size == 1:
            continue
        if merged and all(outer == size * inner for outer, inner in zip(merged[-1][1], strides)):
            merged[-1] = (merged[-1][0] * size, strides)
        else:
            merged.append((size, strides))
    if not merged:
        merged.append((1, [columns] * len(tensors)))
    merged.reverse()
    operands = []
    for i, x in enumerate(tensors):
        data, lead = x, x.data_ptr() % 16 // x.element_size()
        if lead > x.storage_offset():  # the storage itself is not aligned
            lead = 0
        if lead:
            data = x.as_strided((1,), (1,), x.storage_offset() - lead)
        column = x.stride(-1) if columns > 1 else 1
        operands.append(Operand(data, lead, column, tuple(strides[i] for _, strides in merged)))
    sizes = tuple(size for size, _ in merged[:-1])
    return Rows(columns, sizes, operands[0], operands[1], operands[2] if len(operands) > 2 else None)


def launch(rows: Rows, count: int, tile: Any, walk: Any) -> tuple[Any, int, dict[str, Any]]:
    """Which of two kernels serves `count` rows of this width, in how many programs, and its constants."""
    operands = [x for x in (rows.student, rows.teacher, rows.other) if x is not None]
    begins = [(x.lead, *x.strides) for x in operands]
    unit = all(x.column == 1 for x in operands)
    size = rows.student.data.element_size()
    if rows.columns > TILE_COLUMNS:
        vector = 16 // size
        aligned = tuple(all((m - n) % vector == 0 for m, n in zip(x, begins[0])) for x in begins)
        lanes = 512 if INTERPRETED.value else 256
        constants = {"LANES": lanes, "VEC": vector, "UNIT": unit, "ALIGNED": aligned, "num_warps": 256 // WARP}
        return walk, count, {**constants, "enable_fp_fusion": True}
    common = 1  # a power of two that divides the width and where every row begins
    if unit:
        common = math.gcd(16, rows.columns, *(n for x in begins for n in x))
    vector = min(common, 16 // size)
    width = triton.next_power_of_2(rows.columns)
    # A thread has up to 32 values of a row; as few lanes share it as then can, and as take 32 bytes, a sector, at once.
    lanes = max(triton.next_power_of_2(triton.cdiv(rows.columns, 32)), triton.cdiv(32, vector * size))
    chunk = min(width, lanes * vector)
    height = max(1, 128 * vector // chunk)
    if INTERPRETED.value:  # it pays per operation, not per element
        chunk, height = width, max(1, 16384 // width)
    strips = triton.cdiv(rows.columns, chunk)
    constants = {"ROWS": height, "CHUNK": chunk, "STRIPS": strips, "COMMON": common, "num_warps": 128 // WARP}
    return tile, triton.cdiv(count, height), {**constants, "enable_fp_fusion": True}


def on(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches inside the block go to the device of `x`."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def scale_of(
    reduction: int, counted: int, columns: int, average: float | None, tensor: Tensor | None, weight: Tensor | None
) -> Scale:
    """csrc/cpu/row_options.h: RowReduction, for `counted` rows."""
    if reduction in (NONE, SUM):
        return Scale(1.0, None, weight)
    classes = columns if reduction == MEAN_OF_ELEMENTS else 1
    if tensor is not None:
        return Scale(1.0 / classes, tensor, weight)
    divisor = (counted if average is None else average) * classes
    return Scale(1.0 / divisor if divisor > 0 else 0.0, None, weight)


class Result:
    """A forward's outputs: the loss, the statistics, and where the row kernels put values or partial sums."""

    def __init__(self, student: Tensor, rows: int, reduction: int, per_row: int, programs: int):
        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=student.device)

        self.keep = reduction == NONE
        self.loss = empty(*student.shape[:-1]) if self.keep else empty()
        self.statistics = empty(rows, per_row)
        self.programs = programs
        self.values = self.loss if self.keep or programs == 1 else empty(programs)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Adds up the partial sums, where there are several."""
        if self.programs == 0 and not self.keep:
            self.loss.zero_()
        elif self.values is not self.loss:
            finish[(1,)](self.values, self.loss, self.programs, BLOCK=4096, num_warps=8, enable_fp_fusion=True)
        return self.loss, self.statistics


@triton.jit(do_not_specialize=["count"])
def finish(partial, loss, count, BLOCK: tl.constexpr):
    """loss = the sum of partial[:count], in one order, in float64."""
    lane = tl.arange(0, BLOCK)
    total = tl.full([BLOCK], 0, tl.float64)
    for i in range(0, count, BLOCK):
        total += tl.load(partial + i + lane, mask=i + lane < count, other=0.0).to(tl.float64)
    tl.store(loss, sum_over(total, 0).to(tl.float32))


def count_rows(values: Tensor, unlike: int) -> tuple[Tensor, int]:
    """How many of the values differ from `unlike`, as parts that `counted` adds up; and the number of parts."""
    parts = min(COUNTERS.value, triton.cdiv(values.numel(), 4096))
    counts = torch.empty(parts, dtype=torch.int32, device=values.device)
    span = triton.cdiv(triton.cdiv(values.numel(), parts), 4096) * 4096
    with on(values):
        count[(parts,)](values, unlike, counts, values.numel(), span, BLOCK=4096, num_warps=8, enable_fp_fusion=True)
    return counts, parts


@triton.jit(do_not_specialize=["unlike", "rows", "span"])
def count(values, unlike, counts, rows, span, BLOCK: tl.constexpr):
    """counts[program] = the number of values in its span that differ from `unlike`."""
    program = tl.program_id(0)
    begin = program.to(tl.int64) * span
    lane = tl.arange(0, BLOCK)
    found = tl.full([BLOCK], 0, tl.int32)
    for i in range(0, span, BLOCK):
        at = begin + i + lane
        inside = at < rows
        found += (inside & (tl.load(values + at, mask=inside, other=0) != unlike)).to(tl.int32)
    tl.store(counts + program, sum_over(found, 0))


@device_function
def counted(counts, parts):
    """The number that `count_rows` found, as float32."""
    lane = tl.arange(0, COUNTERS)
    return sum_over(tl.load(counts + lane, mask=lane < parts, other=0), 0).to(tl.float32)


@device_function
def row_scale(scale, row, live):
    """`scale` of each row; 0 for a row that is not live, whose weight is not read."""
    value = row.to(tl.float32) * 0.0 + scale.factor
    if scale.average is not None:
        average = tl.load(scale.average)
        value = tl.where(average <= 0.0, 0.0, value / average)
    if scale.weight is not None:
        value *= tl.load(scale.weight + row, mask=live, other=0.0)
    return value


@device_function
def put_values(values, value, row, live, KEEP: tl.constexpr):
    """A tile's values: each row's own, or their sum as the program's part."""
    if KEEP:
        tl.store(values + row, value, mask=live)
    else:
        tl.store(values + tl.program_id(0), sum_over(tl.where(live, value, 0.0), 0))


@device_function
def row_offset(operand, row, sizes):
    """Where rows begin, in elements behind the first; int64 as `row` is."""
    offset = row * 0
    rest = row
    for d in tl.static_range(len(sizes)):
        offset += rest % sizes[d] * operand.strides[d]
        rest = rest // sizes[d]
    return offset + rest * operand.strides[len(sizes)]


@device_function
def row_start(operand, row, sizes):
    """Where rows begin, in elements from `operand.data`."""
    return operand.lead + row_offset(operand, row, sizes)


# Tiles: ROWS whole rows in strips of CHUNK columns.


@device_function
def tile_rows(count, ROWS: tl.constexpr):
    """(a program's rows, which of them there are)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row, row < count


@device_function
def tile_start(operand, row, sizes, COMMON: tl.constexpr):
    """Where a tile's rows begin: multiples of COMMON, all of them."""
    # The sum is formed here: what is said of a call's result is lost where the call is inlined.
    return tl.multiple_of(operand.lead + row_offset(operand, row, sizes), COMMON)


@device_function
def tile_starts(rows, row, COMMON: tl.constexpr):
    """Where student's and teacher's rows begin."""
    return tile_start(rows.student, row, rows.sizes, COMMON), tile_start(rows.teacher, row, rows.sizes, COMMON)


@device_function
def tile_pair(rows, starts, column, live, fill, COMMON: tl.constexpr):
    """(s, t): one strip of both sides; `fill` beyond the rows."""
    inside = tile_mask(live, column, rows.columns, COMMON)
    s = tl.load(tile_at(rows.student, starts[0], column), mask=inside, other=fill)
    t = tl.load(tile_at(rows.teacher, starts[1], column), mask=inside, other=fill)
    return to_float32(s), to_float32(t)


@device_function
def tile_put(rows, start, column, live, x, COMMON: tl.constexpr):
    """Puts one strip of `rows.other`."""
    store_rounded(tile_at(rows.other, start, column), x, tile_mask(live, column, rows.columns, COMMON))


@device_function
def tile_at(operand, start, column):
    return operand.data + (start[:, None] + column.to(tl.int64)[None, :] * operand.column)


@device_function
def tile_mask(live, column, columns, COMMON: tl.constexpr):
    """Which of a strip's places are a row's. The product tells the compiler that COMMON neighbours agree."""
    return live[:, None] & (column < columns // COMMON * COMMON)[None, :]


# Walks over one wide row. `index` counts the columns of the main loop (MAIN), or those that it leaves out.


@device_function
def walk_begin(rows, row, width, LANES: tl.constexpr, VEC: tl.constexpr, UNIT: tl.constexpr):
    """(where student and teacher begin, columns before the student's first 16-byte boundary, columns in the main loop),
    for a walk over `width` columns.
    """
    start_s, start_t = row_start(rows.student, row, rows.sizes), row_start(rows.teacher, row, rows.sizes)
    head, main = 0, 0
    if UNIT:
        head = ((VEC - start_s % VEC) % VEC).to(tl.int32)
        main = (width - head) // (LANES * VEC) * (LANES * VEC)
    return start_s, start_t, head, main


@device_function
def walk_lanes(LANES: tl.constexpr, VEC: tl.constexpr):
    """The first step's indices: VEC neighbours for each lane."""
    return tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]


@device_function
def walk_column(begin, index, MAIN: tl.constexpr):
    """The columns of a step."""
    if MAIN:
        column = begin[2] + index
    else:
        column = tl.where(index < begin[2], index, index + begin[3]).to(tl.int64)
    return column


@device_function
def walk_at(operand, start, begin, index, VEC: tl.constexpr, ALIGNED: tl.constexpr, MAIN: tl.constexpr):
    """The addresses of a step."""
    if MAIN:
        start += begin[2]
        if ALIGNED:
            start = tl.multiple_of(start, VEC)
        at = operand.data + start + index
    else:
        at = operand.data + (start + walk_column(begin, index, MAIN) * operand.column)
    return at


@device_function
def walk_pair(rows, begin, index, fill, VEC: tl.constexpr, ALIGNED: tl.constexpr, MAIN: tl.constexpr):
    """(s, t): one step of both sides; `fill` beyond the row."""
    at_s = walk_at(rows.student, begin[0], begin, index, VEC, ALIGNED[0], MAIN)
    at_t = walk_at(rows.teacher, begin[1], begin, index, VEC, ALIGNED[1], MAIN)
    if MAIN:
        s, t = tl.load(at_s), tl.load(at_t)
    else:
        inside = walk_column(begin, index, MAIN) < rows.columns
        s, t = tl.load(at_s, mask=inside, other=fill), tl.load(at_t, mask=inside, other=fill)
    return to_float32(s), to_float32(t)


@device_function
def walk_put(rows, start, begin, index, x, VEC: tl.constexpr, ALIGNED: tl.constexpr, MAIN: tl.constexpr):
    """Puts one step of `rows.other`, whose row begins at `start`."""
    at = walk_at(rows.other, start, begin, index, VEC, ALIGNED[2], MAIN)
    if MAIN:
        store_rounded(at, x, None)
    else:
        store_rounded(at, x, walk_column(begin, index, MAIN) < rows.columns)


# Numbers.


@device_function
def exp_remainder(u):
    """exp(u) - 1 - u for |u| <= 1, by its series: relative error of a rounding, where the plain difference cancels."""
    p = u * (1.0 / 39916800) + 1.0 / 3628800
    p = p * u + 1.0 / 362880
    p = p * u + 1.0 / 40320
    p = p * u + 1.0 / 5040
    p = p * u + 1.0 / 720
    p = p * u + 1.0 / 120
    p = p * u + 1.0 / 24
    p = p * u + 1.0 / 6
    p = p * u + 0.5
    return p * u * u
