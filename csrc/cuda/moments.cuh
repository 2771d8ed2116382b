// Moments of a channel's two sides from one read of it.
//
// A thread adds up powers of x and y, which are a sample of student and teacher about values near their means, and of
// d = x - slope * y, slope being near the ratio of their deviations: what the loss squares, so that nothing cancels
// where the two sides agree. Such sums are as good as their base. Whether it was good is seen when they are complete
// (improve); if it was not, the chunk is read again, from the cache, about the base that the first sums gave.
#pragma once

#include "../math/pearson.h"
#include "reduce.cuh"

KD_NAMESPACE_BEGIN

// x = scale * (s - from), the same for y.
struct Side {
  float from = 0, scale = 1, offset = 0;  // scale: a power of two; offset: scale * from

  KD_DEVICE float operator()(float value) const { return value * scale - offset; }
};
struct Base {
  Side s, t;
  float slope = 0;  // 0 where the ratio is not known: then d = x
};

KD_DEVICE float maximum_of_lanes(float value, int lanes) {
  KD_UNROLL for (int bits = warp_size / 2; bits > 0; bits /= 2) {
    if (bits < lanes) value = fmaxf(value, shuffle_xor(value, bits));
  }
  return value;
}

// Sums over some samples, and the largest |x| and |y|, which are 0 for constants and for nothing else.
struct PairSums {
  float x = 0, y = 0, xx = 0, yy = 0, dd = 0, yd = 0;
  float largest_x = 0, largest_y = 0;

  template <class F>
  KD_DEVICE void each_sum(const F& f) {
    f(x), f(y), f(xx), f(yy), f(dd), f(yd);
  }
  template <class F>
  KD_DEVICE void each_maximum(const F& f) {
    f(largest_x), f(largest_y);
  }

  // n samples as one strip: long chains of additions round more.
  template <int n>
  KD_DEVICE void add(const Base& base, const float (&s)[n], const float (&t)[n]) {
    PairSums part;
    KD_UNROLL for (int i = 0; i < n; ++i) {
      const float a = base.s(s[i]), b = base.t(t[i]), d = a - base.slope * b;
      part.x = i ? part.x + a : a;
      part.y = i ? part.y + b : b;
      part.xx = i ? part.xx + a * a : a * a;
      part.yy = i ? part.yy + b * b : b * b;
      part.dd = i ? part.dd + d * d : d * d;
      part.yd = i ? part.yd + b * d : b * d;
      largest_x = fmaxf(largest_x, fabsf(a));
      largest_y = fmaxf(largest_y, fabsf(b));
    }
    x += part.x, y += part.y, xx += part.xx, yy += part.yy, dd += part.dd, yd += part.yd;
  }

  KD_DEVICE void add(PairSums other) {
    x += other.x, y += other.y, xx += other.xx, yy += other.yy, dd += other.dd, yd += other.yd;
    largest_x = fmaxf(largest_x, other.largest_x);
    largest_y = fmaxf(largest_y, other.largest_y);
  }
};

// Whether a sum of squares is far from what float32 cannot hold.
KD_DEVICE bool in_range(float squares) { return squares > 1e-24f && squares < 1e36f; }

// The ratio of deviations, from centred sums of a few samples: only where they are close to one line through the origin
// could d cancel, and only there is the ratio of a few good for the rest.
KD_DEVICE float slope_of_sample(float xx, float yy, float xy) {
  if (!in_range(xx) || !in_range(yy) || !(xy > 0)) return 0;
  const float slope = sqrtf(xx) / sqrtf(yy);
  return (xy / xx) * (xy / yy) > 0.5f && slope > 1e-15f && slope < 1e15f ? slope : 0.0f;
}

// 2^-k for the k with 2^k <= largest < 2^(k + 1), as far as it and its inverse are ordinary floats.
KD_DEVICE float scale_for(float largest) {
  uint32_t bits;
  memcpy(&bits, &largest, 4);
  int exponent = 127 - int(bits >> 23 & 255u);
  exponent = exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
  bits = uint32_t(exponent + 127) << 23;
  float scale;
  memcpy(&scale, &bits, 4);
  return scale;
}

// The same side about a point that is `step` (in its units) further, in units of its largest value if asked.
KD_DEVICE void move(Side& side, float step, bool rescale, float largest) {
  const float from = side.from + step / side.scale;
  if (fabsf(from) < 3e38f) side.from = from;
  if (rescale && side.scale == 1.0f) side.scale = scale_for(largest);
  side.offset = side.from * side.scale;
}

