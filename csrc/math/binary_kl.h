// KL(Bernoulli(sigmoid(t / T)) || Bernoulli(sigmoid(s / T))) of one logit, and T times the gradient's (sigmoid -
// sigmoid). Everything is formed from e = exp(-|x|), so neither side of either sigmoid loses its digits when it
// saturates.
#pragma once

#include "number.h"

KD_NAMESPACE_BEGIN

// One scaled logit x = z / T with e = exp(-|x|) and l = log(1 + e).
template <class V>
struct Logistic {
  V x, e, l;

  KD_HD V positive() const { return (x > constant<V>(0) ? constant<V>(1) : e) / (constant<V>(1) + e); }
  KD_HD V negative() const { return (x > constant<V>(0) ? e : constant<V>(1)) / (constant<V>(1) + e); }
  KD_HD V low() const { return x < constant<V>(0) ? x : constant<V>(0); }   // log sigmoid(x) + l
  KD_HD V high() const { return x > constant<V>(0) ? x : constant<V>(0); }  // -(log sigmoid(-x) + l)
};

template <class V>
KD_HD V binary_kl_value(const Logistic<V>& s, const Logistic<V>& t) {
  const V zero = constant<V>(0);
  const V p = t.positive(), q = t.negative();
  const V l = t.l - s.l;
  const V inside = p * ((t.low() - s.low()) - l), outside = q * ((s.high() - t.high()) - l);
  const V kl = (p == zero ? zero : inside) + (q == zero ? zero : outside);
  // Equal logits by comparison: a compiler may fuse one product of a difference of equals, and leave its rounding.
  return s.x == t.x ? zero : (kl < zero ? zero : kl);
}

// sigmoid(s) - sigmoid(t); where both are near 1, from their distances to 1.
template <class V>
KD_HD V sigmoid_difference(const Logistic<V>& s, const Logistic<V>& t) {
  const V plain = s.positive() - t.positive(), mirrored = t.negative() - s.negative();
  const V least = s.x < t.x ? s.x : t.x;
  return least > constant<V>(0) ? mirrored : plain;
}

KD_NAMESPACE_END
