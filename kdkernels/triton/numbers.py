"""How every Triton kernel reads and rounds single numbers.

On a GPU these are plain casts. Triton's interpreter cuts float32 off to bfloat16 instead of rounding, and reads
subnormal bfloat16 wrongly, so there the same is done on the bits. The choice is made once, at import, as Triton makes
its own.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def to_float32(x):
    """float32, bfloat16 or float16 as float32: exact."""
    if INTERPRETED:
        if x.dtype == tl.bfloat16:
            return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """float32 x in `dtype`, rounded to the nearest, ties to even; infinity beyond its range, and NaN stays NaN."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True)
            bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
            return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@triton.jit
def load_float32(pointer, mask):
    """What `pointer` names as float32, 0 where `mask` is false."""
    return to_float32(tl.load(pointer, mask=mask, other=0.0))


@triton.jit
def store_rounded(pointer, x, mask):
    """Stores float32 x in the dtype that `pointer` points to."""
    tl.store(pointer, round_to(x, pointer.dtype.element_ty), mask=mask)
