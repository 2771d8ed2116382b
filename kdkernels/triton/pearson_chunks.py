"""A channel's samples chunk by chunk, for pearson.py: what one reading of a chunk leaves, and how chunks are merged.

What one reading has to yield is sum (s^ - t^)^2, with x^ = (x - mean) * scale, before mean and scale are known, and
1 - r from the plain sums would cancel where both sides agree. So a chunk takes out a guess: with s', t' about the
chunk's own means and rho ~ sd(s') / sd(t'), it sums d = s' - rho t'. When the channel's scales a (student) and b
(teacher) are known, a s' - b t' = q d + (a - q) s' with q = b / rho: a - q is small wherever d is.
"""

import triton.language as tl

from .features import level_kernel, pixel_offsets, tile_of, tile_offsets
from .numbers import device_function, load_float32, max_over, sum_over

# A chunk's numbers: each an array over (chunk, channel) of all levels.
FIELDS = 12
_COUNT, _RHO, _SS, _TT, _DD, _SD = (tl.constexpr(i) for i in range(6))
_S, _T = tl.constexpr(6), tl.constexpr(9)  # unit, shift, rest: x = (x' + rest + shift) * unit
# A level's row of the table: first record, chunks, channels, samples per channel, first channel.
TABLE = tl.constexpr(5)


@device_function
def _unit(x):
    """The power of two below |x|, and what it is to be multiplied by to give 1. It brings |x| to [1, 2): the largest
    finite numbers to [2, 4), subnormal ones below 1.
    """
    exponent = tl.minimum(tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, 1), 253)
    return (exponent << 23).to(tl.float32, bitcast=True), ((254 - exponent) << 23).to(tl.float32, bitcast=True)


@device_function
def _centre(x, first, inside, count, AXIS: tl.constexpr):
    """A chunk's values about their mean, in units that keep squares in range: (x', unit, shift, rest).

    The first value is taken out before the mean is formed, so that equal values leave exactly 0.
    """
    unit, scale = _unit(max_over(tl.abs(x), AXIS))
    first = first * scale
    about = tl.expand_dims(first, AXIS)
    x = tl.where(inside, x * tl.expand_dims(scale, AXIS), about)
    shift = first + sum_over(x - about, AXIS) / count
    x = tl.where(inside, x - tl.expand_dims(shift, AXIS), 0.0)
    rest = sum_over(x, AXIS) / count
    return tl.where(inside, x - tl.expand_dims(rest, AXIS), 0.0), unit, shift, rest


