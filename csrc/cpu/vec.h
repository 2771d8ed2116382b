// SIMD values: GCC vector extensions at the width of the instruction set that this file is compiled for, and the few
// elementary functions that the losses need. Written for nonpositive exponents only: every caller subtracts a maximum.
#pragma once

#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../math/number.h"

#if defined(__AVX512F__)
#define KD_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define KD_VECTOR_BYTES 32
#else
#define KD_VECTOR_BYTES 16
#endif

KD_NAMESPACE_BEGIN

template <class A>
struct vec_of;
template <>
struct vec_of<float> {
  typedef float type __attribute__((vector_size(KD_VECTOR_BYTES)));
  typedef int32_t bits __attribute__((vector_size(KD_VECTOR_BYTES)));
};
template <>
struct vec_of<double> {
  typedef double type __attribute__((vector_size(KD_VECTOR_BYTES)));
  typedef int64_t bits __attribute__((vector_size(KD_VECTOR_BYTES)));
};
template <class A>
using vec = typename vec_of<A>::type;

template <>
struct element_of<vec<float>> {
  using type = float;
};
template <>
struct element_of<vec<double>> {
  using type = double;
};

template <class A>
constexpr int lanes = KD_VECTOR_BYTES / int(sizeof(A));

template <class A>
KD_HD vec<A> load(const A* p) {
  vec<A> v;
  memcpy(&v, p, sizeof(v));
  return v;
}

// True in the first n lanes.
template <class A>
KD_HD typename vec_of<A>::bits first_lanes(int n) {
  typename vec_of<A>::bits number;
  for (int i = 0; i < lanes<A>; ++i) number[i] = i;
  return number < n;
}

// The last n < lanes values; the other lanes hold `fill`, which the caller chooses to be neutral. Nothing beyond the n
// values is touched.
template <class A>
KD_HD vec<A> load_part(const A* p, int n, A fill) {
  const vec<A> rest = constant<vec<A>>(0) + fill;
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return (vec<A>)_mm512_mask_loadu_ps((__m512)rest, __mmask16((1u << n) - 1), p);
  if constexpr (sizeof(A) == 8) return (vec<A>)_mm512_mask_loadu_pd((__m512d)rest, __mmask8((1u << n) - 1), p);
#elif defined(__AVX2__)
  const auto first = first_lanes<A>(n);
  if constexpr (sizeof(A) == 4) return first ? (vec<A>)_mm256_maskload_ps(p, (__m256i)first) : rest;
  if constexpr (sizeof(A) == 8) return first ? (vec<A>)_mm256_maskload_pd(p, (__m256i)first) : rest;
#else
  vec<A> v = rest;
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}

template <class A>
KD_HD void store(A* p, vec<A> v) {
  memcpy(p, &v, sizeof(v));
}

template <class A>
KD_HD void store_part(A* p, vec<A> v, int n) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), (__m512)v);
  if constexpr (sizeof(A) == 8) _mm512_mask_storeu_pd(p, __mmask8((1u << n) - 1), (__m512d)v);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) _mm256_maskstore_ps(p, (__m256i)first_lanes<A>(n), (__m256)v);
  if constexpr (sizeof(A) == 8) _mm256_maskstore_pd(p, (__m256i)first_lanes<A>(n), (__m256d)v);
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}

// n lanes of a vector, from lane `first` on. Written lane by lane, which compilers turn into a shuffle; a copy through
// memory would wait for its store.
template <class A, int n>
struct vec_of_lanes {
  typedef A type __attribute__((vector_size(n * sizeof(A))));
};
template <int... lane>
struct Lanes {};
template <int n, int... lane>
struct LanesBelow : LanesBelow<n - 1, n - 1, lane...> {};
template <int... lane>
struct LanesBelow<0, lane...> {
  typedef Lanes<lane...> type;
};
template <class A, int first, class V, int... lane>
KD_HD auto some_lanes(const V& v, Lanes<lane...>) {
  return typename vec_of_lanes<A, sizeof...(lane)>::type{v[first + lane]...};
}
template <class A, int first, int n, class V>
KD_HD auto some_lanes(const V& v) {
  return some_lanes<A, first>(v, typename LanesBelow<n>::type());
}

// All n lanes joined: the upper half to the lower one, until one is left.
template <class A, int n, class V, class F>
KD_HD A fold(const V& v, const F& join) {
  if constexpr (n == 2) {
    return join(v[0], v[1]);
  } else {
    return fold<A, n / 2>(join(some_lanes<A, 0, n / 2>(v), some_lanes<A, n / 2, n / 2>(v)), join);
  }
}

