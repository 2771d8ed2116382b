// What every header of math/ may use: qualifiers, the capability namespace, and the element type of a value.
//
// A function of math/ is a template over V, a number. On a GPU V is a scalar; on the CPU it is a scalar or a GCC
// vector, for which the operators, comparisons and `mask ? a : b` mean the same lane by lane. So each formula
// is written once. Nothing here may include torch or the CUDA runtime.
//
// Everything lives in a namespace named after the instruction set it is compiled for. Without that the linker would
// merge the AVX-512 and the baseline copy of an inline function and could run the wrong one.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define KD_HD __host__ __device__ __forceinline__
#else
#define KD_HD inline __attribute__((always_inline))
#endif

#ifndef KD_CAPABILITY
#define KD_CAPABILITY base
#endif

#define KD_NAMESPACE_BEGIN \
  namespace kdkernels {    \
  namespace KD_CAPABILITY {
#define KD_NAMESPACE_END \
  }                      \
  }

KD_NAMESPACE_BEGIN

// The scalar inside a value: A for a vector of A (vec.h specialises it), the type itself otherwise.
template <class V>
struct element_of {
  using type = V;
};
template <class V>
using element_t = typename element_of<V>::type;

// A constant as a V. `V{} + x` broadcasts for vectors and is x for scalars.
template <class V>
KD_HD V constant(double x) {
  return V{} + static_cast<element_t<V>>(x);
}

template <class V>
KD_HD V larger(V a, V b) {
  return a > b ? a : b;
}

// a / b for |a| and b of ordinary size. cuda/primitives.cuh has a shorter one for a GPU.
template <class V>
KD_HD V quotient(V a, V b) {
  return a / b;
}

template <class V>
KD_HD V magnitude(V x) {
  return x < constant<V>(0) ? -x : x;
}

KD_NAMESPACE_END
