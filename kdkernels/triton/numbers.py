"""How every Triton kernel reads, rounds and adds up numbers.

On a GPU these are plain casts and reductions. Triton's interpreter cuts float32 off to bfloat16 instead of rounding,
and reads subnormal bfloat16 wrongly, so there the same is done on the bits. The choice is made once, at import, as
Triton makes its own.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


def device_function(function):
    """A function that kernels call: triton.jit of it. In the interpreter it stays plain Python, which does the same:
    there a call of a jitted function costs half a millisecond, tl.sum, tl.max, tl.zeros and tl.cdiv included.
    """
    return function if INTERPRETED.value else triton.jit(function)


@device_function
def to_float32(x):
    """float32, bfloat16 or float16 as float32: exact."""
    if INTERPRETED:
        if x.dtype == tl.bfloat16:
            return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@device_function
def round_to(x, dtype: tl.constexpr):
    """float32 x in `dtype`, rounded to the nearest, ties to even; infinity beyond its range, and NaN stays NaN."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
            return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@device_function
def load_float32(pointer, mask):
    """What `pointer` names as float32, 0 where `mask` is false."""
    return to_float32(tl.load(pointer, mask=mask, other=0.0))


@device_function
def store_rounded(pointer, x, mask):
    """Stores float32 x in the dtype that `pointer` points to."""
    tl.store(pointer, round_to(x, pointer.dtype.element_ty), mask=mask)


@device_function
def sum_over(x, axis: tl.constexpr):
    """tl.sum."""
    if INTERPRETED:
        if axis == 0 and len(x.shape) == 2 and x.shape[0] > 16:  # numpy adds up columns one by one; a GPU makes a tree
            x = tl.reduce(tl.reshape(x, (x.shape[0] // 16, 16, x.shape[1])), 1, tl.standard._sum_combine)
        return tl.reduce(x, axis, tl.standard._sum_combine)
    return tl.sum(x, axis)


@device_function
def max_over(x, axis: tl.constexpr):
    """tl.max. Whether NaN is passed on is undefined."""
    if INTERPRETED:
        return tl.reduce(x, axis, tl.standard._elementwise_max)
    return tl.max(x, axis)
