// KL(Bernoulli(sigmoid(t / T)) || Bernoulli(sigmoid(s / T))) of one logit, and T times the gradient's (sigmoid -
// sigmoid). Everything is formed from e = exp(-|x|), so neither side of either sigmoid loses its digits when it
// saturates.
#pragma once

#include "temperature_kl.h"  // exp_remainder

KD_NAMESPACE_BEGIN

// One scaled logit x = z / T with e = exp(-|x|) and l = log(1 + e).
template <class V>
struct Logistic {
  V x, e, l;

  KD_HD V positive() const { return quotient(x > constant<V>(0) ? constant<V>(1) : e, constant<V>(1) + e); }
  KD_HD V negative() const { return quotient(x > constant<V>(0) ? e : constant<V>(1), constant<V>(1) + e); }
  KD_HD V low() const { return x < constant<V>(0) ? x : constant<V>(0); }   // log sigmoid(x) + l
  KD_HD V high() const { return x > constant<V>(0) ? x : constant<V>(0); }  // -(log sigmoid(-x) + l)
};

// For logits that are close, d = x_s - x_t with |d| <= 1/2: with r the smaller of p and 1 - p (and d's sign turned with
// it),
//   KL = r (exp(d) - 1 - d) + (log(1 + y) - y),  y = r (exp(d) - 1),
// whose second term is at most half the first: nothing cancels.
template <class V>
KD_HD V close_binary_kl(const Logistic<V>& t, V d) {
  const V p = t.positive(), q = t.negative();
  const V r = p < q ? p : q, signed_d = p < q ? d : -d;
  const V remainder = r * exp_remainder(signed_d), y = r * signed_d + remainder;
  // log(1 + y) - y with z = y / (2 + y): 2 artanh(z) - y = -y z + 2 z^3 (1/3 + z^2 / 5 + ...)
  const V z = quotient(y, y + constant<V>(2)), z2 = z * z;
  constexpr int terms = sizeof(element_t<V>) == 4 ? 5 : 11;
  V series = constant<V>(1.0 / (2 * terms + 1));
  for (int k = terms - 1; k >= 1; --k) series = series * z2 + constant<V>(1.0 / (2 * k + 1));
  const V kl = remainder + (z2 * z * series * constant<V>(2) - y * z);
  return kl < constant<V>(0) ? constant<V>(0) : kl;
}

// `difference` is x_s - x_t, formed from the logits before they were scaled.
template <class V>
KD_HD V binary_kl_value(const Logistic<V>& s, const Logistic<V>& t, V difference) {
  const V zero = constant<V>(0);
  const V p = t.positive(), q = t.negative();
  const V l = t.l - s.l;
  const V inside = p * ((t.low() - s.low()) - l), outside = q * ((s.high() - t.high()) - l);
  const V kl = (p == zero ? zero : inside) + (q == zero ? zero : outside);
  const V far = kl < zero ? zero : kl;
  // Equal infinities have no difference, but they are equal.
  const V near = magnitude(difference) <= constant<V>(0.5) ? close_binary_kl(t, difference) : far;
  return s.x == t.x ? (difference == difference ? near : zero) : near;
}

// sigmoid(s) - sigmoid(t); where both are near 1, from their distances to 1. What is divided is chosen first: a
// division costs more than all the rest.
template <class V>
KD_HD V sigmoid_difference(const Logistic<V>& s, const Logistic<V>& t) {
  const V zero = constant<V>(0), one = constant<V>(1);
  const V least = s.x < t.x ? s.x : t.x;
  // Mirrored: t.negative() - s.negative(), and both x are above 0. Plain: s.positive() - t.positive().
  const V plain_s = s.x > zero ? one : s.e, plain_t = t.x > zero ? one : t.e;
  const V below_s = one + s.e, below_t = one + t.e;
  const V first = quotient(least > zero ? t.e : plain_s, least > zero ? below_t : below_s);
  const V second = quotient(least > zero ? s.e : plain_t, least > zero ? below_s : below_t);
  return first - second;
}

KD_NAMESPACE_END
