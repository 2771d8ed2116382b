// Class-weighted soft cross-entropy of one row, mixed with the hard one (Chen et al. 2017, eq. 2-3):
//   (1 - h) * -sum_c w_c p_t,c log p_s,c  +  h * CE(s, y),   p = softmax(z / T), the hard part at T = 1.
// Gradient: (1 - h) / T * (p_s sum_c w_c p_t,c - w_c p_t,c)  +  h * (softmax(s) - onehot(y)).
#pragma once

#include "softmax.h"

KD_NAMESPACE_BEGIN

// One class's share of sum w p_t (s - max s). A class with w p_t = 0 contributes 0 whatever the student has.
template <class V>
KD_HD V soft_term(V weighted_exp, V student_shifted) {
  const V product = weighted_exp * student_shifted;
  return weighted_exp == constant<V>(0) ? constant<V>(0) : product;
}

template <class A>
struct SoftCrossEntropyState {
  SoftmaxState<A> student, teacher;
  A dot = 0;       // sum of soft_term
  A weighted = 0;  // sum of w_c exp(t - max t)
  A hard_sum = 0;  // sum of exp(s - max s) at T = 1

  KD_HD bool empty() const { return student.empty() || teacher.empty(); }

  KD_HD void raise(A student_maximum, A teacher_maximum, A k) {
    const A old_student = student.maximum;
    const A old_sum = student.sum;
    raise_maximum(student, student_maximum, k);
    const A factor = raise_maximum(teacher, teacher_maximum, k);
    const A moved = student.maximum == old_student ? A(0) : student.maximum - old_student;
    if (moved != 0) {
      hard_sum *= old_sum == 0 ? A(0) : A(exp2(-moved * A(log2_e)));
      if (weighted != 0) dot -= weighted * moved;
    }
    dot = factor == 0 ? A(0) : factor * dot;
    weighted *= factor;
  }

  KD_HD A soft(A inverse_temperature) const {
    const A mass = weighted == 0 ? A(0) : weighted / teacher.sum * A(log(student.sum));
    return mass - dot * inverse_temperature / teacher.sum;
  }
  // `target` is the student's logit of the label.
  KD_HD A hard(A target) const { return A(log(hard_sum)) - (target - student.shift()); }
};

KD_NAMESPACE_END