// n lanes from `first` on, added up in double, four (or two) at a time.
template <class A, int first, int n>
KD_HD auto lanes_in_double(const vec<A>& v) {
  constexpr int chunk = lanes<double> < 4 ? lanes<double> : 4;
  if constexpr (n == chunk) {
    return __builtin_convertvector(some_lanes<A, first, chunk>(v), typename vec_of_lanes<double, chunk>::type);
  } else {
    return lanes_in_double<A, first, n / 2>(v) + lanes_in_double<A, first + n / 2, n / 2>(v);
  }
}

// Sum, taken in double, and maximum over the lanes: always in the same order.
template <class A>
KD_HD double sum_lanes(vec<A> v) {
  const auto sum = lanes_in_double<A, 0, lanes<A>>(v);
  return fold<double, sizeof(sum) / sizeof(double)>(sum, [](auto a, auto b) { return a + b; });
}

template <class A>
KD_HD A max_lanes(vec<A> v) {
  return fold<A, lanes<A>>(v, [](auto a, auto b) { return larger(a, b); });
}

// Walks over n values: full(i) for each whole vector at i, then part(i, count) for the count < lanes that are left.
template <class A, class Full, class Part>
KD_HD void for_each_vector(int n, Full full, Part part) {
  int i = 0;
  for (; i + lanes<A> <= n; i += lanes<A>) full(i);
  if (i < n) part(i, n - i);
}

// 2^x for x <= 0. Relative error under 2e-7 (float) and 4e-16 (double); 0 below the normal numbers; NaN stays NaN.
// x = n + f with |f| <= 1/2; 2^f by a polynomial, 2^n by its exponent bits. At the clamp n is minus the bias, so
// the bits are 0 and so is the product.
KD_HD vec<float> exp2_nonpositive(vec<float> x) {
  typedef vec_of<float>::bits bits;
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer kept in the low bits
  const vec<float> low = constant<vec<float>>(-127);
  x = x < low ? low : x;
  const vec<float> shifted = x + round;
  const vec<float> f = x - (shifted - round);
  vec<float> p = f * 0.00015345812f + 0.0013399931f;  // minimax: 1.9e-9 before rounding
  p = p * f + 0.009618489f;
  p = p * f + 0.055503286f;
  p = p * f + 0.24022646f;
  p = p * f + 0.69314718f;
  p = p * f + 1.0f;
  bits exponent;
  memcpy(&exponent, &shifted, sizeof(exponent));
  exponent = (exponent + (127 - 0x4b400000)) << 23;
  vec<float> scale;
  memcpy(&scale, &exponent, sizeof(scale));
  return p * scale;
}

KD_HD vec<double> exp2_nonpositive(vec<double> x) {
  typedef vec_of<double>::bits bits;
  const double round = 6755399441055744.0;  // 1.5 * 2^52
  const vec<double> low = constant<vec<double>>(-1023);
  x = x < low ? low : x;
  const vec<double> shifted = x + round;
  const vec<double> f = (x - (shifted - round)) * 0.693147180559945309417;
  vec<double> p = constant<vec<double>>(1.0 / 6227020800.0);
  const double taylor[] = {
      1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040, 1.0 / 720,
      1.0 / 120,       1.0 / 24,       1.0 / 6,       1.0 / 2,      1.0,         1.0};
  for (double coefficient : taylor) p = p * f + coefficient;
  bits exponent;
  memcpy(&exponent, &shifted, sizeof(exponent));
  exponent = (exponent + (1023 - 0x4338000000000000LL)) << 52;
  vec<double> scale;
  memcpy(&scale, &exponent, sizeof(scale));
  return p * scale;
}

// log(1 + x) for 0 <= x <= 1, as 2 artanh(x / (2 + x)). Relative error under 2e-7 (float), 1e-15 (double).
template <class A>
KD_HD vec<A> log1p_unit(vec<A> x) {
  const vec<A> y = x / (x + A(2));
  const vec<A> y2 = y * y;
  constexpr int terms = sizeof(A) == 4 ? 8 : 17;
  vec<A> p = constant<vec<A>>(1.0 / (2 * terms + 1));
  for (int k = terms - 1; k >= 0; --k) p = p * y2 + A(1.0 / (2 * k + 1));
  return (y + y) * p;
}

KD_NAMESPACE_END
