// KL(softmax(t / T) || softmax(s / T)) of one row, from sums under each side's maximum:
//   KL = (1 / T) sum_c p_t,c ((t_c - max t) - (s_c - max s)) + log(sum_s / sum_t).
// The gradient of T^2 KL is T (p_s - p_t).
#pragma once

#include "softmax.h"

KD_NAMESPACE_BEGIN

// One class's share of the first sum. p_t = 0 contributes 0 whatever the student has; NaN stays.
template <class V>
KD_HD V kl_term(V teacher_exp, V teacher_shifted, V student_shifted) {
  const V product = teacher_exp * (teacher_shifted - student_shifted);
  return teacher_exp == constant<V>(0) ? constant<V>(0) : product;
}

// exp(u) - 1 - u for |u| <= 1/2, by its series: relative error of a rounding, where the plain difference cancels.
template <class V>
KD_HD V exp_remainder(V u) {
  constexpr double series[] = {1.0 / 2,         1.0 / 6,          1.0 / 24,          1.0 / 120,         1.0 / 720,
                               1.0 / 5040,      1.0 / 40320,      1.0 / 362880,      1.0 / 3628800,     1.0 / 39916800,
                               1.0 / 479001600, 1.0 / 6227020800, 1.0 / 87178291200, 1.0 / 1307674368e3};
  constexpr int terms = sizeof(element_t<V>) == 4 ? 8 : 14;
  V p = constant<V>(series[terms - 1]);
  for (int k = terms - 2; k >= 0; --k) p = p * u + constant<V>(series[k]);
  return p * u * u;
}

// KL of a row whose sides are close, where the sums of KlState cancel. With u = (s - max s - t + max t) / T,
//   KL = E[exp(u) - 1 - u] + (log(1 + y) - y),  y = E[exp(u) - 1],  E over p_t:
// small terms of one size. One class's share of the first expectation, without 1 / sum_t:
template <class V>
KD_HD V close_kl_term(V student_exp, V teacher_exp, V u) {
  const V half = constant<V>(0.5);
  const V far = student_exp - teacher_exp - teacher_exp * u;
  return magnitude(u) <= half ? teacher_exp * exp_remainder(u) : (teacher_exp == constant<V>(0) ? student_exp : far);
}

// log(1 + y) - y, with the relative error of a few roundings: 2 artanh(z) - y with z = y / (2 + y).
template <class A>
KD_HD A log1p_remainder(A y) {
  if (!(y >= A(-0.5) && y <= A(0.5))) return A(log1p(y)) - y;
  const A z = y / (y + 2), z2 = z * z;
  constexpr int terms = sizeof(A) == 4 ? 7 : 16;
  A series = A(1.0 / (2 * terms + 1));
  for (int k = terms - 1; k >= 1; --k) series = series * z2 + A(1.0 / (2 * k + 1));
  return z2 * z * series * 2 - y * z;
}

// Below this the row is summed again as a close one: above, the cancellation costs less than the formula's own
// rounding.
template <class A>
constexpr A close_kl = A(sizeof(A) == 4 ? 0.25 : 0.05);

template <class A>
struct KlState {
  SoftmaxState<A> student, teacher;
  A dot = 0;  // sum of kl_term under the current maxima

  KD_HD bool empty() const { return student.empty() || teacher.empty(); }

  // Rebases what was summed so far onto maxima that include a new block.
  KD_HD void raise(A student_maximum, A teacher_maximum, A k) {
    const A old_student = student.maximum, old_teacher = teacher.maximum, old_sum = teacher.sum;
    raise_maximum(student, student_maximum, k);
    const A factor = raise_maximum(teacher, teacher_maximum, k);
    if (old_sum == 0) return;  // nothing summed yet
    const A moved_student = student.maximum == old_student ? A(0) : student.maximum - old_student;
    const A moved_teacher = teacher.maximum - old_teacher;
    dot = factor == 0 ? A(0) : factor * (dot + old_sum * (moved_student - moved_teacher));
  }

  // The divergence is never negative; rounding may be.
  KD_HD A value(A inverse_temperature) const {
    const A kl = dot * inverse_temperature / teacher.sum + A(log(student.sum / teacher.sum));
    return kl < 0 ? A(0) : kl;
  }
};

KD_NAMESPACE_END
