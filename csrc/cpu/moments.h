// Mean and centred sum of squares of a block of values, for pearson.cpp: in float where its range allows, else in
// double.
#pragma once

#include "../math/pearson.h"
#include "block.h"

KD_NAMESPACE_BEGIN

// Whether a float sum of squares may have under- or overflowed: then the chunk is summed again in double. 0 is
// included, since only the values can tell a constant channel from a tiny one.
KD_HD bool out_of_range(double squares) { return !(squares > 1e-24 && squares < 1e36); }

template <class A>
KD_HD bool all_equal(const A* x, int n, A value) {
  int different = 0;
  for (int i = 0; i < n; ++i) different += x[i] != value;
  return different == 0;
}

// Moments of the values value(0), ..., value(n - 1) in double, which holds the square of any float.
template <class A, class F>
void add_in_double(Moments& moments, int n, A shift, const F& value) {
  double sum = 0, squares = 0;
  for (int i = 0; i < n; ++i) sum += double(value(i)) - double(shift);
  const double mean = sum / n;
  for (int i = 0; i < n; ++i) {
    const double d = (double(value(i)) - double(shift)) - mean;
    squares += d * d;
  }
  moments.merge(n, mean, squares);
}

template <class A>
KD_HD void add_chunk(Moments& moments, const A* x, int n, A shift) {
  using V = vec<A>;
  V sum = constant<V>(0), squares = constant<V>(0);
  for_each_vector<A>(
      n, [&](int i) { sum += load_and_ask(x + i) - shift; },
      [&](int i, int k) { sum += load_part(x + i, k, shift) - shift; });
  const double mean = sum_lanes<A>(sum) / n;
  const A middle = A(mean);
  const auto square = [&](V value) -> V {
    const V d = (value - shift) - middle;
    return d * d;
  };
  const V padding = square(constant<V>(0) + shift);
  for_each_vector<A>(
      n, [&](int i) { squares += square(load(x + i)); },
      [&](int i, int k) {
        V last = square(load_part(x + i, k, shift));
        for (int j = k; j < lanes<A>; ++j) last[j] -= padding[j];
        squares += last;
      });
  const double total = sum_lanes<A>(squares);
  if (total == 0 && all_equal(x, n, shift)) return moments.merge(n, 0, 0);  // a dead channel, quickly
  if (out_of_range(total)) return add_in_double(moments, n, shift, [&](int i) { return x[i]; });
  // The squares are about the rounded mean: exact after removing n (mean - middle)^2.
  const double rounding = mean - double(middle);
  moments.merge(n, mean, total - n * rounding * rounding);
}

KD_NAMESPACE_END
