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

struct SoftCrossEntropyState {
  SoftmaxState student, teacher;
  double dot = 0;       // sum of soft_term
  double weighted = 0;  // sum of w_c exp(t - max t)
  double hard_sum = 0;  // sum of exp(s - max s) at T = 1

  KD_HD bool empty() const { return student.empty() || teacher.empty(); }

  KD_HD void raise(double student_maximum, double teacher_maximum, double k) {
    const double old_student = student.maximum;
    const double old_sum = student.sum;
    raise_maximum(student, student_maximum, k);
    const double factor = raise_maximum(teacher, teacher_maximum, k);
    const double moved = student.maximum == old_student ? 0 : student.maximum - old_student;
    if (moved != 0) {
      hard_sum *= old_sum == 0 ? 0.0 : exp2(-moved * log2_e);
      if (weighted != 0) dot -= weighted * moved;
    }
    dot = factor == 0 ? 0 : factor * dot;
    weighted *= factor;
  }

  KD_HD double soft(double inverse_temperature) const {
    const double mass = weighted == 0 ? 0 : weighted / teacher.sum * log(student.sum);
    return mass - dot * inverse_temperature / teacher.sum;
  }
  // `target` is the student's logit of the label.
  KD_HD double hard(double target) const { return log(hard_sum) - (target - student.shift()); }
};

KD_NAMESPACE_END
