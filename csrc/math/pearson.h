// PKD's loss of one channel with m samples: 1 / (2 C m) sum_i (s^_i - t^_i)^2, x^ = (x - mean) / (sd + eps), sd
// unbiased.
//
// Moments are taken about the channel's first value and merged chunk by chunk, so a mean that dwarfs the deviation
// costs no digits and a constant channel has variance exactly 0. The loss is a sum of squared differences, not 1 - r,
// which would cancel when student and teacher agree.
#pragma once

#include "number.h"

KD_NAMESPACE_BEGIN

// Count, mean and centred sum of squares of one side, about a shift that the caller keeps.
struct Moments {
  double count = 0, mean = 0, squares = 0;

  KD_HD void merge(double n, double chunk_mean, double chunk_squares) {
    if (n == 0) return;
    const double total = count + n, delta = chunk_mean - mean;
    mean += delta * (n / total);
    squares += chunk_squares + delta * delta * (count * n / total);
    count = total;
  }
};

// Standardises x as ((x - shift) - rest) * scale. The mean is shift + rest, shift being its nearest A: the two
// subtractions keep the digits that one rounded mean would lose.
template <class A>
struct Standard {
  A shift, rest;
  double deviation, scale;

  KD_HD Standard(A first, const Moments& m, double eps) {
    const double center = double(first) + m.mean;
    shift = A(center);
    rest = A(center - double(shift));
    deviation = m.count > 1 ? sqrt(m.squares / (m.count - 1)) : 0;
    // A constant channel standardises to 0 even where eps is 0.
    scale = deviation + eps > 0 ? 1 / (deviation + eps) : (deviation == 0 ? 0 : NAN);
  }

  template <class V>
  KD_HD V centred(V x) const {
    return (x - shift) - rest;
  }
};

// v = sum s^ (s^ - t^), u = sum (s^ - t^)^2.
struct DifferenceSums {
  double u = 0, v = 0;
};

// The sums as they would be with the scales in double. Elements are scaled by A's nearest, off by factors a and b,
// which a gradient that cancels would show; sum s^2 is known from the moments, so they can be taken out again.
template <class A>
KD_HD DifferenceSums with_exact_scales(const DifferenceSums& sums, const Standard<A>& s, const Standard<A>& t,
                                       double m) {
  const double a = s.scale > 0 ? double(A(s.scale)) / s.scale : 1, b = t.scale > 0 ? double(A(t.scale)) / t.scale : 1;
  const double spread_s = s.deviation * s.scale, spread_t = t.deviation * t.scale;
  const double more_s = (m - 1) * spread_s * spread_s * (1 - a / b);
  const double more_t = (m - 1) * spread_t * spread_t * (1 - b / a);
  DifferenceSums exact;
  const double u = sums.u / (a * b) + (more_s + more_t);
  exact.u = u < 0 ? 0 : u;
  exact.v = sums.v / (a * b) + more_s;
  return exact;
}

// gradient_i = student_factor * s^_i - teacher_factor * t^_i, from v = sum s^ (s^ - t^). `share` is
// 1 / (C m), times the level's share of the loss. The student's factor is (1 - kappa) / (C m d_s) with
// kappa = d_s v / ((m - 1) sd_s).
struct ChannelGradient {
  double student_factor, teacher_factor;

  template <class A>
  KD_HD ChannelGradient(const Standard<A>& s, double m, double v, double share, bool zero_on_constant) {
    if (m < 2) {
      student_factor = teacher_factor = 0;
    } else if (s.deviation == 0) {
      student_factor = 0;
      teacher_factor = zero_on_constant ? 0 : share * s.scale;
    } else {
      const double kappa = v / (s.scale * (m - 1) * s.deviation);
      student_factor = share * (1 - kappa) * s.scale;
      teacher_factor = share * s.scale;
    }
  }
};

KD_NAMESPACE_END
