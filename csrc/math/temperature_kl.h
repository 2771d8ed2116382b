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

struct KlState {
  SoftmaxState student, teacher;
  double dot = 0;  // sum of kl_term under the current maxima

  KD_HD bool empty() const { return student.empty() || teacher.empty(); }

  // Rebases what was summed so far onto maxima that include a new block.
  KD_HD void raise(double student_maximum, double teacher_maximum, double k) {
    const double old_student = student.maximum, old_teacher = teacher.maximum, old_sum = teacher.sum;
    raise_maximum(student, student_maximum, k);
    const double factor = raise_maximum(teacher, teacher_maximum, k);
    if (old_sum == 0) return;  // nothing summed yet
    const double moved_student = student.maximum == old_student ? 0 : student.maximum - old_student;
    const double moved_teacher = teacher.maximum - old_teacher;
    dot = factor == 0 ? 0 : factor * (dot + old_sum * (moved_student - moved_teacher));
  }

  // The divergence is never negative; rounding may be.
  KD_HD double value(double inverse_temperature) const {
    const double kl = dot * inverse_temperature / teacher.sum + log(student.sum / teacher.sum);
    return kl < 0 ? 0 : kl;
  }
};

KD_NAMESPACE_END