@device_function
def sum_chunk(
    s_ptr, t_ptr, chunks_ptr, records, slot, s_start, t_start, c, channels, p, inside, first, count, width,
    s_c, s_y, s_x, t_c, t_y, t_x,
    ALIKE: tl.constexpr, INNER: tl.constexpr, MERGED: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Leaves the numbers of one chunk: pixels p that are `inside`, `count` of them from `first` on, of channels c."""
    AXIS: tl.constexpr = 0 if INNER else 1
    valid = tile_of(c < (channels // VECTOR * VECTOR if INNER else channels), inside, INNER)
    of_s = tile_offsets(s_start, c, p, width, s_c, s_y, s_x, INNER, MERGED, VECTOR)
    of_t = of_s if ALIKE else tile_offsets(t_start, c, p, width, t_c, t_y, t_x, INNER, MERGED, VECTOR)
    s = load_float32(s_ptr + of_s, valid)
    t = load_float32(t_ptr + of_t, valid)
    known = c < channels
    some = c < tl.where(count > 0, channels, 0)
    s_at = s_start + c * s_c + pixel_offsets(first, width, s_y, s_x, MERGED, False)
    t_at = t_start + c * t_c + pixel_offsets(first, width, t_y, t_x, MERGED, False)
    within = tl.expand_dims(inside, 1 - AXIS)
    samples = tl.maximum(count, 1).to(tl.float32)
    s, s_unit, s_shift, s_rest = _centre(s, load_float32(s_ptr + s_at, some), within, samples, AXIS)
    t, t_unit, t_shift, t_rest = _centre(t, load_float32(t_ptr + t_at, some), within, samples, AXIS)
    ss = sum_over(s * s, AXIS)
    tt = sum_over(t * t, AXIS)
    varies = tt > 0
    # Equal sides get exactly 1, whatever the division does.
    rho = tl.where((ss > 0) & (ss != tt), tl.sqrt(ss / tl.where(varies, tt, 1.0)), 1.0)
    d = s - tl.expand_dims(rho, AXIS) * t
    # In the order of the fields.
    to = chunks_ptr + slot + c
    tl.store(to, count.to(tl.float32), mask=known)
    to += records
    tl.store(to, tl.where(varies, rho, float("inf")), mask=known)  # then d = s', and q is 0
    to += records
    tl.store(to, ss, mask=known)
    to += records
    tl.store(to, tt, mask=known)
    to += records
    tl.store(to, sum_over(d * d, AXIS), mask=known)
    to += records
    tl.store(to, sum_over(s * d, AXIS), mask=known)
    to += records
    tl.store(to, s_unit, mask=known)
    to += records
    tl.store(to, s_shift, mask=known)
    to += records
    tl.store(to, s_rest, mask=known)
    to += records
    tl.store(to, t_unit, mask=known)
    to += records
    tl.store(to, t_shift, mask=known)
    to += records
    tl.store(to, t_rest, mask=known)


@device_function
def _field(chunks_ptr, records, field, at, mask, other):
    return tl.load(chunks_ptr + field * records + at, mask=mask, other=other).to(tl.float64)


@device_function
def _side(chunks_ptr, records, side, at, mask):
    """Of one side of chunks: their means, exactly, and the unit that their sums are counted in."""
    unit = _field(chunks_ptr, records, side, at, mask, 1.0)
    shift = _field(chunks_ptr, records, side + 1, at, mask, 0.0)
    return (shift + _field(chunks_ptr, records, side + 2, at, mask, 0.0)) * unit, unit


@device_function
def _standard(squares, samples, eps):
    """Deviation and scale of a channel, as Standard of csrc/math/pearson.h has them."""
    squares = tl.where(squares < 0, 0.0, squares)  # NaN stays
    deviation = tl.where(samples > 1, tl.sqrt(squares / tl.maximum(samples - 1, 1)), 0.0)
    divisor = deviation + eps
    return deviation, tl.where(divisor > 0, 1.0 / tl.where(divisor > 0, divisor, 1.0), deviation)


@level_kernel
def finish(
    chunks_ptr, table_ptr, statistics_ptr, losses_ptr, eps, records, levels,
    ZERO: tl.constexpr, MEAN: tl.constexpr, CHANNELS: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """A few channels of one level: merges their chunks in float64."""
    records = records.to(tl.int64)
    row = table_ptr + TABLE * tl.program_id(1).to(tl.int64)
    slot, chunks, channels = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    samples, first_channel = tl.load(row + 3).to(tl.float64), tl.load(row + 4)
    first = tl.program_id(0).to(tl.int64) * CHANNELS
    c = first + tl.arange(0, CHANNELS)
    known = c < channels
    if first < channels:
        # Chunks' means are counted from the first chunk's: a constant channel leaves exactly 0.
        s_first, _ = _side(chunks_ptr, records, _S, slot + c, known)
        t_first, _ = _side(chunks_ptr, records, _T, slot + c, known)
        s_sum = tl.full([CHUNKS, CHANNELS], 0.0, tl.float64)
        t_sum = tl.full([CHUNKS, CHANNELS], 0.0, tl.float64)
        s_squares = tl.full([CHUNKS, CHANNELS], 0.0, tl.float64)
        t_squares = tl.full([CHUNKS, CHANNELS], 0.0, tl.float64)
        for start in range(0, chunks, CHUNKS):
            k = start + tl.arange(0, CHUNKS)
            at = slot + k[:, None] * channels + c[None, :]
            mask = (k < chunks)[:, None] & known[None, :]
            n = _field(chunks_ptr, records, _COUNT, at, mask, 0.0)
            s, s_unit = _side(chunks_ptr, records, _S, at, mask)
            t, t_unit = _side(chunks_ptr, records, _T, at, mask)
            s -= s_first[None, :]
            t -= t_first[None, :]
            s_sum += n * s
            t_sum += n * t
            s_squares += _field(chunks_ptr, records, _SS, at, mask, 0.0) * s_unit * s_unit + n * s * s
            t_squares += _field(chunks_ptr, records, _TT, at, mask, 0.0) * t_unit * t_unit + n * t * t
        s_mean = sum_over(s_sum, 0) / samples
        t_mean = sum_over(t_sum, 0) / samples
        s_deviation, a = _standard(sum_over(s_squares, 0) - samples * s_mean * s_mean, samples, eps)
        _, b = _standard(sum_over(t_squares, 0) - samples * t_mean * t_mean, samples, eps)

        # u = sum (s^ - t^)^2, v = sum s^ (s^ - t^); cross terms vanish, as s' and t' add up to 0 in each chunk.
        u = tl.full([CHUNKS, CHANNELS], 0.0, tl.float64)
        v = tl.full([CHUNKS, CHANNELS], 0.0, tl.float64)
        for start in range(0, chunks, CHUNKS):
            k = start + tl.arange(0, CHUNKS)
            at = slot + k[:, None] * channels + c[None, :]
            mask = (k < chunks)[:, None] & known[None, :]
            n = _field(chunks_ptr, records, _COUNT, at, mask, 0.0)
            s, s_unit = _side(chunks_ptr, records, _S, at, mask)
            t, t_unit = _side(chunks_ptr, records, _T, at, mask)
            s = (s - (s_first + s_mean)[None, :]) * a[None, :]
            t = (t - (t_first + t_mean)[None, :]) * b[None, :]
            here = a[None, :] * s_unit
            q = b[None, :] * t_unit / _field(chunks_ptr, records, _RHO, at, mask, 1.0)
            ss = _field(chunks_ptr, records, _SS, at, mask, 0.0)
            dd = _field(chunks_ptr, records, _DD, at, mask, 0.0)
            sd = _field(chunks_ptr, records, _SD, at, mask, 0.0)
            u += q * q * dd + 2 * q * (here - q) * sd + (here - q) * (here - q) * ss + n * (s - t) * (s - t)
            v += here * (q * sd + (here - q) * ss) + n * s * (s - t)
        sum_u = sum_over(u, 0)
        sum_u = tl.where(sum_u < 0, 0.0, sum_u)
        share = 1.0 / (channels.to(tl.float64) * samples * (levels if MEAN else 1))

        # ChannelGradient of csrc/math/pearson.h.
        flat = s_deviation == 0
        kappa = sum_over(v, 0) / tl.where(flat, 1.0, a * (samples - 1) * s_deviation)
        s_factor = tl.where(flat, 0.0, share * (1 - kappa) * a)
        t_factor = tl.where(flat, 0.0, share * a) if ZERO else share * a
        s_factor, t_factor = tl.where(samples < 2, 0.0, s_factor), tl.where(samples < 2, 0.0, t_factor)
        s_middle, t_middle = s_first + s_mean, t_first + t_mean
        s_shift, t_shift = s_middle.to(tl.float32), t_middle.to(tl.float32)
        to = statistics_ptr + (first_channel + c) * 8
        tl.store(to, s_shift, mask=known)
        tl.store(to + 1, (s_middle - s_shift.to(tl.float64)).to(tl.float32), mask=known)
        tl.store(to + 2, a.to(tl.float32), mask=known)
        tl.store(to + 3, s_factor.to(tl.float32), mask=known)
        tl.store(to + 4, t_shift, mask=known)
        tl.store(to + 5, (t_middle - t_shift.to(tl.float64)).to(tl.float32), mask=known)
        tl.store(to + 6, b.to(tl.float32), mask=known)
        tl.store(to + 7, t_factor.to(tl.float32), mask=known)
        tl.store(losses_ptr + first_channel + c, tl.where(samples < 2, 0.0, 0.5 * share * sum_u), mask=known)
