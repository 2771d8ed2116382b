// Smooth L1 and the teacher-bounded L2 of one coordinate (Chen et al. 2017, eq. 4-5). The gate, per coordinate, row or
// batch, is a step: its gradient is 0.
#pragma once

#include "number.h"

KD_NAMESPACE_BEGIN

enum class Gate : int { row, element, batch };

// 0.5 d^2 / beta below beta, |d| - beta / 2 above; |d| for beta = 0.
template <class V>
KD_HD V smooth_l1(V difference, V beta) {
  const V d = magnitude(difference);
  return d < beta ? constant<V>(0.5) * d * d / beta : d - constant<V>(0.5) * beta;
}

template <class V>
KD_HD V smooth_l1_gradient(V difference, V beta) {
  const V zero = constant<V>(0);
  const V sign = difference > zero ? constant<V>(1) : (difference < zero ? constant<V>(-1) : difference);
  return magnitude(difference) < beta ? difference / beta : sign;
}

// Open while the student is not better than the teacher by the margin: strict, so equality closes it.
template <class V>
KD_HD V bound_gate(V student_error, V teacher_error, V margin) {
  return student_error + margin > teacher_error ? constant<V>(1) : constant<V>(0);
}

KD_NAMESPACE_END
