// The pairs of element types, student and teacher, that kernels exist for.
#pragma once

#include "primitives.cuh"

KD_NAMESPACE_BEGIN

// Host: whether kernels exist for these element types.
constexpr bool pair_served(Dtype student, Dtype teacher) {
  return student != Dtype::float64 && (teacher == student || teacher == Dtype::float32);
}

// Host: calls body(S(), T()) with the element types of a pair.
template <class F>
const char* with_types(Dtype student, Dtype teacher, const F& body) {
  if (!pair_served(student, teacher)) return "no kernel for this pair of dtypes";
  const bool same = student == teacher;
  switch (student) {
    case Dtype::bfloat16:
      return same ? body(BFloat16(), BFloat16()) : body(BFloat16(), float());
    case Dtype::float16:
      return same ? body(Half(), Half()) : body(Half(), float());
    default:
      return body(float(), float());
  }
}

KD_NAMESPACE_END
