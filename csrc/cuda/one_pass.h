// The entry point of one_pass.cu.
#pragma once

#include <stdint.h>

#include "../arguments.h"

namespace kdkernels {
namespace cuda {

// A gradient without gaps: `count` elements at `from`, whose multiples go to `to`, which may be the same.
struct ScaledGradient {
  const char* from;
  char* to;
  Dtype dtype;
  int64_t count;
};

// Multiplies each by *upstream, a float on the device; nothing is written in place where that is 1. Returns what went
// wrong, or null.
const char* scale_gradients(const ScaledGradient* gradients, int count, const float* upstream, void* stream);

}  // namespace cuda
}  // namespace kdkernels