// Whether the sums of `count` samples lost digits to their base; if so, makes it a better one. What is lost is in
// proportion to what cancels: the square of the mean against the variance, and the change of d's square against what
// remains of it when the slope becomes the true one.
KD_DEVICE bool improve(Base& base, const PairSums& sums, float count) {
  const float mean_x = sums.x / count, mean_y = sums.y / count, mean_d = mean_x - base.slope * mean_y;
  const float xx = sums.xx - sums.x * mean_x, yy = sums.yy - sums.y * mean_y;
  const float dd = sums.dd - count * mean_d * mean_d, yd = sums.yd - sums.y * mean_d;
  const bool flat_x = sums.largest_x == 0, flat_y = sums.largest_y == 0;
  const bool good_x = flat_x || in_range(xx), good_y = flat_y || in_range(yy);
  const float slope = flat_x || flat_y || !good_x || !good_y ? 0.0f : sqrtf(xx) / sqrtf(yy);
  const float step = slope - base.slope, change = step * (2 * yd - step * yy), rest = dd - change;
  const bool near_means = sums.x * mean_x <= 4 * xx && sums.y * mean_y <= 4 * yy;
  // Agreement to the last digits needs no more of them.
  const bool near_slope = flat_y || dd + fabsf(change) <= 8 * rest + 1e-12f * xx;
  if (good_x && good_y && near_means && near_slope) return false;
  move(base.s, mean_x, !good_x, sums.largest_x);
  move(base.t, mean_y, !good_y, sums.largest_y);
  base.slope = slope;
  return true;
}

// What a chunk of a channel leaves in the workspace: `partial_floats` floats.
constexpr int partial_floats = 12;

template <class F>
KD_DEVICE void each_of_partial(const Base& base, const PairSums& sums, float count, const F& f) {
  f(0, count), f(1, 1 / base.s.scale), f(2, 1 / base.t.scale), f(3, base.s.from), f(4, base.t.from), f(5, base.slope);
  f(6, sums.x), f(7, sums.y), f(8, sums.xx), f(9, sums.yy), f(10, sums.dd), f(11, sums.yd);
}

// A channel's moments, in double: means, and centred sums of s^2, t^2, st, and of s^2 once more, as it follows from t
// and d, to be used together with st: their roundings belong together.
struct ChannelMoments {
  double count = 0, mean_s = 0, mean_t = 0, ss = 0, tt = 0, st = 0, paired_ss = 0;

  template <class F>
  KD_DEVICE void each(const F& f) {
    f(count), f(mean_s), f(mean_t), f(ss), f(tt), f(st), f(paired_ss);
  }

  // value(k): the floats of each_of_partial.
  template <class F>
  KD_DEVICE static ChannelMoments of_partial(const F& value) {
    ChannelMoments m;
    m.count = value(0);
    if (m.count == 0) return m;
    const double unit_s = value(1), unit_t = value(2), slope = value(5), x = value(6), y = value(7);
    const double mean_x = x / m.count, mean_y = y / m.count, mean_d = mean_x - slope * mean_y;
    m.mean_s = value(3) + unit_s * mean_x;
    m.mean_t = value(4) + unit_t * mean_y;
    const double yy = value(9) - y * mean_y, dd = value(10) - m.count * mean_d * mean_d, yd = value(11) - y * mean_d;
    const double xy = yd + slope * yy;
    const double xx = value(8) - x * mean_x;
    m.ss = unit_s * unit_s * (xx < 0 ? 0 : xx);
    m.tt = unit_t * unit_t * (yy < 0 ? 0 : yy);
    m.st = unit_s * unit_t * xy;
    m.paired_ss = unit_s * unit_s * (dd + slope * (yd + xy));
    return m;
  }

  KD_DEVICE void merge(const ChannelMoments& other) {
    if (other.count == 0) return;
    const double total = count + other.count, part = other.count / total, weight = count * part;
    const double delta_s = other.mean_s - mean_s, delta_t = other.mean_t - mean_t;
    mean_s += delta_s * part;
    mean_t += delta_t * part;
    ss += other.ss + delta_s * delta_s * weight;
    tt += other.tt + delta_t * delta_t * weight;
    st += other.st + delta_s * delta_t * weight;
    paired_ss += other.paired_ss + delta_s * delta_s * weight;
    count = total;
  }
};

KD_NAMESPACE_END
